"""Shards to endless training batches: shuffle, decode, augment, tokenise, batch."""

import itertools
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from openblip.captions import clean_caption, has_left_or_right
from openblip.data.batches import ImageTextBatch, collate
from openblip.data.sources import list_shards, read_samples
from openblip.images import ImageDecodeError, TrainTransform, decode_image
from openblip.tokenizer import Tokenizer

PREFETCHED_BATCHES = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """One training pair: an image, still encoded, and one of its kept captions, cleaned."""

    key: str
    image_bytes: bytes
    text: str


@dataclass
class PairStream:
    """An endless, shuffled stream of batches over shards.

    Every kept caption of an image is a pair of its own. An epoch reads the shards in a random
    order and mixes their pairs in a buffer; the same seed gives the same batches. `problems`
    counts what could not be used, by reason.

    prefix  put before every text, as the captioning prompt is
    """

    paths: Sequence[Path]
    tokenizer: Tokenizer
    transform: TrainTransform
    batch_size: int
    max_tokens: int
    seed: int
    prefix: str = ""
    max_words: int = 50
    buffer_size: int = 20_000
    problems: Counter[str] = field(default_factory=Counter)
    num_batches: int = 0

    def __iter__(self) -> Iterator[ImageTextBatch]:
        return _prefetch(self._batches, PREFETCHED_BATCHES)

    def warn_of_problems(self, title: str) -> None:
        """Log what could not be used so far, if anything."""
        if self.problems:
            problems = dict(self.problems)
            _log.warning("%s: not used, by reason, anew in every epoch: %s", title, problems)

    def _batches(self) -> Iterator[ImageTextBatch]:
        images: list[Tensor] = []
        pairs: list[Pair] = []
        for epoch in itertools.count():
            is_empty = True
            for index, pair in enumerate(self._epoch(epoch)):
                image = self._decode(pair)
                if image is None:
                    continue
                is_empty = False
                rng = np.random.default_rng([self.seed, epoch, index])
                may_flip = not has_left_or_right(pair.text)
                images.append(self.transform(image, rng, may_flip=may_flip))
                pairs.append(pair)
                if len(pairs) == self.batch_size:
                    self.num_batches += 1
                    yield collate(
                        images,
                        [p.key for p in pairs],
                        [self.prefix + p.text for p in pairs],
                        self.tokenizer,
                        self.max_tokens,
                    )
                    images, pairs = [], []
            if is_empty:
                problems = dict(self.problems) or "no image has a caption"
                raise ValueError(
                    f"no usable image-text pair in {list(map(str, self.paths))}: {problems}"
                )

    def _epoch(self, epoch: int) -> Iterator[Pair]:
        """Yield every pair once, shuffled."""
        rng = np.random.default_rng([self.seed, epoch])
        shards = [shard for path in self.paths for shard in list_shards(path)]
        buffer: list[Pair] = []
        for shard in rng.permutation(len(shards)):
            for pair in self._read(shards[int(shard)]):
                if len(buffer) < self.buffer_size:
                    buffer.append(pair)
                    continue
                place = int(rng.integers(self.buffer_size))
                buffer[place], pair = pair, buffer[place]
                yield pair
        for place in rng.permutation(len(buffer)):
            yield buffer[int(place)]

    def _read(self, shard: Path) -> Iterator[Pair]:
        for sample in read_samples(shard, on_bad=self._on_bad):
            for caption in sample.captions:
                text = clean_caption(caption.text, self.max_words)
                if caption.drop_reason is None and text:
                    yield Pair(sample.key, sample.image_bytes, text)

    def _decode(self, pair: Pair) -> Image.Image | None:
        try:
            return decode_image(pair.image_bytes)
        except ImageDecodeError as error:
            self.problems[error.reason] += 1
            return None

    def _on_bad(self, key: str, reason: str) -> None:
        self.problems[reason] += 1


def _prefetch(make: Callable[[], Iterator[ImageTextBatch]], size: int) -> Iterator[ImageTextBatch]:
    """Run the iterator in a thread, `size` items ahead; its errors are raised here.

    Decoding leaves Python's lock, so it runs beside the training step.
    """
    ready: queue.Queue[ImageTextBatch | BaseException] = queue.Queue(size)
    is_closed = threading.Event()

    def put(item: ImageTextBatch | BaseException) -> bool:
        while not is_closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in make():
                if not put(item):
                    return
        except BaseException as error:  # handed over whole, and raised by the consumer
            put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_closed.set()
        thread.join()
