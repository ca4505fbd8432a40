"""Shards to endless training batches, from a position that can be saved and gone back to.

An epoch is a random order of *units*: whole shards, or every n-th sample of them where the shards
are few. Counted on from epoch to epoch, unit g belongs to the rank g mod (number of ranks). A rank
reads a few of its units side by side into a *block* in memory, and takes the block's examples in
random order. Every order and every augmentation follows from the seed and from what is read, never
from who reads it or when: the position is the ranges of samples that the block was read from, the
place in the block, and the units that come next.

What a sample's examples are, and what a batch of them is, is for the task to say: see `data.pairs`.
"""

import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
from torch import Tensor

from openblip.data.position import Block, Position
from openblip.data.prefetch import JOBS_PER_WORKER, map_in_order, prefetch
from openblip.data.samples import Sample
from openblip.data.sources import BadSample, list_shards, read_entries
from openblip.images import ImageDecodeError

PREFETCHED_BATCHES = 4
MIN_UNITS = 4
"""An epoch has at least as many units, so that several ranks find work in a single shard."""
OPEN_UNITS = 4
"""Units that a block is read from, so that samples of one shard do not stay together."""
MIN_SEEN = 1000
"""Pairs after which the share of bad ones says something."""

NAMED_SAMPLES = 5
"""Bad samples of each reason that are named in the log; the others are counted."""

_log = logging.getLogger(__name__)

E = TypeVar("E")
B = TypeVar("B")


@dataclass(frozen=True)
class _Placed(Generic[E]):
    """An example, the key of its sample, and where it comes from.

    origin  unit, place in it, and number within the sample: what its augmentation is drawn from
    """

    key: str
    origin: tuple[int, int, int]
    example: E


@dataclass(frozen=True)
class _Entry:
    """What a place of a unit holds."""

    unit: int
    place: int
    content: Sample | BadSample

    @property
    def num_bytes(self) -> int:
        return len(self.content.image_bytes) if isinstance(self.content, Sample) else 0


@dataclass(frozen=True)
class _Loaded(Generic[E]):
    """A block in memory, its examples in their random order, and where the stream is behind it.

    bad    what could not be read, unless an earlier run has counted it
    ended  units of which nothing is left
    """

    block: Block
    examples: list[_Placed[E]]
    behind: Position
    bad: Sequence[BadSample] = ()
    ended: Sequence[int] = ()


class SampleStream(ABC, Generic[E, B]):
    """An endless, shuffled stream of batches over shards, of examples that a subclass makes.

    The same seed and position give the same batches, whatever the number of workers.

    position          behind the batch that was given out last
    block_size        samples that are shuffled together, and
    block_bytes       bytes of their images at which a block ends early
    num_workers       threads that decode and augment
    max_bad_fraction  of what is read; more stops the stream with ValueError
    example_name      and why_none, a reason to have none: for the sentence that there is none
    """

    example_name: ClassVar[str]
    why_none: ClassVar[str]

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        batch_size: int,
        seed: int,
        block_size: int = 8192,
        block_bytes: int = 256 << 20,
        num_workers: int = 1,
        max_bad_fraction: float = 1.0,
        position: Position | None = None,
    ) -> None:
        """Raises ValueError if a path is no data set."""
        self.paths = paths
        self.batch_size, self.seed = batch_size, seed
        self.block_size, self.block_bytes = block_size, block_bytes
        self.num_workers, self.max_bad_fraction = num_workers, max_bad_fraction
        self.position = Position() if position is None else position
        self._shards = [shard for path in paths for shard in list_shards(path)]
        self._num_parts = -(-MIN_UNITS // len(self._shards))
        self._num_units = self._num_parts * len(self._shards)
        self._readers: dict[tuple[int, int], Iterator[Sample | BadSample]] = {}

    def read(self, shard: Path, start: int, step: int) -> Iterator[Sample | BadSample]:
        """Read every `step`-th entry of a shard from `start` on, as `data.sources` does."""
        return read_entries(shard, start=start, step=step)

    @abstractmethod
    def examples(self, sample: Sample) -> Iterator[tuple[int, E] | BadSample]:
        """Yield a sample's examples with their numbers, the same at every reading, or what is bad.

        No image is decoded here.
        """

    @abstractmethod
    def load(self, example: E, rng: np.random.Generator) -> Tensor:
        """Decode and augment what an example shows, of one shape for all. Called in threads.

        Raises ImageDecodeError for what is no usable image.
        """

    @abstractmethod
    def collate(self, keys: Sequence[str], examples: Sequence[E], images: Sequence[Tensor]) -> B:
        """Make a batch of B examples, the keys of their samples and what was loaded of each."""

    def __iter__(self) -> Generator[B]:
        """Go on from `position`. Raises ValueError if it was of data of other shards."""
        if self.position.num_units not in {0, self._num_units}:
            raise ValueError(
                f"the data have changed since the training was saved: an epoch had "
                f"{self.position.num_units} units and has {self._num_units}"
            )
        self.position = replace(self.position, num_units=self._num_units)
        for batch, position, bad in prefetch(self._batches(), PREFETCHED_BATCHES):
            named = Counter(self.position.problems)
            self.position = position
            for sample in bad:
                named[sample.reason] += 1
                if named[sample.reason] <= NAMED_SAMPLES:
                    _log.warning("not used: sample %s: %s", sample.key, sample.reason)
            yield batch

    def warn_of_problems(self, title: str) -> None:
        """Log what could not be used so far, if anything."""
        if problems := self.position.problems:
            _log.warning("%s: not used, by reason, anew in every epoch: %s", title, problems)

    def count_pairs(self, max_samples: int) -> tuple[int, bool]:
        """Count the examples of an epoch of all ranks; say whether that is an estimate.

        max_samples  after which the first units are taken for all
        """
        num_pairs = num_samples = 0
        for unit in range(self._num_units):
            for content in self._open(unit, 0):
                num_samples += 1
                if isinstance(content, Sample):
                    made = self.examples(content)
                    num_pairs += sum(not isinstance(one, BadSample) for one in made)
            if num_samples >= max_samples and unit + 1 < self._num_units:
                return round(num_pairs * self._num_units / (unit + 1)), True
        return num_pairs, False

    def _batches(self) -> Generator[tuple[B, Position, list[BadSample]]]:
        problems = Counter(self.position.problems)
        num_seen = self.position.num_seen
        images: list[Tensor] = []
        taken: list[_Placed[E]] = []
        bad: list[BadSample] = []
        useful: set[int] = set()
        # What was read of these before is not known here.
        num_useless = -len(self.position.units) - sum(len(b.ranges) for b in self.position.blocks)
        with ThreadPoolExecutor(self.num_workers) as pool:
            for loaded in prefetch(self._blocks(), 1):
                bad += loaded.bad
                num_seen += len(loaded.bad)
                problems.update(sample.reason for sample in loaded.bad)
                rest = itertools.islice(loaded.examples, loaded.block.place, None)
                jobs = map_in_order(self._load, rest, pool, JOBS_PER_WORKER * self.num_workers)
                for place, (placed, image) in enumerate(jobs, start=loaded.block.place + 1):
                    num_seen += 1
                    if isinstance(image, BadSample):
                        bad.append(image)
                        problems[image.reason] += 1
                        continue
                    useful.add(placed.origin[0])
                    images.append(image)
                    taken.append(placed)
                    if len(taken) < self.batch_size:
                        continue
                    blocks = (replace(loaded.block, place=place), *loaded.behind.blocks)
                    behind = replace(
                        loaded.behind, blocks=blocks, num_seen=num_seen, problems=dict(problems)
                    )
                    keys = [one.key for one in taken]
                    batch = self.collate(keys, [one.example for one in taken], images)
                    yield batch, behind, bad
                    images, taken, bad = [], [], []
                for unit in loaded.ended:
                    num_useless = 0 if unit in useful else num_useless + 1
                    useful.discard(unit)
                self._check(problems, num_seen, is_empty=num_useless >= self._num_units)

    def _check(self, problems: Counter[str], num_seen: int, *, is_empty: bool) -> None:
        where = ", ".join(map(str, self.paths))
        if is_empty:
            raise ValueError(
                f"no usable {self.example_name} in {where}: {dict(problems) or self.why_none}"
            )
        if num_seen >= MIN_SEEN and problems.total() > self.max_bad_fraction * num_seen:
            raise ValueError(
                f"{problems.total()} of {num_seen} samples of {where} cannot be used, more than "
                f"max_bad_fraction {self.max_bad_fraction} allows: {dict(problems)}"
            )

    def _load(self, placed: _Placed[E]) -> tuple[_Placed[E], Tensor | BadSample]:
        try:
            return placed, self.load(
                placed.example, np.random.default_rng([self.seed, *placed.origin])
            )
        except ImageDecodeError as error:
            return placed, BadSample(placed.key, error.reason)

    def _blocks(self) -> Generator[_Loaded[E]]:
        position = self.position
        self._readers.clear()
        for index, block in enumerate(position.blocks):
            entries = [
                entry for unit, first, num in block.ranges for entry in self._read(unit, first, num)
            ]
            examples, _ = self._shuffled(block, entries)
            behind = replace(position, blocks=position.blocks[index + 1 :])
            yield _Loaded(block, examples, behind)
        position = replace(position, blocks=())
        while True:
            block, entries, position = self._fill(position)
            examples, bad = self._shuffled(block, entries)
            left = {unit for unit, _ in position.units}
            ended = [unit for unit, _, _ in block.ranges if unit not in left]
            yield _Loaded(block, examples, position, bad, ended)

    def _fill(self, position: Position) -> tuple[Block, list[_Entry], Position]:
        """Read the next block, of one epoch, in turns from the units that are open."""
        waiting, next_unit = deque(position.units), position.next_unit
        epoch = (waiting[0][0] if waiting else next_unit) // self._num_units
        first_of: dict[int, int] = {}
        read: dict[int, list[_Entry]] = {}
        num_samples = num_bytes = 0
        opened: list[int] = []
        while num_samples < self.block_size and num_bytes < self.block_bytes:
            while len(opened) < OPEN_UNITS:
                unit, first = waiting[0] if waiting else (next_unit, 0)
                if unit // self._num_units != epoch:
                    break
                if waiting:
                    waiting.popleft()
                else:
                    next_unit += position.num_ranks
                opened.append(unit)
                first_of[unit], read[unit] = first, []
            if not opened:
                break
            for unit in list(opened):
                found = self._read(unit, first_of[unit] + len(read[unit]), 1)
                if not found:
                    opened.remove(unit)
                read[unit] += found
                num_samples += len(found)
                num_bytes += sum(entry.num_bytes for entry in found)
        ranges = tuple((unit, first_of[unit], len(read[unit])) for unit in read)
        units = tuple((unit, first_of[unit] + len(read[unit])) for unit in opened)
        behind = replace(position, units=(*units, *waiting), next_unit=next_unit)
        return Block(ranges), [entry for several in read.values() for entry in several], behind

    def _read(self, unit: int, first: int, num: int) -> list[_Entry]:
        """Read samples of a unit, fewer where it ends; what follows them stays at hand."""
        reader = self._readers.pop((unit, first), None)
        if reader is None:
            reader = self._open(unit, first)
        entries = [
            _Entry(unit, first + index, content)
            for index, content in enumerate(itertools.islice(reader, num))
        ]
        if len(entries) == num:
            self._readers[unit, first + num] = reader
        return entries

    def _open(self, unit: int, first: int) -> Iterator[Sample | BadSample]:
        epoch, place = divmod(unit, self._num_units)
        shard, part = divmod(_order(self.seed, epoch, self._num_units)[place], self._num_parts)
        start = part + first * self._num_parts
        return self.read(self._shards[shard], start, self._num_parts)

    def _shuffled(
        self, block: Block, entries: list[_Entry]
    ) -> tuple[list[_Placed[E]], list[BadSample]]:
        placed: list[_Placed[E]] = []
        bad: list[BadSample] = []
        for entry in entries:
            if isinstance(entry.content, BadSample):
                bad.append(entry.content)
                continue
            sample = entry.content
            for made in self.examples(sample):
                if isinstance(made, BadSample):
                    bad.append(made)
                    continue
                number, example = made
                placed.append(_Placed(sample.key, (entry.unit, entry.place, number), example))
        rng = np.random.default_rng([self.seed, *block.ranges[0][:2]])
        return [placed[place] for place in rng.permutation(len(placed))], bad


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_units: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(num_units).tolist()
    return order
