"""CapFilt on one shard: the unit of work, of retry and of resume.

A shard `x.tar` becomes, in the output folder,

    x.tar             images with their kept captions; an image that keeps none is not in it
    x.captions.jsonl  every caption of every image, judged, with the reason if it was dropped
    x.json            the manifest, written last: a shard that has all three is done

Another threshold needs `x.captions.jsonl` and the input images, and no model.
"""

import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from openblip import __version__
from openblip.batching import read_image
from openblip.capfilt.captioner import Captioner
from openblip.capfilt.filter import Filter, KeepRule
from openblip.captions import DEFAULT_PROMPT
from openblip.config import Recipe
from openblip.data.remote import RemoteAbsentError
from openblip.data.samples import Caption, Sample
from openblip.data.shards import Shard, checksum
from openblip.data.sinks import ShardWriter, write_bytes_atomically, write_json_atomically
from openblip.data.sources import Address, read_samples
from openblip.generation import Decoding
from openblip.images import ImageDecodeError
from openblip.kernels import Precision
from openblip.training.log import ProgressLine


class CapfiltRecipe(Recipe):
    """How captions are written, judged and kept; the defaults are the paper's."""

    decoding: Decoding = Decoding(method="nucleus", top_p=0.9)
    prompt: str = DEFAULT_PROMPT
    captions_per_image: int = Field(1, ge=1)
    keep: KeepRule = KeepRule()
    batch_size: int = Field(32, ge=1)
    dtype: Precision = "float32"
    seed: int = 42


@dataclass(frozen=True)
class Manifest:
    """What was done with one shard.

    shard, input_checksum  path of the input, and the hash of its bytes
    output_checksum        of the tar
    captioner, filter      hashes of the weights
    num_images             images that were read and judged
    bad                    samples that could not be used, by reason
    kept, dropped          captions by source, and by source and reason
    seconds                spent on this shard
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
    seconds: float

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest. Raises ValueError if it is none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no CapFilt manifest: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class JudgedImage:
    """All captions of one image, as a line of `x.captions.jsonl`."""

    key: str
    captions: tuple[Caption, ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class OutputPaths:
    """The three files that a shard becomes."""

    tar: Path
    captions: Path
    manifest: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> "OutputPaths":
        """Return the paths for the shard of this name, without its ending."""
        return cls(
            folder / f"{name}.tar", folder / f"{name}.captions.jsonl", folder / f"{name}.json"
        )


def manifests(folder: Path) -> list[Path]:
    """Return the manifests of the shards that are done, in the order of their names.

    A JSON file is one if judged captions lie beside it: reports lie in the same folder.
    """
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if OutputPaths.of(path.stem, folder).captions.exists()
    ]


def process_shard(
    shard: Address, folder: Path, captioner: Captioner, judge: Filter, recipe: CapfiltRecipe
) -> Manifest:
    """Write and judge captions of one shard, and keep what the rule keeps.

    Returns the manifest; that of a shard which is done already comes back as it is.
    Raises ValueError if it was done with other settings, models or input.
    """
    shard = Shard.at(shard)
    paths = OutputPaths.of(shard.stem, folder)
    settings = recipe.model_dump(mode="json")
    input_checksum = _checksum_of(shard)
    if paths.manifest.exists():
        done = Manifest.read(paths.manifest)
        _refuse_changes(paths.manifest, done, settings, captioner, judge, input_checksum)
        if paths.captions.exists() and paths.tar.exists():
            return done
    start = time.monotonic()
    bad: Counter[str] = Counter()
    judged: list[JudgedImage] = []
    folder.mkdir(parents=True, exist_ok=True)
    with ProgressLine(f"CapFilt {shard.name}", None, unit="images") as progress:
        for samples, images in _image_batches(shard, captioner, judge, recipe.batch_size, bad):
            keys = [sample.key for sample in samples]
            written = captioner.caption(images[0], keys)
            captions = [
                [*sample.captions, *new] for sample, new in zip(samples, written, strict=True)
            ]
            for sample, several in zip(samples, judge.judge(images[1], captions), strict=True):
                judged.append(JudgedImage(sample.key, tuple(several), sample.meta))
            progress.advance(len(samples))
    kept = [JudgedImage(one.key, recipe.keep.apply(one.captions), one.meta) for one in judged]
    return _write(
        paths,
        shard,
        kept,
        input_checksum=input_checksum,
        captioner=captioner.model,
        judge=judge.model,
        settings=settings,
        bad=bad,
        start=start,
    )


def rethreshold_shard(manifest: Path, folder: Path, keep: KeepRule) -> Manifest:
    """Make another selection of a shard's judged captions, into another folder, without a model.

    Raises ValueError if the input shard is gone or is no longer what was judged.
    """
    start = time.monotonic()
    done = Manifest.read(manifest)
    shard = Shard.at(done.shard)
    if not _is_unchanged(shard, done.input_checksum):
        raise ValueError(f"{shard}, whose images {manifest} judged, is gone or has changed")
    name = manifest.name.removesuffix(".json")
    judged = read_judged(OutputPaths.of(name, manifest.parent).captions)
    kept = [JudgedImage(one.key, keep.apply(one.captions), one.meta) for one in judged]
    folder.mkdir(parents=True, exist_ok=True)
    return _write(
        OutputPaths.of(name, folder),
        shard,
        kept,
        input_checksum=done.input_checksum,
        captioner=done.captioner,
        judge=done.filter,
        settings={**done.settings, "keep": keep.model_dump(mode="json")},
        bad=done.bad,
        start=start,
    )


def read_judged(path: Path) -> Iterator[JudgedImage]:
    """Yield the images of a `captions.jsonl`. Raises ValueError for a line that is not one."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                value = json.loads(line)
                captions = tuple(Caption.from_json(c, "web") for c in value["captions"])
                yield JudgedImage(value["key"], captions, value["meta"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _image_batches(
    shard: Shard, captioner: Captioner, judge: Filter, batch_size: int, bad: Counter[str]
) -> Iterator[tuple[list[Sample], tuple[Tensor, Tensor]]]:
    """Yield samples with their images, prepared for the captioner and for the filter."""
    sizes = [model.blip.config.vision.image_size_px for model in (captioner, judge)]
    samples: list[Sample] = []
    images: list[list[Tensor]] = [[], []]
    keys: set[str] = set()

    def on_bad(key: str, reason: str) -> None:
        bad[reason] += 1

    def batch() -> tuple[list[Sample], tuple[Tensor, Tensor]]:
        return list(samples), (torch.stack(images[0]), torch.stack(images[1]))

    for sample in read_samples(shard, on_bad=on_bad):
        if sample.key in keys:  # judged and written images are matched by their keys
            on_bad(sample.key, "repeated_key")
            continue
        keys.add(sample.key)
        try:
            prepared = {size: read_image(sample.image_bytes, size) for size in sorted(set(sizes))}
        except ImageDecodeError as error:
            on_bad(sample.key, error.reason)
            continue
        samples.append(sample)
        for column, size in zip(images, sizes, strict=True):
            column.append(prepared[size])
        if len(samples) == batch_size:
            yield batch()
            samples, images = [], [[], []]
    if samples:
        yield batch()


def _write(
    paths: OutputPaths,
    shard: Shard,
    judged: Sequence[JudgedImage],
    *,
    input_checksum: str,
    captioner: str,
    judge: str,
    settings: Mapping[str, Any],
    bad: Mapping[str, int],
    start: float,
) -> Manifest:
    """Write the three files of a shard, the manifest last."""
    kept: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    lines = io.StringIO()
    for image in judged:
        captions = [caption.to_json() for caption in image.captions]
        line = {"key": image.key, "captions": captions, "meta": image.meta}
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        for caption in image.captions:
            if caption.drop_reason is None:
                kept[caption.source] += 1
            else:
                dropped.setdefault(caption.source, Counter())[caption.drop_reason] += 1
    write_bytes_atomically(paths.captions, lines.getvalue().encode())
    with ShardWriter(paths.tar) as writer:
        for sample, image in _with_judged(shard, judged):
            captions_kept = tuple(c for c in image.captions if c.drop_reason is None)
            if captions_kept:
                writer.write(
                    Sample(
                        sample.key,
                        sample.image_bytes,
                        captions_kept,
                        sample.meta,
                        sample.image_extension,
                    )
                )
    manifest = Manifest(
        shard=str(shard.absolute()),
        input_checksum=input_checksum,
        output_checksum=checksum(paths.tar),
        captioner=captioner,
        filter=judge,
        settings=settings,
        version=__version__,
        num_images=len(judged),
        bad=dict(bad),
        kept=dict(kept),
        dropped={source: dict(reasons) for source, reasons in dropped.items()},
        seconds=round(time.monotonic() - start, 3),
    )
    write_json_atomically(paths.manifest, manifest.to_json())
    return manifest


def _with_judged(
    shard: Shard, judged: Sequence[JudgedImage]
) -> Iterator[tuple[Sample, JudgedImage]]:
    """Read the shard once more, in the same order, past what could not be used."""
    waiting = iter(judged)
    image = next(waiting, None)
    for sample in read_samples(shard, on_bad=lambda key, reason: None):
        if image is not None and sample.key == image.key:
            yield sample, image
            image = next(waiting, None)
    assert image is None, f"{image.key} was judged and is not in {shard}"


def _refuse_changes(
    path: Path,
    done: Manifest,
    settings: Mapping[str, Any],
    captioner: Captioner,
    judge: Filter,
    input_checksum: str,
) -> None:
    changes = [
        f"{name} was {before} and is {now}"
        for name, before, now in (
            ("captioner", done.captioner, captioner.model),
            ("filter", done.filter, judge.model),
            ("input", done.input_checksum, input_checksum),
            *(
                (f"setting {key}", done.settings.get(key), settings.get(key))
                for key in sorted({*done.settings, *settings})
            ),
        )
        if before != now
    ]
    if changes:
        raise ValueError(
            f"{path} is of another run: {'; '.join(changes)}; choose another folder or --force"
        )


def _is_unchanged(shard: Shard, checksum: str) -> bool:
    try:
        return _checksum_of(shard) == checksum
    except (FileNotFoundError, RemoteAbsentError):
        return False


def _checksum_of(shard: Shard) -> str:
    with shard.opened() as path:
        return checksum(path)
