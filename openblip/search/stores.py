"""Stores that find the nearest images of a large index: faiss, LanceDB, Qdrant.

A store is a copy of an index's embeddings, made for one generation of it. The index stays what is
true: metadata, images and ITM come from there.

    INDEX/stores/KIND/store.json   what it was made for, and where it lies
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openblip.data.sinks import whole_folder, write_json_atomically
from openblip.search.index import Index
from openblip.training.log import ProgressLine

StoreKind = Literal["faiss-ivf", "faiss-hnsw", "lance", "qdrant"]
STORES, STORE_FILE = "stores", "store.json"
FAISS_FILE, NUMBERS_FILE = "index.faiss", "numbers.npy"
HNSW_LINKS = 32
NUM_PROBED, NUM_EXPLORED = 32, 128
"""Lists of an IVF index, and candidates of HNSW, that a query looks at."""
VECTORS_PER_LIST = 64
"""Of each list of an IVF index, that its centre is learned from."""
INDEXED_ROWS = 100_000
"""From so many rows on, LanceDB gets an index of its own; below, it compares with all."""
SENT_AT_ONCE = 512

Found = tuple[list[int], list[float]]


class Store(Protocol):
    """Finds the images nearest to an embedding."""

    def top(
        self, index: Index, embedding: Tensor, num: int, allowed: NDArray[np.bool_] | None
    ) -> Found:
        """As `Index.top`, nearly. Raises ValueError if the index has changed since."""
        ...


@dataclass(frozen=True)
class StoreFile:
    """What `store.json` says. `address` is where LanceDB or Qdrant have it; empty: beside it."""

    kind: StoreKind
    generation: int
    address: str = ""

    def check(self, index: Index) -> None:
        """Raise ValueError if the store was made for another state of the index."""
        if self.generation != index.state.generation:
            raise ValueError(
                f"the store {self.kind} of {index.folder} was made before the index changed; "
                f"make it anew: openblip index store {index.folder} --kind {self.kind}"
            )


class FaissStore:
    """A faiss file, mapped into memory, and the numbers of the images in it."""

    def __init__(self, folder: Path, file: StoreFile) -> None:
        faiss = _faiss()
        self._file = file
        # HNSW's links are not mapped: they are read in no order anyway.
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if file.kind == "faiss-ivf" else 0
        self._faiss = faiss.read_index(str(folder / FAISS_FILE), flags)
        self._numbers = np.load(folder / NUMBERS_FILE, mmap_mode="r", allow_pickle=False)

    def top(
        self, index: Index, embedding: Tensor, num: int, allowed: NDArray[np.bool_] | None
    ) -> Found:
        self._file.check(index)
        faiss = _faiss()
        query = embedding.float().numpy()[None]

        def nearest(most: int, **chosen: Any) -> Found:
            if self._file.kind == "faiss-ivf":
                parameters = faiss.SearchParametersIVF(nprobe=NUM_PROBED, **chosen)
            else:
                parameters = faiss.SearchParametersHNSW(efSearch=max(NUM_EXPLORED, most))
            most = min(most, len(self._numbers))
            cosines, rows = self._faiss.search(query, most, params=parameters)
            is_found = rows[0] >= 0
            return self._numbers[rows[0][is_found]].tolist(), cosines[0][is_found].tolist()

        if self._file.kind == "faiss-ivf" and allowed is not None:
            bits = np.packbits(allowed[self._numbers], bitorder="little")
            return nearest(num, sel=faiss.IDSelectorBitmap(bits))
        # A walk over HNSW's graph that may stop at some images alone loses its way.
        return _filtered(nearest, num, allowed, len(index))


class LanceStore:
    """A LanceDB table, in a folder or an object store."""

    def __init__(self, index: Index, folder: Path, file: StoreFile) -> None:
        self._file = file
        self._table = _lance(folder, file.address).open_table(_name(index))

    def top(
        self, index: Index, embedding: Tensor, num: int, allowed: NDArray[np.bool_] | None
    ) -> Found:
        self._file.check(index)
        query = embedding.float().numpy()

        def nearest(most: int) -> Found:
            rows = (
                self._table.search(query, vector_column_name="vector")
                .distance_type("cosine")
                .nprobes(NUM_PROBED)
                .refine_factor(4)
                .select(["number", "_distance"])
                .limit(most)
                .to_list()
            )
            return [row["number"] for row in rows], [1.0 - row["_distance"] for row in rows]

        return _filtered(nearest, num, allowed, len(index))


class QdrantStore:
    """A collection of a Qdrant server, or, for trials, of a folder."""

    def __init__(self, index: Index, file: StoreFile) -> None:
        self._file = file
        self._client = _qdrant(file.address)
        self._collection = _name(index)

    def top(
        self, index: Index, embedding: Tensor, num: int, allowed: NDArray[np.bool_] | None
    ) -> Found:
        self._file.check(index)

        def nearest(most: int) -> Found:
            points = self._client.query_points(
                self._collection, query=embedding.tolist(), limit=most, with_payload=False
            ).points
            return [int(point.id) for point in points], [point.score for point in points]

        return _filtered(nearest, num, allowed, len(index))


def build_store(index: Index, kind: StoreKind, address: str = "") -> StoreFile:
    """Copy an index's embeddings into a store.

    address  LanceDB: a folder or URL, by default beside the index; Qdrant: the server's URL
    Raises ValueError if the library is not installed, and for an index without images.
    """
    if not len(index):
        raise ValueError(f"{index.folder} holds no images")
    if address and kind.startswith("faiss"):
        raise ValueError(f"a store of {kind} lies beside its index; leave the address out")
    file = StoreFile(kind, index.state.generation, address)
    with whole_folder(index.folder / STORES / kind) as folder:
        match kind:
            case "faiss-ivf" | "faiss-hnsw":
                _build_faiss(index, folder, kind)
            case "lance":
                _build_lance(index, folder, address)
            case "qdrant":
                if not address:
                    raise ValueError("give the Qdrant server's address, as http://localhost:6333")
                _build_qdrant(index, address)
        write_json_atomically(folder / STORE_FILE, vars(file))
    return file


def open_store(index: Index, kind: StoreKind) -> Store:
    """Open a store of an index. Raises ValueError if there is none, or it is behind the index."""
    folder = index.folder / STORES / kind
    try:
        file = StoreFile(**json.loads((folder / STORE_FILE).read_text("utf-8")))
    except FileNotFoundError:
        raise ValueError(
            f"{index.folder} has no store of {kind}: openblip index store {index.folder} "
            f"--kind {kind} makes one"
        ) from None
    file.check(index)
    match kind:
        case "faiss-ivf" | "faiss-hnsw":
            return FaissStore(folder, file)
        case "lance":
            return LanceStore(index, folder, file)
        case "qdrant":
            return QdrantStore(index, file)


def _filtered(
    nearest: Callable[[int], Found], num: int, allowed: NDArray[np.bool_] | None, total: int
) -> Found:
    """Ask for more until enough of what comes is allowed."""
    most = num
    while True:
        numbers, cosines = nearest(min(most, total))
        if allowed is not None:
            kept = [place for place, number in enumerate(numbers) if allowed[number]]
            numbers, cosines = [numbers[k] for k in kept], [cosines[k] for k in kept]
        if len(numbers) >= num or most >= total:
            return numbers[:num], cosines[:num]
        most *= 4


def _live_blocks(index: Index) -> Any:
    """Yield numbers and embeddings (rows, E) of all live images, block by block."""
    with ProgressLine("store", len(index), unit="images") as line:
        for first, vectors in index.blocks():
            rows = np.flatnonzero(index.is_live[first : first + len(vectors)])
            if len(rows):
                yield rows + first, np.ascontiguousarray(vectors.numpy()[rows])
                line.advance(len(rows))


def _build_faiss(index: Index, folder: Path, kind: StoreKind) -> None:
    faiss = _faiss()
    width, total = index.embedding_width, len(index)
    if kind == "faiss-ivf":
        num_lists = max(1, min(round(4 * math.sqrt(total)), total // VECTORS_PER_LIST))
        quantizer = faiss.IndexFlatIP(width)
        built = faiss.IndexIVFFlat(quantizer, width, num_lists, faiss.METRIC_INNER_PRODUCT)
        wanted = min(total, VECTORS_PER_LIST * num_lists)
        live = np.flatnonzero(index.is_live)
        chosen = np.random.default_rng(0).choice(live, wanted, replace=False)
        built.train(index.embeddings(np.sort(chosen).tolist()).numpy())
    else:
        built = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    numbers = []
    for some, vectors in _live_blocks(index):
        built.add(vectors)
        numbers.append(some)
    faiss.write_index(built, str(folder / FAISS_FILE))
    np.save(folder / NUMBERS_FILE, np.concatenate(numbers))


def _build_lance(index: Index, folder: Path, address: str) -> None:
    import pyarrow as pa

    database = _lance(folder, address)
    kind = pa.list_(pa.float32(), index.embedding_width)
    schema = pa.schema([("number", pa.int64()), ("vector", kind)])
    table = database.create_table(_name(index), schema=schema, mode="overwrite")
    for numbers, vectors in _live_blocks(index):
        flat = pa.array(vectors.reshape(-1), type=pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, index.embedding_width)
        table.add(pa.table({"number": numbers, "vector": column}))
    if len(index) >= INDEXED_ROWS:
        table.create_index(metric="cosine", vector_column_name="vector")


def _build_qdrant(index: Index, address: str) -> None:
    from qdrant_client import models

    client, name = _qdrant(address), _name(index)
    if client.collection_exists(name):
        client.delete_collection(name)
    vectors_config = models.VectorParams(
        size=index.embedding_width, distance=models.Distance.COSINE, on_disk=True
    )
    client.create_collection(name, vectors_config=vectors_config)
    for numbers, vectors in _live_blocks(index):
        for start in range(0, len(numbers), SENT_AT_ONCE):
            part = slice(start, start + SENT_AT_ONCE)
            batch = models.Batch(ids=numbers[part].tolist(), vectors=vectors[part].tolist())
            client.upsert(name, batch)
    client.close()


def _name(index: Index) -> str:
    """Return a name that no other index has, wherever it is kept."""
    return f"openblip-{index.state.index_id}"


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ValueError("faiss is not installed: pip install 'openblip[faiss]'") from None
    # torch and faiss each bring threads; together they would only wait for each other.
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _lance(folder: Path, address: str) -> Any:
    try:
        import lancedb
    except ModuleNotFoundError:
        raise ValueError("LanceDB is not installed: pip install 'openblip[lance]'") from None
    return lancedb.connect(address or str(folder / "lance"))


def _qdrant(address: str) -> Any:
    try:
        from qdrant_client import QdrantClient
    except ModuleNotFoundError:
        raise ValueError("qdrant-client is not installed: pip install 'openblip[qdrant]'") from None
    is_server = address.startswith(("http://", "https://"))
    return QdrantClient(url=address) if is_server else QdrantClient(path=address)
