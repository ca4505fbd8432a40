"""CapFilt's filter: which captions fit their image (BLIP sec. 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from openblip.batching import Images
from openblip.checkpoint import image_encoder_id, model_id
from openblip.inference import Dtype, Engine
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer

CLIPPED_AT = 1e-7
"""Probabilities nearer than this to 0 or 1 are moved to here before a temperature is put on them:
the ITM head's softmax rounds to 0 and to 1, whose logits are infinite."""


def tempered(probability: float, temperature: float) -> float:
    """Return sigmoid(logit(p) / T), in [0, 1]; exactly p where T is 1.

    probability  p in [0, 1]; clipped at `CLIPPED_AT` where T is not 1
    temperature  T above 0: more than 1 moves p towards 0.5, less away from it
    The order of probabilities stays, but those that are clipped become equal.
    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.
    """
    if temperature == 1:
        return probability
    clipped = min(max(probability, CLIPPED_AT), 1 - CLIPPED_AT)
    logit = (math.log(clipped) - math.log1p(-clipped)) / temperature
    # The exponential of what is below 0 does not overflow.
    small = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else small) / (1.0 + small)


@dataclass(frozen=True)
class Filter:
    """A model with the roles `text` and `pair`.

    dtype        of the engine that runs the model
    temperature  put on match probabilities, as `tempered` does; `capfilt.calibration` fits one
    model        hash of the weights; behind it @ and the temperature where that is not 1, as other
                 probabilities are another filter's
    encoder      hash of the image encoder's weights, and their precision
    Raises ValueError for a temperature that is not above 0.
    """

    blip: Blip
    tokenizer: Tokenizer
    dtype: Dtype = "float32"
    temperature: float = 1.0
    model: str = field(init=False)
    encoder: str = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the filter's temperature is {self.temperature}; it must be above 0")
        name = model_id(self.blip)
        if self.temperature != 1:
            name += f"@{self.temperature:g}"
        object.__setattr__(self, "model", name)
        engine = Engine(self.blip, self.tokenizer, dtype=self.dtype)
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
        given = [float(p) for several in judged for p in several]
        return self._finite(texts, [tempered(p, self.temperature) for p in given])

    def _finite(self, texts: Sequence[Sequence[str]], values: list[float]) -> list[list[float]]:
        if any(math.isnan(value) for value in values):
            raise FloatingPointError(f"the filter {self.model} gives NaN: its training diverged")
        rest = iter(values)
        return [[next(rest) for _ in several] for several in texts]
