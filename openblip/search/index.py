"""An index of images: embeddings, mapped into memory, with what is known of each image.

    INDEX/index.json                    which segments there are and which rows are deleted
    INDEX/segments/NAME/embeddings.npy  (rows, E) float32, unit norm
    INDEX/segments/NAME/rows.parquet    `COLUMNS`, in the same order
    INDEX/segments/NAME/states.npy      (rows, 1 + N, D) float16, if wanted

A segment never changes. Replacing `index.json` is the commit: what it does not name is not there,
so whoever is killed leaves the index as it was after the last commit.

Letters: E embedding width, N patches, D width, R rows of the whole index, deleted ones included.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from openblip.data.shards import checksum
from openblip.search.places import Place, Places

FORMAT = 1
INDEX_FILE, SEGMENTS = "index.json", "segments"
EMBEDDINGS, ROWS, STATES = "embeddings.npy", "rows.parquet", "states.npy"
BLOCK_ROWS = 1 << 20
"""Rows that a query is compared with at a time."""

COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("address", pa.string()),
        ("entry", pa.int64()),
        ("checksum", pa.string()),
        ("num_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("hash", pa.uint64()),
        ("caption", pa.string()),
        ("captions", pa.string()),
        ("meta", pa.string()),
    ]
)
"""Of every image: its key; the shard that it lies in and, of a table, its row there; hash and
number of its bytes; pixels; 64 bits of its looks; captions as lines of text and as JSON; further
fields as JSON.
"""


@dataclass(frozen=True)
class Segment:
    """Rows that were written together. `checksum` is of the names and contents of its files."""

    name: str
    num_rows: int
    checksum: str


@dataclass(frozen=True)
class State:
    """What `index.json` says.

    index_id    of this index alone, by which stores elsewhere name it
    model       address of the model that embedded the images
    model_id    hash of its weights
    generation  number of the commit
    deleted     rows of a segment that are there no more
    """

    index_id: str
    model: str
    model_id: str
    embedding_width: int
    generation: int = 0
    segments: tuple[Segment, ...] = ()
    deleted: Mapping[str, Sequence[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "format": FORMAT,
            "index_id": self.index_id,
            "model": self.model,
            "model_id": self.model_id,
            "embedding_width": self.embedding_width,
            "generation": self.generation,
            "segments": [vars(segment) for segment in self.segments],
            "deleted": {name: list(rows) for name, rows in (self.deleted or {}).items() if rows},
        }


@dataclass(frozen=True)
class Known:
    """An image of an index: its number, and columns that another image would have otherwise."""

    number: int
    address: str
    entry: int
    checksum: str
    captions: str
    meta: str


def read_state(folder: Path) -> State:
    """Read what an index holds. Raises ValueError if the folder is no index that we read."""
    path = folder / INDEX_FILE
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no index: `openblip index SOURCE {folder}` makes one") from (
            None
        )
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {values.get('format')!r}; this version reads {FORMAT}"
        )
    segments = tuple(Segment(**one) for one in values["segments"])
    return State(
        values["index_id"], values["model"], values["model_id"], values["embedding_width"],
        values["generation"], segments, values["deleted"],
    )  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """A segment whose files are open: embeddings (rows, E), rows, states (rows, 1 + N, D)."""

    segment: Segment
    vectors: NDArray[np.float32]
    table: pa.Table
    states: NDArray[np.float16] | None

    @classmethod
    def at(cls, index: Path, segment: Segment, width: int) -> "_Opened":
        """Open a segment. Raises FileNotFoundError, and ValueError if it is not what it was."""
        folder = index / SEGMENTS / segment.name
        # "c": torch wants arrays that it may write to. Nobody does.
        vectors = np.load(folder / EMBEDDINGS, mmap_mode="c", allow_pickle=False)
        table = pq.read_table(folder / ROWS, schema=COLUMNS, memory_map=True)
        has_states = (folder / STATES).exists()
        states = np.load(folder / STATES, mmap_mode="c") if has_states else None
        expected = (segment.num_rows, width)
        if vectors.shape != expected or len(table) != segment.num_rows:
            raise ValueError(
                f"{folder} holds {vectors.shape} embeddings of {len(table)} rows, and "
                f"{expected} were committed"
            )
        return cls(segment, vectors, table, states)


def segment_checksum(folder: Path) -> str:
    """Hash the files of a segment."""
    files = [folder / name for name in (EMBEDDINGS, ROWS, STATES) if (folder / name).exists()]
    return hashlib.blake2b(
        "".join(checksum(file) for file in files).encode(), digest_size=16
    ).hexdigest()


class Index:
    """A view of an index as it was when it was opened, or last refreshed.

    Images have numbers, 0 to R - 1. They hold until `refresh` finds another generation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = Places()
        self._opened: list[_Opened] = []
        self._take(read_state(folder))

    @classmethod
    def open(cls, folder: str | Path) -> "Index":
        """Open an index. Raises ValueError if the folder is none, or a file of it is absent."""
        return cls(Path(folder))

    def refresh(self) -> bool:
        """Take up what was committed since; return whether anything was."""
        state = read_state(self.folder)
        if state.generation == self.state.generation:
            return False
        self._take(state)
        return True

    def __len__(self) -> int:
        return int(self.is_live.sum())

    @property
    def model_id(self) -> str:
        """Hash of the weights of the model that embedded the images."""
        return self.state.model_id

    @property
    def embedding_width(self) -> int:
        """E."""
        return self.state.embedding_width

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.is_live)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of all R rows."""
        chunks = [chunk for one in self._opened for chunk in one.table.column(name).chunks]
        return pa.chunked_array(chunks, COLUMNS.field(name).type)

    def row(self, number: int) -> dict[str, Any]:
        """Return all columns of an image."""
        segment, row = self._place(number)
        [values] = self._opened[segment].table.slice(row, 1).to_pylist()
        found: dict[str, Any] = values
        return found

    def metadata(self, number: int) -> dict[str, Any]:
        """Return what people may want to know of an image: captions, size, and its own fields."""
        row = self.row(number)
        return {
            "address": row["address"],
            "width": row["width"],
            "height": row["height"],
            "num_bytes": row["num_bytes"],
            "captions": json.loads(row["captions"]),
            **json.loads(row["meta"]),
        }

    def key(self, number: int) -> str:
        """Return the key of an image."""
        segment, row = self._place(number)
        return str(self._opened[segment].table.column("key")[row].as_py())

    def find(self, key: str) -> int:
        """Return the number of an image. Raises ValueError if there is no such key."""
        for number in np.flatnonzero(self.column("key").to_numpy() == key).tolist():
            if self.is_live[number]:
                return int(number)
        raise ValueError(f"{self.folder} has no image {key!r}")

    def places_of(self, numbers: Sequence[int]) -> list[Place]:
        """Return where images lie."""
        rows = [self.row(number) for number in numbers]
        return [Place(row["address"], row["key"], row["entry"], row["checksum"]) for row in rows]

    def image_bytes(self, number: int) -> bytes:
        """Read an image from where it was indexed. Raises UnreadableImageError."""
        return self.places.read(self.places_of([number])[0])

    def embeddings(self, numbers: Sequence[int]) -> Tensor:
        """Return embeddings of some images -> (number, E)."""
        rows = [self._opened[s].vectors[r] for s, r in map(self._place, numbers)]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, self.embedding_width)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield embeddings (rows, E) of all R rows, with the number of the first of them."""
        first = 0
        for one in self._opened:
            vectors = one.vectors
            for start in range(0, len(vectors), BLOCK_ROWS):
                yield first + start, torch.from_numpy(vectors[start : start + BLOCK_ROWS])
            first += len(vectors)

    def parts(
        self, wanted: NDArray[np.bool_], most_rows: int
    ) -> Iterator[tuple[pa.Table, NDArray[np.float32], NDArray[np.float16] | None]]:
        """Yield rows, embeddings and states of the wanted ones of R, some at a time, in order."""
        first = 0
        for one in self._opened:
            end = first + one.segment.num_rows
            rows = np.flatnonzero(wanted[first:end])
            for start in range(0, len(rows), most_rows):
                some = rows[start : start + most_rows]
                states = None if one.states is None else one.states[some]
                yield one.table.take(some), one.vectors[some], states
            first = end

    @property
    def with_states(self) -> NDArray[np.bool_]:
        """Of which of the R rows the image states are stored."""
        each = [np.full(one.segment.num_rows, one.states is not None) for one in self._opened]
        return np.concatenate([np.zeros(0, dtype=np.bool_), *each])

    def damaged(self) -> list[str]:
        """Return the names of segments whose files are not what was committed."""
        return [
            segment.name
            for segment in self.state.segments
            if segment_checksum(self.folder / SEGMENTS / segment.name) != segment.checksum
        ]

    def states(self, number: int) -> Tensor | None:
        """Return the stored image states (1 + N, D) of an image, None where there are none."""
        segment, row = self._place(number)
        stored = self._opened[segment].states
        return None if stored is None else torch.from_numpy(np.array(stored[row]))

    def top(
        self, embedding: Tensor, num: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[list[int], list[float]]:
        """Return numbers and cosines of the images nearest to an embedding (E,), nearest first.

        allowed  of all R rows; None: all
        """
        dead = self._dead if allowed is None else np.flatnonzero(~(self.is_live & allowed))
        best: list[tuple[float, int]] = []
        for first, vectors in self.blocks():
            # numpy's product of a matrix and a vector takes half as long as torch's, whose threads
            # would also stand in the way of numpy's here.
            similarity = vectors.numpy() @ embedding.numpy()
            # Where few are left out, to name them is far faster than to look at all.
            start, end = np.searchsorted(dead, (first, first + len(vectors)))
            similarity[dead[start:end] - first] = -np.inf
            # Few are nearer than the last one so far: to compare is faster than to sort.
            floor = best[-1][0] if len(best) == num else -np.inf
            places = np.flatnonzero(similarity > floor)
            top = torch.from_numpy(similarity[places]).topk(min(num, len(places)))
            numbers = places[top.indices.numpy()] + first
            best += zip(top.values.tolist(), numbers.tolist(), strict=True)
            best = sorted(best, key=lambda one: (-one[0], one[1]))[:num]
        return [number for _, number in best], [cosine for cosine, _ in best]

    def known(self) -> dict[str, Known]:
        """Return every image by its key, and what tells whether it has changed."""
        columns = [self.column(field.name).to_pylist() for field in fields(Known)[1:]]
        keys = self.column("key").to_pylist()
        return {
            key: Known(number, *facts)
            for number, (key, *facts) in enumerate(zip(keys, *columns, strict=True))
            if self.is_live[number]
        }

    def segment_rows(self, numbers: Sequence[int]) -> dict[str, list[int]]:
        """Return images as rows of their segments, by name, as deletions are written."""
        found: dict[str, list[int]] = {}
        for number in numbers:
            segment, row = self._place(number)
            found.setdefault(self.state.segments[segment].name, []).append(row)
        return found

    def _take(self, state: State) -> None:
        """Load a state; if its files went meanwhile because a newer one was committed, that one."""
        while True:
            try:
                self._load(state)
                return
            except FileNotFoundError as error:
                newer = read_state(self.folder)
                if newer.generation == state.generation:
                    raise ValueError(f"{self.folder} lacks {error.filename}") from error
                state = newer

    def _load(self, state: State) -> None:
        # Segments never change: what is open already stays open.
        open_before = {one.segment: one for one in self._opened}
        opened = [
            open_before.get(segment) or _Opened.at(self.folder, segment, state.embedding_width)
            for segment in state.segments
        ]
        live = []
        for segment in state.segments:
            is_live = np.ones(segment.num_rows, dtype=np.bool_)
            is_live[list((state.deleted or {}).get(segment.name, ()))] = False
            live.append(is_live)
        self.state, self._opened = state, opened
        self.is_live: NDArray[np.bool_] = np.concatenate([np.zeros(0, dtype=np.bool_), *live])
        self._dead = np.flatnonzero(~self.is_live)
        self._ends = np.cumsum([segment.num_rows for segment in state.segments])

    def _place(self, number: int) -> tuple[int, int]:
        """Return segment and row of an image."""
        if not 0 <= number < self.num_rows:
            raise ValueError(f"there is no image {number}: the index has {self.num_rows} rows")
        segment = int(np.searchsorted(self._ends, number, side="right"))
        start = 0 if segment == 0 else int(self._ends[segment - 1])
        return segment, number - start
