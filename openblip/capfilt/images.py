"""What becomes of a unit's images before the models see them: checked, decoded, in batches."""

import runpy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from openblip.config import Recipe
from openblip.data.prefetch import map_beside
from openblip.data.rows import BadSample, Build, UnreachableImageError
from openblip.data.samples import Sample
from openblip.images import ImageDecodeError, decode_image, eval_transform, perceptual_hash

TOO_SMALL, TOO_LONG, SEEN = "small_image", "extreme_aspect", "near_duplicate_image"
REPEATED_KEY = "repeated_key"
UNREACHABLE = "unreachable_image"
UNWANTED = "predicate"
LEFT_OUT = frozenset({TOO_SMALL, TOO_LONG, SEEN, REPEATED_KEY, UNWANTED})
"""Reasons that are a choice, and no failure: such samples are not tried again."""

Predicate = Callable[[Sample], bool | str]
"""Says whether a sample is wanted, or why it is not; of the user."""


class ImageChecks(Recipe):
    """Which images are captioned at all.

    min_side_px       of the shorter side, as the file has it
    max_aspect        longer side over the shorter one
    max_hash_bits     an image is left out if its perceptual hash (64 bits, the signs of differences
                      of brightness between neighbours) differs from an earlier one's of the unit
                      in at most so many bits; None asks for none
    """

    min_side_px: int = Field(1, ge=1)
    max_aspect: float | None = Field(None, ge=1)
    max_hash_bits: int | None = Field(None, ge=0, le=64)

    def reason(self, image: Image.Image) -> str | None:
        """Return why an image is left out for its shape."""
        short, long = sorted(image.size)
        if short < self.min_side_px:
            return TOO_SMALL
        return TOO_LONG if self.max_aspect is not None and long > self.max_aspect * short else None


@dataclass(frozen=True)
class Prepared:
    """A sample with its image at the sides, in pixels, that the models need.

    reason  why it is not captioned, whatever the unit's other samples are
    """

    sample: Sample
    images: dict[int, Tensor]
    hash: int = 0
    reason: str | None = None


@dataclass
class ImageReader:
    """Reads a unit's images beside the models, and tells what it leaves out.

    sizes_px  sides that the models need
    on_bad    called with each sample that is not captioned, in the order of the input
    only      keys of the samples that are wanted, and none but those are told of; None wants all
    """

    sizes_px: tuple[int, ...]
    checks: ImageChecks
    predicate: Predicate | None
    on_bad: Callable[[BadSample], None]
    only: frozenset[str] | None = None
    _keys: set[str] = field(default_factory=set)
    _hashes: list[int] = field(default_factory=list)

    def batches(self, entries: Iterable[Build], batch_size: int) -> Iterator[list[Prepared]]:
        """Yield what is to be captioned, `batch_size` at a time; threads fetch and decode."""
        batch: list[Prepared] = []
        for prepared in map_beside(self._prepare, entries):
            if prepared is None:
                continue
            refused = self._refused(prepared)
            if refused is not None:
                self.on_bad(refused)
                continue
            assert isinstance(prepared, Prepared)
            batch.append(prepared)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _prepare(self, build: Build) -> Prepared | BadSample | None:
        try:
            entry = build("web")
        except UnreachableImageError as error:
            entry = BadSample(error.key, UNREACHABLE)
        if self.only is not None and entry.key not in self.only:
            return None
        if isinstance(entry, BadSample):
            return entry
        try:
            image = decode_image(entry.image_bytes)
        except ImageDecodeError as error:
            return Prepared(entry, {}, reason=error.reason)
        if reason := self.checks.reason(image):
            return Prepared(entry, {}, reason=reason)
        bits = 0 if self.checks.max_hash_bits is None else perceptual_hash(image)
        return Prepared(entry, {s: eval_transform(image, s) for s in self.sizes_px}, bits)

    def _refused(self, prepared: Prepared | BadSample) -> BadSample | None:
        """Return what is left out, and why, in view of the unit's earlier samples."""
        if isinstance(prepared, BadSample):
            return prepared
        key = prepared.sample.key
        if key in self._keys:  # judged and written images are matched by their keys
            return BadSample(key, REPEATED_KEY)
        self._keys.add(key)
        if prepared.reason is not None:
            return BadSample(key, prepared.reason)
        if self.predicate is not None and (reason := refusal(self.predicate, prepared.sample)):
            return BadSample(key, reason)
        if self.checks.max_hash_bits is not None:
            if _is_near(prepared.hash, self._hashes, self.checks.max_hash_bits):
                return BadSample(key, SEEN)
            self._hashes.append(prepared.hash)
        return None


def refusal(predicate: Predicate, sample: Sample) -> str | None:
    """Return why a predicate does not want a sample, None if it does."""
    try:
        wanted = predicate(sample)
    except Exception as error:  # the user's code; one sample must not stop the job
        return f"predicate failed: {type(error).__name__}"
    if isinstance(wanted, str):
        return f"{UNWANTED}: {wanted}"
    return None if wanted else UNWANTED


@lru_cache(maxsize=8)
def load_predicate(address: str) -> Predicate:
    """Return the function at `file.py:function`. Raises ValueError if there is none."""
    file, _, name = address.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"no predicate at {address!r}: expected file.py:function")
    function = runpy.run_path(file).get(name)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r}")
    predicate: Predicate = function
    return predicate


def is_left_out(reason: str) -> bool:
    """Say whether a reason is a choice; what the user's predicate says stands behind a colon."""
    return reason.partition(":")[0] in LEFT_OUT


def stack(batch: list[Prepared]) -> dict[int, Tensor]:
    """Return the images of a batch (B, 3, S, S) by their side S."""
    return {size: torch.stack([one.images[size] for one in batch]) for size in batch[0].images}


def _is_near(bits: int, others: list[int], most: int) -> bool:
    known: NDArray[np.uint64] = np.array(others, dtype=np.uint64)
    differing = np.unpackbits((known ^ np.uint64(bits)).view(np.uint8)).reshape(-1, 64)
    return bool((differing.sum(axis=1) <= most).any())
