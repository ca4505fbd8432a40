"""The stream of image-text pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

import numpy as np
from torch import Tensor

from openblip.captions import has_left_or_right
from openblip.data.batches import ImageTextBatch, collate, stable_id
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.data.sources import Data, kept_texts
from openblip.data.stream import SampleStream, StreamOptions
from openblip.images import TrainTransform, decode_image
from openblip.tokenizer import Tokenizer

CaptionChoice = Literal["all", "one"]


@dataclass(frozen=True)
class Pair:
    """One training pair: an image, still encoded, and one of its kept captions, cleaned."""

    image_bytes: bytes
    text: str


class PairStream(SampleStream[Pair, ImageTextBatch]):
    """Image-text pairs.

    captions  of an image: `all` that are kept are pairs, or `one`, drawn anew in every epoch
    prefix    put before every text, as the captioning prompt is
    """

    example_name = "image-text pair"
    why_none = "no image has a caption"

    def __init__(
        self,
        data: Sequence[Data],
        tokenizer: Tokenizer,
        transform: TrainTransform,
        *,
        max_tokens: int,
        captions: CaptionChoice = "all",
        prefix: str = "",
        max_words: int = 50,
        **options: Unpack[StreamOptions],
    ) -> None:
        """Raises ValueError if something in `data` is no data set."""
        super().__init__(data, **options)
        self.tokenizer, self.transform = tokenizer, transform
        self.max_tokens, self.max_words = max_tokens, max_words
        self.captions, self.prefix = captions, prefix

    def examples(self, sample: Sample, epoch: int) -> Iterator[tuple[int, Pair] | BadSample]:
        texts = list(kept_texts(sample, self.max_words))
        if self.captions == "one" and texts:
            rng = np.random.default_rng([self.seed, epoch, stable_id(sample.key)])
            texts = [texts[int(rng.integers(len(texts)))]]
        for number, text in texts:
            yield number, Pair(sample.image_bytes, text)

    def load(self, example: Pair, rng: np.random.Generator) -> Tensor:
        may_flip = not has_left_or_right(example.text)
        return self.transform(decode_image(example.image_bytes), rng, may_flip=may_flip)

    def collate(
        self, keys: Sequence[str], examples: Sequence[Pair], images: Sequence[Tensor]
    ) -> ImageTextBatch:
        texts = [self.prefix + pair.text for pair in examples]
        return collate(images, keys, texts, self.tokenizer, self.max_tokens)
