"""CapFilt's filter: which captions fit their image, and which are kept (BLIP sec. 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pydantic import Field
from torch import Tensor

from openblip.captions import clean_caption
from openblip.checkpoint import model_id
from openblip.config import Recipe
from openblip.data.samples import Caption, CaptionSource
from openblip.inference import Dtype, Engine
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer

UNMATCHED = "unmatched"
EMPTY = "empty"
DUPLICATE = "duplicate"
NOT_ASKED_FOR = "source_left_out"
CLIPPED_AT = 1e-7
"""Probabilities nearer than this to 0 or 1 are moved to here before a temperature is put on them:
the ITM head's softmax rounds to 0 and to 1, whose logits are infinite."""


class KeepRule(Recipe):
    """Which judged captions are for training; needs no model.

    threshold  a caption is kept if its match probability is at least this; 0.5 is where the ITM
               head says that the pair matches, 0 keeps all
    sources    who may have written it
    """

    threshold: float = Field(0.5, ge=0, le=1)
    sources: tuple[CaptionSource, ...] = ("web", "synthetic", "human")

    def apply(self, captions: Sequence[Caption]) -> tuple[Caption, ...]:
        """Return the judged captions of one image, in their order, with a reason where dropped.

        Of captions that are equal once cleaned the first that is kept stays.
        """
        seen: set[str] = set()
        result = []
        for caption in captions:
            text = clean_caption(caption.text)
            assert caption.match_probability is not None
            reason = None
            if caption.source not in self.sources:
                reason = NOT_ASKED_FOR
            elif not text:
                reason = EMPTY
            elif caption.match_probability < self.threshold:
                reason = UNMATCHED
            elif text in seen:
                reason = DUPLICATE
            else:
                seen.add(text)
            result.append(replace(caption, drop_reason=reason))
        return tuple(result)


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
    Raises ValueError for a temperature that is not above 0.
    """

    blip: Blip
    tokenizer: Tokenizer
    dtype: Dtype = "float32"
    temperature: float = 1.0
    model: str = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the filter's temperature is {self.temperature}; it must be above 0")
        name = model_id(self.blip)
        if self.temperature != 1:
            name += f"@{self.temperature:g}"
        object.__setattr__(self, "model", name)
        engine = Engine(self.blip, self.tokenizer, dtype=self.dtype)
        object.__setattr__(self, "engine", engine)

    def judge(self, images: Tensor, captions: Sequence[Sequence[Caption]]) -> list[list[Caption]]:
        """Give the captions of prepared images (B, 3, S, S) their match probability and cosine.

        Raises FloatingPointError if the model has diverged: NaN is neither kept nor dropped.
        """
        texts = [[caption.text for caption in several] for several in captions]
        judged = self.engine.match(images, texts)
        if any(math.isnan(j.match_probability) for several in judged for j in several):
            raise FloatingPointError(f"the filter {self.model} gives NaN: its training diverged")
        return [
            [
                replace(
                    caption,
                    match_probability=tempered(judgement.match_probability, self.temperature),
                    similarity=judgement.similarity,
                    filter_model=self.model,
                )
                for caption, judgement in zip(several, judgements, strict=True)
            ]
            for several, judgements in zip(captions, judged, strict=True)
        ]
