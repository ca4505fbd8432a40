"""CapFilt on one shard, or a part of one: the unit of work, of retry and of resume.

`manifest` tells which files come out. Another threshold needs `x.captions.jsonl` and the input
images, and no model.
"""

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from openblip import __version__
from openblip.capfilt.images import (
    ImageReader,
    Prepared,
    is_left_out,
    load_predicate,
    stack,
)
from openblip.capfilt.keep import JudgedImage, KeepRule, select
from openblip.capfilt.manifest import (
    Manifest,
    OutputPaths,
    failed_lines,
    judged_lines,
    read_failed,
    read_judged,
)
from openblip.capfilt.models import EncodedBatch, Models
from openblip.capfilt.recipe import CapfiltRecipe, recipe_of, settings_of
from openblip.capfilt.units import Snapshot, Unit, checksum_of, stamp_of, whole
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.data.shards import checksum
from openblip.data.sinks import whole_file, write_json_atomically
from openblip.data.sources import Address
from openblip.data.writers import open_writer

OnProgress = Callable[[int, float, float], None]
"""Hears of images that were judged, and the seconds waited for them, and spent on them."""


class OtherRunError(ValueError):
    """A unit was done with other settings, models or input; `manifest` tells with which."""

    def __init__(self, manifest: Path, changes: Sequence[str]) -> None:
        super().__init__(
            f"{manifest} is of another run: {'; '.join(changes)}; choose another folder or --force"
        )
        self.manifest, self.changes = manifest, changes

    def __reduce__(self) -> tuple[type, tuple[Path, Sequence[str]]]:
        # An exception is pickled by its text, between processes.
        return OtherRunError, (self.manifest, self.changes)


def process_shard(
    shard: Address | Unit,
    folder: Path,
    models: Models,
    recipe: CapfiltRecipe,
    *,
    on_progress: OnProgress = lambda images, waited, worked: None,
) -> Manifest:
    """Write and judge captions of one unit of work, and keep what the rule keeps.

    Returns the manifest; that of a unit which is done already comes back as it is.
    Raises OtherRunError if it was done with other settings, models or input; ValueError as reading
    the shard does; RemoteError for what cannot be fetched; FloatingPointError if a filter diverged.
    """
    unit = shard if isinstance(shard, Unit) else whole(shard)
    paths = OutputPaths.of(unit.name, folder, recipe.output)
    done = done_manifest(unit, folder, models.captioner_ids, models.filter_ids, recipe)
    if done is not None:
        return done
    read = Snapshot.of(unit)
    run = _Run(unit, models, recipe, on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        spool = _Spool(file)
        judged = list(run.judge_all(spool))
        return _write(
            paths, read, select(judged, recipe.keep), spool.samples(), run.failed, run.seconds,
            captioner=models.captioner_ids, judge=models.filter_ids, settings=settings_of(recipe),
        )  # fmt: skip


def done_manifest(
    unit: Unit, folder: Path, captioner: str, judge: str, recipe: CapfiltRecipe
) -> Manifest | None:
    """Return the manifest of a unit that is done; None if it is not.

    captioner, judge  hashes of the models' weights
    Raises OtherRunError if it was done with other settings, models or input.
    """
    paths = OutputPaths.of(unit.name, folder, recipe.output)
    if not paths.manifest.exists():
        return None
    done = Manifest.read(paths.manifest)
    settings = settings_of(recipe)
    stamp = stamp_of(unit.shard)
    is_same = stamp is not None and stamp == done.input_stamp
    _refuse_changes(
        paths.manifest,
        [
            ("captioner", done.captioner, captioner),
            ("filter", done.filter, judge),
            ("part", (done.part, done.num_parts), (unit.part, unit.num_parts)),
            *(
                (f"setting {key}", done.settings.get(key), settings.get(key))
                for key in sorted({*done.settings, *settings})
            ),
            (
                "input",
                done.input_checksum,
                done.input_checksum if is_same else checksum_of(unit.shard),
            ),
        ],
    )
    return done if paths.captions.exists() and paths.data.exists() else None


def rethreshold_shard(manifest: Path, folder: Path, keep: KeepRule) -> Manifest:
    """Make another selection of a unit's judged captions, into another folder, without a model.

    Raises ValueError if the input shard is gone or is no longer what was judged, and if the rule
    asks of ITM what the run did not.
    """
    start = time.monotonic()
    done = Manifest.read(manifest)
    unit = done.unit(manifest.stem)
    read = Snapshot.if_there(unit)
    if read is None or read.checksum != done.input_checksum:
        raise ValueError(f"{unit.shard}, whose images {manifest} judged, is gone or has changed")
    given = OutputPaths.of(unit.name, manifest.parent, done.output)
    judged = select(list(read_judged(given.captions)), keep)
    folder.mkdir(parents=True, exist_ok=True)
    return _write(
        OutputPaths.of(unit.name, folder, done.output),
        read,
        judged,
        unit.samples(),
        read_failed(given.failed),
        {"start": start},
        captioner=done.captioner,
        judge=done.filter,
        settings={**done.settings, "keep": keep.model_dump(mode="json")},
    )


def retry_shard(manifest: Path, models: Models) -> Manifest:
    """Caption and judge what failed in a unit that is done, and write it anew with what succeeds.

    What was left out by choice stays so. Other images keep the judgement that they have.
    Raises ValueError if an image that was judged is gone or has changed, and for other models or
    another predicate.
    """
    done = Manifest.read(manifest)
    recipe = recipe_of(done)
    unit = done.unit(manifest.stem)
    paths = OutputPaths.of(unit.name, manifest.parent, done.output)
    for what, then, now in (
        ("captioner", done.captioner, models.captioner_ids),
        ("filter", done.filter, models.filter_ids),
        ("predicate", done.settings["predicate"], settings_of(recipe)["predicate"]),
    ):
        if then != now:
            raise ValueError(f"{manifest} is of the {what} {then}, not of {now}: take that")
    failed = read_failed(paths.failed)
    before = {image.key: image for image in read_judged(paths.captions)}
    wanted = {bad.key for bad in failed if not is_left_out(bad.reason)} - before.keys()
    if not wanted:
        return done
    read = Snapshot.of(unit)
    run = _Run(unit, models, recipe, only=frozenset(wanted))
    new = {image.key: image for image in run.judge_all(None)}
    if not new:
        return done
    reasons = {bad.key: bad.reason for bad in run.failed}
    still = [
        replace(bad, reason=reasons.get(bad.key, bad.reason))
        for bad in failed
        if bad.key not in new or bad.key in before
    ]
    # The input's order is that of an undisturbed run.
    judged = []
    for sample in unit.samples():
        image = before.pop(sample.key, None) or new.pop(sample.key, None)
        if image is not None:
            _check_image(unit, sample, image)
            judged.append(image)
    if before:
        raise ValueError(f"{unit}: {next(iter(before))}, which {manifest} judged, is gone")
    return _write(
        paths, read, select(judged, recipe.keep), unit.samples(), still, run.seconds,
        captioner=done.captioner, judge=done.filter, settings=done.settings,
    )  # fmt: skip


class _Run:
    """The models' work on a unit. Times are in `seconds` by stage."""

    def __init__(
        self,
        unit: Unit,
        models: Models,
        recipe: CapfiltRecipe,
        on_progress: OnProgress = lambda images, waited, worked: None,
        *,
        only: frozenset[str] | None = None,
    ) -> None:
        self.unit, self.models, self.recipe = unit, models, recipe
        self.failed: list[BadSample] = []
        self.seconds: dict[str, float] = {"start": time.monotonic()}
        self._on_progress, self._only = on_progress, only

    def judge_all(self, spool: "_Spool | None") -> Iterator[JudgedImage]:
        """Yield the judged images; their samples go to the spool, in the same order."""
        recipe = self.recipe
        reader = ImageReader(
            self.models.sizes_px,
            recipe.images,
            None if recipe.predicate is None else load_predicate(recipe.predicate),
            self.failed.append,
            self._only,
        )
        batches = reader.batches(self.unit.builds(), recipe.batch_size)
        while True:
            with self._timed("read") as waited:
                batch = next(batches, None)
            if batch is None:
                return
            begun = time.monotonic()
            yield from self._judge(batch)
            if spool is not None:
                for one in batch:
                    spool.add(one.sample)
            self._on_progress(len(batch), waited[0], time.monotonic() - begun)

    def _judge(self, batch: list[Prepared]) -> Iterator[JudgedImage]:
        samples = [one.sample for one in batch]
        encoded = EncodedBatch(stack(batch))
        with self._timed("caption"):
            written = self.models.caption(encoded, [sample.key for sample in samples])
        captions = [[*s.captions, *new] for s, new in zip(samples, written, strict=True)]
        with self._timed("judge"):
            judged = self.models.judge(
                encoded,
                captions,
                ensemble=self.recipe.ensemble,
                min_similarity=self.recipe.keep.min_similarity,
            )
        for sample, several in zip(samples, judged, strict=True):
            yield JudgedImage(
                sample.key, tuple(several), sample.meta, image_hash(sample.image_bytes)
            )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[list[float]]:
        spent = [0.0]
        start = time.monotonic()
        yield spent
        spent[0] = time.monotonic() - start
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent[0]


def image_hash(data: bytes) -> str:
    """Return a 16-digit hash of an image's bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _write(
    paths: OutputPaths,
    read: Snapshot,
    judged: Sequence[JudgedImage],
    samples: Iterable[Sample],
    failed: list[BadSample],
    seconds: Mapping[str, float],
    *,
    captioner: str,
    judge: str,
    settings: Mapping[str, Any],
) -> Manifest:
    """Write the files of a unit, the manifest last; `samples` come in the order of `judged`."""
    begun = time.monotonic()
    unit = read.unit
    read.check()
    kept: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    for image in judged:
        for caption in image.captions:
            if caption.drop_reason is None:
                kept[caption.source] += 1
            else:
                dropped.setdefault(caption.source, Counter())[caption.drop_reason] += 1
    # What is written anew must not pass for done meanwhile.
    paths.manifest.unlink(missing_ok=True)
    with whole_file(paths.captions) as temporary, temporary.open("wb") as file:
        file.writelines(judged_lines(iter(judged)))
    if failed:
        with whole_file(paths.failed) as temporary, temporary.open("wb") as file:
            file.writelines(failed_lines(failed))
    else:
        paths.failed.unlink(missing_ok=True)
    with open_writer(paths.data, settings["output"]) as writer:
        for sample, image in _matched(unit, samples, judged):
            captions = tuple(c for c in image.captions if c.drop_reason is None)
            if captions:
                writer.write(replace(sample, captions=captions))
    now = time.monotonic()
    spent = {name: value for name, value in seconds.items() if name != "start"}
    spent |= {"write": now - begun, "total": now - seconds["start"]}
    manifest = Manifest(
        shard=str(unit.shard.absolute()),
        part=unit.part,
        num_parts=unit.num_parts,
        input_checksum=read.checksum,
        input_stamp=read.stamp,
        output_checksum=checksum(paths.data),
        captioner=captioner,
        filter=judge,
        settings=settings,
        version=__version__,
        num_images=len(judged),
        bad=dict(Counter(bad.reason for bad in failed)),
        kept=dict(kept),
        dropped={source: dict(reasons) for source, reasons in dropped.items()},
        seconds={name: round(value, 3) for name, value in spent.items()},
    )
    write_json_atomically(paths.manifest, manifest.to_json())
    return manifest


def _matched(
    unit: Unit, samples: Iterable[Sample], judged: Sequence[JudgedImage]
) -> Iterator[tuple[Sample, JudgedImage]]:
    """Yield each judged image with its sample, past samples that were not judged.

    Raises ValueError if a sample is gone, or its image has changed.
    """
    waiting = iter(judged)
    image = next(waiting, None)
    for sample in samples:
        if image is not None and sample.key == image.key:
            _check_image(unit, sample, image)
            yield sample, image
            image = next(waiting, None)
    if image is not None:
        raise ValueError(f"{unit}: {image.key} was judged, and is gone")


class _Spool:
    """Samples that wait to be written, with their images in a file.

    The input is read once: what is remote may have changed by the second time.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._waiting: list[tuple[Sample, int]] = []

    def add(self, sample: Sample) -> None:
        self._file.write(sample.image_bytes)
        self._waiting.append((replace(sample, image_bytes=b""), len(sample.image_bytes)))

    def samples(self) -> Iterator[Sample]:
        self._file.seek(0)
        for sample, num_bytes in self._waiting:
            yield replace(sample, image_bytes=self._file.read(num_bytes))


def _refuse_changes(path: Path, pairs: Sequence[tuple[str, object, object]]) -> None:
    changes = [f"{name} was {before} and is {now}" for name, before, now in pairs if before != now]
    if changes:
        raise OtherRunError(path, changes)


def _check_image(unit: Unit, sample: Sample, image: JudgedImage) -> None:
    # Folders of earlier versions have no hashes.
    if image.image_hash not in ("", image_hash(sample.image_bytes)):
        raise ValueError(f"{unit}: the image of {sample.key} has changed since it was judged")
