"""CapFilt's filter: which captions fit their image (BLIP sec. 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from openblip.batching import Images
from openblip.checkpoint import image_encoder_id, model_id
from openblip.inference import Dtype, Engine
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer


@dataclass(frozen=True)
class Filter:
    """A model with the roles `text` and `pair`.

    dtype    of the engine that runs the model
    model    hash of the weights
    encoder  hash of the image encoder's weights, and their precision
    """

    blip: Blip
    tokenizer: Tokenizer
    dtype: Dtype = "float32"
    model: str = field(init=False)
    encoder: str = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        engine = Engine(self.blip, self.tokenizer, dtype=self.dtype)
        object.__setattr__(self, "model", model_id(self.blip))
        object.__setattr__(self, "encoder", f"{image_encoder_id(self.blip)}/{engine.precision}")
        object.__setattr__(self, "engine", engine)

    def similarities(self, images: Images, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the ITC cosines of the texts of each image.

        Raises FloatingPointError if the model has diverged.
        """
        image = self.engine.embed_images(images)
        text = self.engine.embed_texts([one for several in texts for one in several])
        owners = [place for place, several in enumerate(texts) for _ in several]
        return self._finite(texts, (image[owners] * text).sum(dim=1).tolist())

    def probabilities(self, images: Images, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the match probabilities of the texts of each image.

        Raises FloatingPointError if the model has diverged: NaN is neither kept nor dropped.
        """
        judged = self.engine.match_probabilities(images, texts)
        return self._finite(texts, [float(p) for several in judged for p in several])

    def _finite(self, texts: Sequence[Sequence[str]], values: list[float]) -> list[list[float]]:
        if any(math.isnan(value) for value in values):
            raise FloatingPointError(f"the filter {self.model} gives NaN: its training diverged")
        rest = iter(values)
        return [[next(rest) for _ in several] for several in texts]
