"""The shards of one source, read block by block: what is shuffled together, and where it stands.

An epoch is a random order of *units*: whole shards, or parts of them where the shards are few.
Counted on from epoch to epoch, unit g belongs to the rank g mod (number of ranks). A rank reads a
few of its units side by side into a *block* in memory, and takes the block's examples in random
order. Every order follows from the seed and from what is read, never from who reads it or when.
"""

import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from openblip.data.position import Block, Position
from openblip.data.remote import RemoteError
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.data.shards import Shard

MIN_UNITS = 4
"""An epoch has at least as many units, so that several ranks find work in a single shard."""
OPEN_UNITS = 4
"""Units that a block is read from, so that samples of one shard do not stay together."""

E = TypeVar("E")


class Read(Protocol):
    """Yields what a part of a shard holds from an entry on, as `data.sources.read_part` does."""

    def __call__(
        self, shard: Shard, part: int, num_parts: int, *, first: int
    ) -> Iterator[Sample | BadSample]: ...


@dataclass(frozen=True)
class Placed(Generic[E]):
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
class Loaded(Generic[E]):
    """A block in memory, its examples in their random order, and where the stream is behind it.

    bad    what could not be read, unless an earlier run has counted it
    ended  units of which nothing is left
    """

    block: Block
    examples: list[Placed[E]]
    behind: Position
    bad: Sequence[BadSample] = ()
    ended: Sequence[int] = ()


@dataclass(frozen=True)
class BlockSize:
    """How much of a source is in memory.

    num_samples  that are shuffled together, and
    num_bytes    of their images at which a block ends early
    """

    num_samples: int = 8192
    num_bytes: int = 256 << 20

    def shared(self, num_sources: int) -> "BlockSize":
        """Return the same for one of several sources that are read side by side."""
        return replace(
            self,
            num_samples=max(self.num_samples // num_sources, 1),
            num_bytes=max(self.num_bytes // num_sources, 1),
        )


class BlockReader(Generic[E]):
    """Endless blocks of the shards of one source.

    read      what a shard's entries are read by
    examples  yields the examples of a sample in an epoch, with their numbers within the sample, or
              what is bad
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        size: BlockSize,
        seed: int,
        read: Read,
        examples: Callable[[Sample, int], Iterator[tuple[int, E] | BadSample]],
    ) -> None:
        self._shards, self._size, self._seed = shards, size, seed
        self._read_part, self._examples = read, examples
        self._num_parts = -(-MIN_UNITS // len(shards))
        self.num_units = self._num_parts * len(shards)
        self._readers: dict[tuple[int, int], Iterator[Sample | BadSample]] = {}
        self._fetching: threading.Thread | None = None

    def blocks(self, position: Position) -> Generator[Loaded[E]]:
        """Go on from a position: first the blocks that were begun, then new ones."""
        self._readers.clear()
        for index, block in enumerate(position.blocks):
            entries = [
                entry for unit, first, num in block.ranges for entry in self._read(unit, first, num)
            ]
            examples, _ = self._shuffled(block, entries)
            yield Loaded(block, examples, replace(position, blocks=position.blocks[index + 1 :]))
        position = replace(position, blocks=())
        while True:
            block, entries, position = self._fill(position)
            self._fetch_ahead(position)
            examples, bad = self._shuffled(block, entries)
            left = {unit for unit, _ in position.units}
            ended = [unit for unit, _, _ in block.ranges if unit not in left]
            yield Loaded(block, examples, position, bad, ended)

    def count_examples(self, max_samples: int) -> tuple[int, bool]:
        """Count the examples of an epoch of all ranks; say whether that is an estimate.

        max_samples  after which the first units are taken for all
        """
        num_examples = num_samples = 0
        for unit in range(self.num_units):
            for content in self._open(unit, 0):
                num_samples += 1
                if isinstance(content, Sample):
                    made = self._examples(content, unit // self.num_units)
                    num_examples += sum(not isinstance(one, BadSample) for one in made)
            if num_samples >= max_samples and unit + 1 < self.num_units:
                return round(num_examples * self.num_units / (unit + 1)), True
        return num_examples, False

    def _fill(self, position: Position) -> tuple[Block, list[_Entry], Position]:
        """Read the next block, of one epoch, in turns from the units that are open."""
        waiting, next_unit = deque(position.units), position.next_unit
        epoch = (waiting[0][0] if waiting else next_unit) // self.num_units
        first_of: dict[int, int] = {}
        read: dict[int, list[_Entry]] = {}
        num_samples = num_bytes = 0
        opened: list[int] = []
        while num_samples < self._size.num_samples and num_bytes < self._size.num_bytes:
            while len(opened) < OPEN_UNITS:
                unit, first = waiting[0] if waiting else (next_unit, 0)
                if unit // self.num_units != epoch:
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
        shard, part = self._place_of(unit)
        return self._read_part(shard, part, self._num_parts, first=first)

    def _place_of(self, unit: int) -> tuple[Shard, int]:
        """Return shard and part of it that a unit is."""
        epoch, place = divmod(unit, self.num_units)
        number = int(_order(self._seed, epoch, self.num_units)[place])
        return self._shards[number // self._num_parts], number % self._num_parts

    def _fetch_ahead(self, position: Position) -> None:
        """Fetch the remote shards that come next, beside the use of what has been read."""
        is_busy = self._fetching is not None and self._fetching.is_alive()
        if is_busy or not self._shards[0].is_remote:
            return
        fresh = range(position.next_unit, sys.maxsize, position.num_ranks)
        units = itertools.chain((unit for unit, first in position.units if not first), fresh)
        shards = [self._place_of(unit)[0] for unit in itertools.islice(units, OPEN_UNITS)]

        def fetch() -> None:
            for shard in dict.fromkeys(shards):
                try:
                    with shard.opened():
                        pass
                except RemoteError:  # raised where the shard is read, if it is still away
                    return

        self._fetching = threading.Thread(target=fetch, daemon=True)
        self._fetching.start()

    def _shuffled(
        self, block: Block, entries: list[_Entry]
    ) -> tuple[list[Placed[E]], list[BadSample]]:
        placed: list[Placed[E]] = []
        bad: list[BadSample] = []
        for entry in entries:
            if isinstance(entry.content, BadSample):
                bad.append(entry.content)
                continue
            sample = entry.content
            for made in self._examples(sample, entry.unit // self.num_units):
                if isinstance(made, BadSample):
                    bad.append(made)
                    continue
                number, example = made
                placed.append(Placed(sample.key, (entry.unit, entry.place, number), example))
        rng = np.random.default_rng([self._seed, *block.ranges[0][:2]])
        return [placed[place] for place in rng.permutation(len(placed))], bad


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, num_units: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_units)
