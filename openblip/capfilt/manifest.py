"""What CapFilt leaves of a unit of work, and how it is read back.

A unit `x` becomes, in the output folder,

    x.tar             images with their kept captions; an image that keeps none is not in it.
                      Other kinds of output: x.parquet, x.jsonl, or a folder x of loose files
    x.captions.jsonl  every caption of every image, judged, with the reason if it was dropped
    x.failed.jsonl    what was not captioned, with the reason; absent if that is nothing
    x.json            the manifest, written last: a unit that has it is done
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.units import Unit
from openblip.data.rows import BadSample
from openblip.data.samples import Caption
from openblip.data.shards import Shard
from openblip.data.sinks import json_line
from openblip.data.writers import OutputKind, output_suffix


@dataclass(frozen=True)
class Manifest:
    """What was done with one unit.

    shard, part, num_parts  of the input
    input_checksum          of the shard's bytes; of a folder, of its files' names and sizes
    input_stamp             size in bytes and time of change: while they stay, the checksum does
    output_checksum         of the written samples
    captioner, filter       hashes of the weights; with a + between those of several
    num_images              images that were captioned and judged
    bad                     samples that were not, by reason
    kept, dropped           captions by source, and by source and reason
    seconds                 spent in each stage, and in `total`
    """

    shard: str
    input_checksum: str
    output_checksum: str
    captioner: str
    filter: str
    settings: Mapping[str, Any]
    version: str
    num_images: int
    bad: Mapping[str, int]
    kept: Mapping[str, int]
    dropped: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    part: int = 0
    num_parts: int = 1
    input_stamp: tuple[int, int] | None = None

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest. Raises ValueError if it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            stamp = values["input_stamp"]
            return cls(**{**values, "input_stamp": None if stamp is None else tuple(stamp)})
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no CapFilt manifest: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def unit(self, name: str) -> Unit:
        """Return the unit that this manifest, of that name, is about."""
        return Unit(name, Shard.at(self.shard), self.part, self.num_parts)

    @property
    def output(self) -> OutputKind:
        """The kind of file that the samples were written to."""
        # Earlier versions wrote tar alone.
        kind: OutputKind = self.settings.get("output", "tar")
        return kind


@dataclass(frozen=True)
class OutputPaths:
    """The files that a unit becomes."""

    data: Path
    captions: Path
    failed: Path
    manifest: Path

    @classmethod
    def of(cls, name: str, folder: Path, kind: OutputKind = "tar") -> "OutputPaths":
        """Return the paths for the unit of this name."""
        return cls(
            folder / f"{name}{output_suffix(kind)}",
            folder / f"{name}.captions.jsonl",
            folder / f"{name}.failed.jsonl",
            folder / f"{name}.json",
        )


def manifests(folder: Path) -> list[Path]:
    """Return the manifests of the units that are done, in the order of their names.

    A JSON file is one if judged captions lie beside it: reports lie in the same folder.
    """
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if OutputPaths.of(path.stem, folder).captions.exists()
    ]


def some_manifests(folder: Path) -> list[Path]:
    """Return the same. Raises ValueError if no unit is done."""
    done = manifests(folder)
    if not done:
        raise ValueError(
            f"{folder} holds no shard that CapFilt did: expected x.json beside x.captions.jsonl"
        )
    return done


def remove_unit(manifest: Path) -> None:
    """Remove all files of a unit that is done, the manifest first."""
    done = Manifest.read(manifest)
    paths = OutputPaths.of(manifest.stem, manifest.parent, done.output)
    for path in (paths.manifest, paths.data, paths.captions, paths.failed):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_judged(path: Path) -> Iterator[JudgedImage]:
    """Yield the images of a `captions.jsonl`. Raises ValueError for a line that is not one."""
    for number, value in _lines(path):
        try:
            captions = tuple(Caption.from_json(c, "web") for c in value["captions"])
            yield JudgedImage(value["key"], captions, value["meta"], value.get("image", ""))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from error


def judged_by(done: Iterable[Path]) -> Iterator[JudgedImage]:
    """Yield the judged images of units, whose manifests are given. Raises as `read_judged` does."""
    for manifest in done:
        yield from read_judged(OutputPaths.of(manifest.stem, manifest.parent).captions)


def read_failed(path: Path) -> list[BadSample]:
    """Return what a `failed.jsonl` holds; nothing if there is none.

    Raises ValueError for a line that is none.
    """
    if not path.exists():
        return []
    try:
        return [BadSample(value["key"], value["reason"]) for _, value in _lines(path)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no failed samples: {error!r}") from error


def judged_lines(images: Iterator[JudgedImage]) -> Iterator[bytes]:
    """Yield the lines of a `captions.jsonl`."""
    for image in images:
        captions = [caption.to_json() for caption in image.captions]
        line = {"key": image.key, "image": image.image_hash, "captions": captions}
        yield json_line({**line, "meta": image.meta}) + b"\n"


def failed_lines(failed: list[BadSample]) -> Iterator[bytes]:
    """Yield the lines of a `failed.jsonl`."""
    for bad in failed:
        yield json_line({"key": bad.key, "reason": bad.reason}) + b"\n"


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
