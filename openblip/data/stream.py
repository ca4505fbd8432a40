"""Shards to endless training batches, from a position that can be saved and gone back to.

Without weights, all data sets are one source, of which an epoch has every pair once. With weights,
each is a source of its own with its own epochs, and the next pair comes from the source that is
furthest behind its share: after n pairs each source has given its share of n but for a pair or two.

Every order and every augmentation follows from the seed and from what is read, never from who reads
it or when: the position is that of each source (see `data.blocks`), and how many pairs each gave.
"""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from openblip.captions import has_left_or_right
from openblip.data.batches import ImageTextBatch, collate
from openblip.data.blocks import BlockOptions, BlockReader, CaptionChoice, Pair
from openblip.data.position import Position, mixed
from openblip.data.prefetch import JOBS_PER_WORKER, map_in_order, prefetch
from openblip.data.rows import BadSample
from openblip.data.sources import Data, address_of, list_shards, weights_of
from openblip.images import ImageDecodeError, TrainTransform, decode_image
from openblip.tokenizer import Tokenizer

PREFETCHED_BATCHES = 4
MIN_SEEN = 1000
"""Pairs after which the share of bad ones says something."""

NAMED_SAMPLES = 5
"""Bad samples of each reason that are named in the log; the others are counted."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Taken:
    """A usable pair, where its source stands behind it, and what was bad since the one before."""

    pair: Pair
    image: Tensor
    behind: Position
    bad: Sequence[BadSample]


class PairStream:
    """An endless, shuffled stream of batches over data sets.

    The same seed and position give the same batches, whatever the number of workers.

    position          behind the batch that was given out last
    captions          of an image: `all` that are kept are pairs, or `one`, drawn anew every epoch
    prefix            put before every text, as the captioning prompt is
    block_size        samples that are shuffled together, and
    block_bytes       bytes of their images at which a block ends early; sources share both
    num_workers       threads that decode and augment
    max_bad_fraction  of what is read of a source; more stops the stream with ValueError
    """

    def __init__(
        self,
        data: Sequence[Data],
        tokenizer: Tokenizer,
        transform: TrainTransform,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int,
        captions: CaptionChoice = "all",
        prefix: str = "",
        max_words: int = 50,
        block_size: int = 8192,
        block_bytes: int = 256 << 20,
        num_workers: int = 1,
        max_bad_fraction: float = 1.0,
        position: Position | None = None,
    ) -> None:
        """Raises ValueError if something in `data` is no data set."""
        self.tokenizer, self.transform = tokenizer, transform
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.seed, self.prefix = seed, prefix
        self.num_workers, self.max_bad_fraction = num_workers, max_bad_fraction
        self.position = Position() if position is None else position
        self.shares = weights_of(data)
        addresses = [address_of(each) for each in data]
        grouped = [[each] for each in addresses] if self.shares else [addresses]
        options = BlockOptions(captions, max_words, block_size, block_bytes).shared(len(grouped))
        self._sources = [
            _Source(
                ", ".join(map(str, group)),
                # Sources of the same length must not be dealt and augmented alike.
                BlockReader(
                    [shard for each in group for shard in list_shards(each)], options, seed + index
                ),
                seed + index,
                transform,
                max_bad_fraction,
            )
            for index, group in enumerate(grouped)
        ]

    def __iter__(self) -> Generator[ImageTextBatch]:
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
        """Count the pairs that all sources hold, over all ranks; say whether that is an estimate.

        max_samples  of a source, after which its first units are taken for all
        """
        counts = [source.reader.count_pairs(max_samples) for source in self._sources]
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

    def _batches(self) -> Generator[tuple[ImageTextBatch, Position, list[BadSample]]]:
        position = self.position
        behind = list(position.sources or (position,))
        num_taken = list(position.num_taken or (0,))
        with ThreadPoolExecutor(self.num_workers) as pool, contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(contextlib.closing(source.pairs(start, pool, self.num_workers)))
                for source, start in zip(self._sources, behind, strict=True)
            ]
            while True:
                batch: list[_Taken] = []
                while len(batch) < self.batch_size:
                    source = self._next_source(num_taken)
                    taken = next(streams[source])
                    num_taken[source] += 1
                    behind[source] = taken.behind
                    batch.append(taken)
                bad = [sample for taken in batch for sample in taken.bad]
                after = mixed(tuple(behind), tuple(num_taken)) if self.shares else behind[0]
                yield self._collate(batch), after, bad

    def _next_source(self, num_taken: Sequence[int]) -> int:
        """Return the source that is furthest behind its share of the pairs."""
        if not self.shares:
            return 0
        num = sum(num_taken) + 1
        lag = [share * num - n for share, n in zip(self.shares, num_taken, strict=True)]
        return lag.index(max(lag))

    def _collate(self, batch: Sequence[_Taken]) -> ImageTextBatch:
        return collate(
            [taken.image for taken in batch],
            [taken.pair.key for taken in batch],
            [self.prefix + taken.pair.text for taken in batch],
            self.tokenizer,
            self.max_tokens,
        )


@dataclass(frozen=True)
class _Source:
    """A reader of blocks, and what makes images of its pairs."""

    name: str
    reader: BlockReader
    seed: int
    transform: TrainTransform
    max_bad_fraction: float

    def checked(self, position: Position) -> Position:
        num_units = self.reader.num_units
        if position.num_units not in {0, num_units}:
            raise ValueError(
                f"the data have changed since the training was saved: an epoch had "
                f"{position.num_units} units and has {num_units}, of {self.name}"
            )
        return replace(position, num_units=num_units)

    def pairs(
        self, position: Position, pool: ThreadPoolExecutor, num_workers: int
    ) -> Generator[_Taken]:
        """Yield usable pairs without end. Raises ValueError if there are too few among all."""
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
                rest = itertools.islice(loaded.pairs, loaded.block.place, None)
                jobs = map_in_order(self._load_image, rest, pool, JOBS_PER_WORKER * num_workers)
                for place, (pair, image) in enumerate(jobs, start=loaded.block.place + 1):
                    num_seen += 1
                    if isinstance(image, BadSample):
                        bad.append(image)
                        problems[image.reason] += 1
                        continue
                    useful.add(pair.origin[0])
                    behind = replace(
                        loaded.behind,
                        blocks=(replace(loaded.block, place=place), *loaded.behind.blocks),
                        num_seen=num_seen,
                        problems=dict(problems),
                    )
                    yield _Taken(pair, image, behind, bad)
                    bad = []
                for unit in loaded.ended:
                    num_useless = 0 if unit in useful else num_useless + 1
                    useful.discard(unit)
                self._check(problems, num_seen, is_empty=num_useless >= self.reader.num_units)

    def _check(self, problems: Counter[str], num_seen: int, *, is_empty: bool) -> None:
        if is_empty:
            raise ValueError(
                f"no usable image-text pair in {self.name}: "
                f"{dict(problems) or 'no image has a caption'}"
            )
        if num_seen >= MIN_SEEN and problems.total() > self.max_bad_fraction * num_seen:
            raise ValueError(
                f"{problems.total()} of {num_seen} samples of {self.name} cannot be used, more "
                f"than max_bad_fraction {self.max_bad_fraction} allows: {dict(problems)}"
            )

    def _load_image(self, pair: Pair) -> tuple[Pair, Tensor | BadSample]:
        try:
            image = decode_image(pair.image_bytes)
        except ImageDecodeError as error:
            return pair, BadSample(pair.key, error.reason)
        rng = np.random.default_rng([self.seed, *pair.origin])
        return pair, self.transform(image, rng, may_flip=not has_left_or_right(pair.text))
