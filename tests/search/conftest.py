"""A tiny model, and drawn pictures as loose files, tar, parquet and JSON lines."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openblip.checkpoint import model_id
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import SampleWriter, ShardWriter
from openblip.data.world import draw_scene, random_scene
from openblip.data.writers import FolderWriter, JsonLinesWriter, ParquetWriter
from openblip.hub import load
from openblip.inference import Engine
from openblip.search.add import AddReport, add_source
from openblip.search.writer import IndexWriter
from tests.cli.conftest import model, world  # noqa: F401

Add = Callable[..., AddReport]
WRITERS: dict[str, type[SampleWriter]] = {
    "folder": FolderWriter, "tar": ShardWriter, "parquet": ParquetWriter, "jsonl": JsonLinesWriter,
}  # fmt: skip


@pytest.fixture(scope="session")
def engine(model: Path) -> Engine:  # noqa: F811
    return Engine.plain(*load(model))


@pytest.fixture(scope="session")
def identity(model: Path) -> str:  # noqa: F811
    return model_id(load(model)[0])


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """Return twelve drawn pictures by name."""
    rng = np.random.default_rng(0)
    return {f"picture_{n:02d}": draw_scene(random_scene(rng), 48, rng) for n in range(12)}


@pytest.fixture
def source(tmp_path: Path, pictures: dict[str, bytes]) -> Callable[[str], Path]:
    """Write the pictures as one kind of data set, with a caption and a number each."""

    def write(kind: str) -> Path:
        samples = [
            Sample(key, data, (Caption(f"caption of {key}", "human"),), {"number": n})
            for n, (key, data) in enumerate(pictures.items())
        ]
        path = tmp_path / (kind if kind == "folder" else f"shard.{kind}")
        with WRITERS[kind](path) as writer:
            for sample in samples:
                writer.write(sample)
        return path

    return write


@pytest.fixture
def add(engine: Engine, identity: str) -> Add:
    """Add a data set to an index."""

    def add(source: Path, index: Path, **options: object) -> AddReport:
        width = engine.backend.config.embedding_width
        with IndexWriter(index, model="tiny", model_id=identity, embedding_width=width) as writer:
            bad: list[tuple[str, str]] = []
            options = {"on_bad": lambda key, reason: bad.append((key, reason)), **options}
            return add_source(writer, engine, str(source), **options)  # type: ignore[arg-type]

    return add
