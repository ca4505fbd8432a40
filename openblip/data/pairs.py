"""The stream of image-text pairs: every kept caption of an image is a pair of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from openblip.captions import has_left_or_right
from openblip.data.batches import ImageTextBatch, collate
from openblip.data.position import Position
from openblip.data.samples import Sample
from openblip.data.sources import BadSample, kept_texts
from openblip.data.stream import SampleStream
from openblip.images import TrainTransform, decode_image
from openblip.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """One training pair: an image, still encoded, and one of its kept captions, cleaned."""

    image_bytes: bytes
    text: str


class PairStream(SampleStream[Pair, ImageTextBatch]):
    """Image-text pairs: every kept caption of an image is a pair of its own.

    prefix  put before every text, as the captioning prompt is
    """

    example_name = "image-text pair"
    why_none = "no image has a caption"

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        transform: TrainTransform,
        *,
        batch_size: int,
        max_tokens: int,
        seed: int,
        prefix: str = "",
        max_words: int = 50,
        block_size: int = 8192,
        block_bytes: int = 256 << 20,
        num_workers: int = 1,
        max_bad_fraction: float = 1.0,
        position: Position | None = None,
    ) -> None:
        """Raises ValueError if a path is no data set."""
        super().__init__(
            paths,
            batch_size=batch_size,
            seed=seed,
            block_size=block_size,
            block_bytes=block_bytes,
            num_workers=num_workers,
            max_bad_fraction=max_bad_fraction,
            position=position,
        )
        self.tokenizer, self.transform = tokenizer, transform
        self.max_tokens, self.max_words, self.prefix = max_tokens, max_words, prefix

    def examples(self, sample: Sample) -> Iterator[tuple[int, Pair] | BadSample]:
        for number, text in kept_texts(sample, self.max_words):
            yield number, Pair(sample.image_bytes, text)

    def load(self, example: Pair, rng: np.random.Generator) -> Tensor:
        may_flip = not has_left_or_right(example.text)
        return self.transform(decode_image(example.image_bytes), rng, may_flip=may_flip)

    def collate(
        self, keys: Sequence[str], examples: Sequence[Pair], images: Sequence[Tensor]
    ) -> ImageTextBatch:
        texts = [self.prefix + pair.text for pair in examples]
        return collate(images, keys, texts, self.tokenizer, self.max_tokens)
