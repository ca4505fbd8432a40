"""From a data set into an index: what is new is embedded, what is there already is left alone."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openblip.data.prefetch import map_beside
from openblip.data.rows import BadSample, Build, UnreachableImageError
from openblip.data.samples import Sample
from openblip.data.shards import Shard
from openblip.data.sources import list_shards, read_builds
from openblip.images import ImageDecodeError, decode_image, eval_transform, perceptual_hash
from openblip.inference import Engine
from openblip.search.index import Known
from openblip.search.places import image_checksum
from openblip.search.writer import IndexWriter
from openblip.training.log import ProgressLine

REPEATED_KEY = "repeated_key"
SMALL_SEGMENTS = 32
"""An index of more segments than these is made one again after an addition."""

_log = logging.getLogger(__name__)

OnBad = Callable[[str, str], None]


@dataclass
class AddReport:
    """What an addition did, in images.

    bad  that cannot be used, by reason
    """

    num_added: int = 0
    num_replaced: int = 0
    num_unchanged: int = 0
    num_pruned: int = 0
    num_images: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "bad": dict(self.bad)}


@dataclass(frozen=True)
class _Prepared:
    """A sample, and, unless its bytes are in the index already, its image (3, S, S)."""

    row: dict[str, Any]
    image: Tensor | None


def add_source(
    writer: IndexWriter,
    engine: Engine,
    source: str,
    *,
    commit_images: int = 1024,
    batch_size: int = 16,
    has_states: bool = False,
    is_pruned: bool = False,
    on_bad: OnBad,
) -> AddReport:
    """Add the images of a data set to an open index.

    commit_images  images that are committed together; whoever is killed loses no more
    has_states     keep the image states too, for ITM without the images
    is_pruned      delete what this data set held and holds no more: of shards that are listed, and
                   of those in its folder that are there no more; not what could not be read
    on_bad         called with key and reason of what cannot be used
    An image that is in the index as it is now is left alone; other bytes, captions or fields, or
    another place, replace it. A key that another shard of the index has, and still is there, is
    refused as `repeated_key`.
    Raises ValueError for no data set, and as reading shards does.
    """
    report = AddReport()
    known = writer.index.known()
    seen: set[str] = set()
    unusable: set[str] = set()
    shards = [shard.absolute() for shard in list_shards(source)]

    def refuse(key: str, reason: str) -> None:
        report.bad[reason] += 1
        on_bad(key, reason)

    batch: list[_Prepared] = []
    rows: list[dict[str, Any]] = []
    embeddings: list[Tensor] = []
    states: list[Tensor] = []

    def embed() -> None:
        if not batch:
            return
        pixels = torch.stack([one.image for one in batch if one.image is not None])
        if has_states:
            encoded = engine.encode(pixels)
            states.append(encoded.states.half().cpu())
            embeddings.append(engine.embed_images(encoded))
        else:
            embeddings.append(engine.embed_images(pixels))
        rows.extend(one.row for one in batch)
        batch.clear()

    def commit() -> None:
        embed()
        if not rows:
            return
        replaced = [known[row["key"]].number for row in rows if row["key"] in known]
        writer.add(
            rows, torch.cat(embeddings), torch.cat(states) if states else None, replaced=replaced
        )
        report.num_added += len(rows) - len(replaced)
        report.num_replaced += len(replaced)
        _log.info("committed %d images", len(rows))
        rows.clear()
        embeddings.clear()
        states.clear()

    with ProgressLine("indexing", None, unit="images") as line:
        for entry in _prepared(shards, engine.image_size_px, known):
            line.advance()
            if isinstance(entry, BadSample):
                refuse(entry.key, entry.reason)
                unusable.add(entry.key)
                continue
            key = entry.row["key"]
            if key in seen or _is_elsewhere(entry.row, known):
                refuse(key, REPEATED_KEY)
                continue
            seen.add(key)
            if entry.image is None:
                report.num_unchanged += 1
                continue
            batch.append(entry)
            if len(batch) == min(batch_size, commit_images):
                embed()
            if len(rows) >= commit_images:
                commit()
        commit()
    if is_pruned:
        listed, folder = {str(shard) for shard in shards}, Path(source).absolute()
        gone = [
            one.number
            for key, one in writer.index.known().items()
            if key not in seen and key not in unusable and _is_of(one.address, listed, folder)
        ]
        if gone:
            writer.delete(gone)
        report.num_pruned = len(gone)
    if len(writer.index.state.segments) > SMALL_SEGMENTS:
        writer.compact()
    report.num_images = len(writer.index)
    return report


def _is_of(address: str, listed: set[str], folder: Path) -> bool:
    """Say whether a shard is one of a data set, or lay in its folder and is there no more."""
    if address in listed:
        return True
    shard = Shard.at(address)
    return not shard.is_remote and shard.path.is_relative_to(folder) and not shard.path.exists()


def _is_elsewhere(row: dict[str, Any], known: Mapping[str, Known]) -> bool:
    """Say whether another shard, which is still there, has an image of this key."""
    if row["key"] not in known:
        return False
    address = known[row["key"]].address
    if address == row["address"]:
        return False
    shard = Shard.at(address)
    return shard.is_remote or shard.path.exists()


def _prepared(
    shards: list[Shard], size_px: int, known: Mapping[str, Known]
) -> Iterator[_Prepared | BadSample]:
    """Yield all samples in order, read and decoded by threads ahead of the model."""

    def entries() -> Iterator[tuple[Shard, int, Build]]:
        for shard in shards:
            # In a folder and in a tar shard an image is found by its key, wherever it stands.
            is_table = shard.suffix != ".tar" and (shard.is_remote or not shard.path.is_dir())
            for number, build in enumerate(read_builds(shard)):
                yield shard, number if is_table else 0, build

    def prepare(entry: tuple[Shard, int, Build]) -> _Prepared | BadSample:
        shard, number, build = entry
        try:
            sample = build("web")
        except UnreachableImageError as error:
            return BadSample(error.key, "unreachable_image")
        if isinstance(sample, BadSample):
            return sample
        row = {
            "key": sample.key, "address": str(shard), "entry": number,
            "checksum": image_checksum(sample.image_bytes), **_described(sample),
        }  # fmt: skip
        before = known.get(sample.key)
        if before is not None and all(
            getattr(before, name) == row[name]
            for name in ("address", "entry", "checksum", "captions", "meta")
        ):
            return _Prepared(row, None)
        try:
            image = decode_image(sample.image_bytes)
            pixels = eval_transform(image, size_px)
        except ImageDecodeError as error:
            return BadSample(sample.key, error.reason)
        row |= {"width": image.width, "height": image.height, "hash": perceptual_hash(image)}
        return _Prepared(row, pixels)

    return map_beside(prepare, entries())


def _described(sample: Sample) -> dict[str, Any]:
    """Return what is known of a sample, as columns."""
    texts = [caption.text for caption in sample.captions if caption.drop_reason is None]
    return {
        "num_bytes": len(sample.image_bytes),
        "caption": "\n".join(texts),
        "captions": json.dumps([one.to_json() for one in sample.captions], ensure_ascii=False),
        "meta": json.dumps(dict(sample.meta), ensure_ascii=False, default=str),
    }
