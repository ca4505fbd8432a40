"""Stores give what the index itself gives, and are refused when they are behind it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from openblip.search.index import COLUMNS, Index
from openblip.search.stores import build_store, open_store
from openblip.search.writer import IndexWriter
from openblip.serve.works import SharedIndex

ROWS, WIDTH = 3000, 32


def build_index(folder: Path, num_rows: int) -> Index:
    """Return an index of clustered vectors, every tenth of them deleted."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, WIDTH, generator=generator)
    noise = 0.5 * torch.randn(num_rows, WIDTH, generator=generator)
    vectors = F.normalize(centres.repeat(num_rows // 30, 1) + noise, dim=1)
    rows = [
        dict.fromkeys(COLUMNS.names)
        | {"key": str(n), "address": "nowhere", "caption": "", "captions": "[]", "meta": "{}"}
        for n in range(num_rows)
    ]
    with IndexWriter(folder, model="m", model_id="m", embedding_width=WIDTH) as writer:
        half = num_rows // 2
        writer.add(rows[:half], vectors[:half])
        writer.add(rows[half:], vectors[half:])
        writer.delete(list(range(0, num_rows, 10)))
    return Index.open(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(tmp_path_factory.mktemp("stores") / "index", ROWS)


@pytest.fixture(scope="module")
def queries() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(F.normalize(torch.randn(20, WIDTH, generator=generator), dim=1))


KINDS = ["faiss-ivf", "faiss-hnsw", "lance", "qdrant"]


def address_of(kind: str, folder: Path) -> str:
    return str(folder / "qdrant") if kind == "qdrant" else ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_filtered", [False, True])
def test_a_store_finds_what_the_index_finds(
    kind, is_filtered, index: Index, queries, tmp_path
) -> None:
    if kind == "qdrant":
        # Without a server it keeps every point as a row of SQLite, and takes its time.
        index = build_index(tmp_path / "index", 150)
    build_store(index, kind, address_of(kind, tmp_path))
    store = open_store(index, kind)
    allowed = np.arange(index.num_rows) % 3 == 1 if is_filtered else None
    num_found = 0
    for query in queries:
        expected, cosines = index.top(query, 10, allowed)
        numbers, similarities = store.top(index, query, 10, allowed)
        assert len(numbers) == 10
        assert all(index.is_live[n] and (allowed is None or allowed[n]) for n in numbers)
        assert similarities == sorted(similarities, reverse=True)
        num_found += len(set(expected) & set(numbers))
        if numbers == expected:
            assert similarities == pytest.approx(cosines, abs=1e-4)
    # Recall at 10: the approximate ones may miss some of what is far away from everything.
    assert num_found >= 0.9 * 10 * len(queries)


def test_a_store_behind_its_index_is_refused(add, source, tmp_path) -> None:
    add(source("folder"), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    build_store(index, "faiss-hnsw")
    store = open_store(index, "faiss-hnsw")
    with IndexWriter.of(tmp_path / "index") as writer:
        writer.delete([0])
    index.refresh()
    with pytest.raises(ValueError, match="made before the index changed; make it anew"):
        store.top(index, torch.ones(8), 3, None)
    with pytest.raises(ValueError, match="made before the index changed"):
        open_store(index, "faiss-hnsw")


def test_a_server_goes_on_without_a_store_that_is_behind(add, source, tmp_path, caplog) -> None:
    add(source("folder"), tmp_path / "index")
    with pytest.raises(ValueError, match="has no store of faiss-hnsw"):
        SharedIndex(Index.open(tmp_path / "index"), "faiss-hnsw")
    build_store(Index.open(tmp_path / "index"), "faiss-hnsw")
    shared = SharedIndex(Index.open(tmp_path / "index"), "faiss-hnsw")
    assert shared.newest()[1] is not None
    with IndexWriter.of(tmp_path / "index") as writer:
        writer.delete([0])
    index, store = shared.newest()
    assert (len(index), store) == (11, None)
    assert "made before the index changed" in caplog.text
    with IndexWriter.of(tmp_path / "index") as writer:
        writer.delete([1])
    build_store(Index.open(tmp_path / "index"), "faiss-hnsw")
    assert shared.newest()[1] is not None


def test_what_is_wrong_with_a_store_is_told(index, tmp_path) -> None:
    with pytest.raises(ValueError, match="give the Qdrant server's address"):
        build_store(index, "qdrant")
    with pytest.raises(ValueError, match="lies beside its index"):
        build_store(index, "faiss-ivf", "somewhere")
    with IndexWriter(tmp_path / "empty", model="m", model_id="m", embedding_width=4) as writer:
        with pytest.raises(ValueError, match="holds no images"):
            build_store(writer.index, "faiss-ivf")
        with pytest.raises(ValueError, match="has no store of lance: openblip index store"):
            open_store(writer.index, "lance")
