"""Shards to endless training batches, from a position that can be saved and gone back to.

What the examples of a sample are, and what a batch of them is, is for the task to say: see
`data.pairs`. Without weights, all data sets are one source, of which an epoch has every example
once. With weights, each is a source of its own with its own epochs, and the next example comes from
the source that is furthest behind its share: after n examples each has given its share of n but for
one or two.

Every order and every augmentation follows from the seed and from what is read, never from who reads
it or when: the position is that of each source (see `data.blocks`), and how much each gave.
"""

import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, Required, TypedDict, TypeVar

import numpy as np
from torch import Tensor

from openblip.data.blocks import BlockReader, BlockSize, Placed
from openblip.data.position import Position, mixed
from openblip.data.prefetch import JOBS_PER_WORKER, map_in_order, prefetch
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.data.shards import Shard
from openblip.data.sources import Data, address_of, list_shards, read_part, weights_of
from openblip.images import ImageDecodeError

PREFETCHED_BATCHES = 4
MIN_SEEN = 1000
"""Examples after which the share of bad ones says something."""

NAMED_SAMPLES = 5
"""Bad samples of each reason that are named in the log; the others are counted."""

_log = logging.getLogger(__name__)


E = TypeVar("E")
B = TypeVar("B")


@dataclass(frozen=True)
class _Taken(Generic[E]):
    """A usable example, where its source stands behind it, and what was bad since the last."""

    placed: Placed[E]
    image: Tensor
    behind: Position
    bad: Sequence[BadSample]


class StreamOptions(TypedDict, total=False):
    """What a subclass passes on to `SampleStream`."""

    batch_size: Required[int]
    seed: Required[int]
    block_size: int
    block_bytes: int
    num_workers: int
    max_bad_fraction: float
    position: Position | None


class SampleStream(ABC, Generic[E, B]):
    """An endless, shuffled stream of batches over data sets, of examples that a subclass makes.

    The same seed and position give the same batches, whatever the number of workers.

    position          behind the batch that was given out last
    block_size        samples that are shuffled together, and
    block_bytes       bytes of their images at which a block ends early; sources share both
    num_workers       threads that decode and augment
    max_bad_fraction  of what is read of a source; more stops the stream with ValueError
    example_name      and why_none, a reason to have none: for the sentence that there is none
    """

    example_name: ClassVar[str]
    why_none: ClassVar[str]

    def __init__(
        self,
        data: Sequence[Data],
        *,
        batch_size: int,
        seed: int,
        block_size: int = 8192,
        block_bytes: int = 256 << 20,
        num_workers: int = 1,
        max_bad_fraction: float = 1.0,
        position: Position | None = None,
    ) -> None:
        """Raises ValueError if something in `data` is no data set."""
        self.batch_size, self.seed = batch_size, seed
        self.num_workers, self.max_bad_fraction = num_workers, max_bad_fraction
        self.position = Position() if position is None else position
        self.shares = weights_of(data)
        addresses = [address_of(each) for each in data]
        grouped = [[each] for each in addresses] if self.shares else [addresses]
        size = BlockSize(block_size, block_bytes).shared(len(grouped))
        self._sources = [
            _Source(
                ", ".join(map(str, group)),
                # Sources of the same length must not be dealt and augmented alike.
                BlockReader(
                    [shard for each in group for shard in list_shards(each)],
                    size,
                    seed + index,
                    self.read,
                    self.examples,
                ),
                seed + index,
                self.load,
                max_bad_fraction,
                f"usable {self.example_name}",
                self.why_none,
            )
            for index, group in enumerate(grouped)
        ]

    def read(
        self, shard: Shard, part: int, num_parts: int, *, first: int
    ) -> Iterator[Sample | BadSample]:
        """Read a part of a shard from an entry on, as `data.sources` does."""
        return read_part(shard, part, num_parts, first=first)

    @abstractmethod
    def examples(self, sample: Sample, epoch: int) -> Iterator[tuple[int, E] | BadSample]:
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
        self.position = self._checked(self.position)
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
        """Count the examples of all sources and ranks; say whether that is an estimate.

        max_samples  of a source, after which its first units are taken for all
        """
        counts = [source.reader.count_examples(max_samples) for source in self._sources]
        return sum(num for num, _ in counts), any(is_estimate for _, is_estimate in counts)

    def _checked(self, position: Position) -> Position:
        """Return the position with what it is a position of, unless that is something else."""
        if not self.shares:
            if position.sources:
                raise ValueError(
                    "the data have changed since the training was saved: they had weights"
                )
            return self._sources[0].checked(position)
        given = position.sources or (position,) * len(self._sources)
        if len(given) != len(self._sources):
            raise ValueError(
                f"the data have changed since the training was saved: there were {len(given)} "
                f"sources and are {len(self._sources)}"
            )
        sources = tuple(
            source.checked(one) for source, one in zip(self._sources, given, strict=True)
        )
        return mixed(sources, position.num_taken or (0,) * len(sources))

    def _batches(self) -> Generator[tuple[B, Position, list[BadSample]]]:
        position = self.position
        behind = list(position.sources or (position,))
        num_taken = list(position.num_taken or (0,))
        with ThreadPoolExecutor(self.num_workers) as pool, contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(contextlib.closing(source.taken(start, pool, self.num_workers)))
                for source, start in zip(self._sources, behind, strict=True)
            ]
            while True:
                batch: list[_Taken[E]] = []
                while len(batch) < self.batch_size:
                    source = self._next_source(num_taken)
                    taken = next(streams[source])
                    num_taken[source] += 1
                    behind[source] = taken.behind
                    batch.append(taken)
                bad = [sample for taken in batch for sample in taken.bad]
                after = mixed(tuple(behind), tuple(num_taken)) if self.shares else behind[0]
                placed = [taken.placed for taken in batch]
                yield (
                    self.collate(
                        [one.key for one in placed],
                        [one.example for one in placed],
                        [taken.image for taken in batch],
                    ),
                    after,
                    bad,
                )

    def _next_source(self, num_taken: Sequence[int]) -> int:
        """Return the source that is furthest behind its share."""
        if not self.shares:
            return 0
        num = sum(num_taken) + 1
        lag = [share * num - n for share, n in zip(self.shares, num_taken, strict=True)]
        return lag.index(max(lag))


@dataclass(frozen=True)
class _Source(Generic[E]):
    """A reader of blocks, what loads the images of its examples, and how all that is called."""

    name: str
    reader: BlockReader[E]
    seed: int
    load: Callable[[E, np.random.Generator], Tensor]
    max_bad_fraction: float
    example_name: str
    why_none: str

    def checked(self, position: Position) -> Position:
        num_units = self.reader.num_units
        if position.num_units not in {0, num_units}:
            raise ValueError(
                f"the data have changed since the training was saved: an epoch had "
                f"{position.num_units} units and has {num_units}, of {self.name}"
            )
        return replace(position, num_units=num_units)

    def taken(
        self, position: Position, pool: ThreadPoolExecutor, num_workers: int
    ) -> Generator[_Taken[E]]:
        """Yield usable examples without end. Raises ValueError if there are too few among all."""
        problems = Counter(position.problems)
        num_seen = position.num_seen
        bad: list[BadSample] = []
        useful: set[int] = set()
        # What was read of these before is not known here.
        num_useless = -len(position.units) - sum(len(b.ranges) for b in position.blocks)
        with contextlib.closing(prefetch(self.reader.blocks(position), 1)) as blocks:
            for loaded in blocks:
                bad += loaded.bad
                num_seen += len(loaded.bad)
                problems.update(sample.reason for sample in loaded.bad)
                rest = itertools.islice(loaded.examples, loaded.block.place, None)
                jobs = map_in_order(self._load, rest, pool, JOBS_PER_WORKER * num_workers)
                for place, (placed, image) in enumerate(jobs, start=loaded.block.place + 1):
                    num_seen += 1
                    if isinstance(image, BadSample):
                        bad.append(image)
                        problems[image.reason] += 1
                        continue
                    useful.add(placed.origin[0])
                    behind = replace(
                        loaded.behind,
                        blocks=(replace(loaded.block, place=place), *loaded.behind.blocks),
                        num_seen=num_seen,
                        problems=dict(problems),
                    )
                    yield _Taken(placed, image, behind, bad)
                    bad = []
                for unit in loaded.ended:
                    num_useless = 0 if unit in useful else num_useless + 1
                    useful.discard(unit)
                self._check(problems, num_seen, is_empty=num_useless >= self.reader.num_units)

    def _check(self, problems: Counter[str], num_seen: int, *, is_empty: bool) -> None:
        if is_empty:
            raise ValueError(
                f"no {self.example_name} in {self.name}: {dict(problems) or self.why_none}"
            )
        if num_seen >= MIN_SEEN and problems.total() > self.max_bad_fraction * num_seen:
            raise ValueError(
                f"{problems.total()} of {num_seen} samples of {self.name} cannot be used, more "
                f"than max_bad_fraction {self.max_bad_fraction} allows: {dict(problems)}"
            )

    def _load(self, placed: Placed[E]) -> tuple[Placed[E], Tensor | BadSample]:
        try:
            rng = np.random.default_rng([self.seed, *placed.origin])
            return placed, self.load(placed.example, rng)
        except ImageDecodeError as error:
            return placed, BadSample(placed.key, error.reason)
