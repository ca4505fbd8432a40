"""CapFilt's captioner: images to synthetic captions (BLIP sec. 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from openblip.checkpoint import model_id
from openblip.data.batches import stable_id
from openblip.data.samples import Caption
from openblip.generation import Decoding
from openblip.inference import Dtype, Engine
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer


@dataclass(frozen=True)
class Captioner:
    """A model with the role `decode`, and how it writes.

    seed   together with the sample's key it fixes what is drawn, whatever else is in the batch
    dtype  of the engine that runs the model
    model  hash of the weights
    """

    blip: Blip
    tokenizer: Tokenizer
    decoding: Decoding
    prompt: str
    captions_per_image: int = 1
    seed: int = 0
    dtype: Dtype = "float32"
    model: str = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", model_id(self.blip))
        engine = Engine(self.blip, self.tokenizer, dtype=self.dtype)
        object.__setattr__(self, "engine", engine)

    def caption(self, images: Tensor, keys: Sequence[str]) -> list[list[Caption]]:
        """Write captions of prepared images (B, 3, S, S) that the keys name."""
        seeds = [stable_id(f"{self.seed}/{key}") for key in keys]
        written = self.engine.caption(
            images,
            seeds=seeds,
            prompt=self.prompt,
            decoding=self.decoding,
            captions_per_image=self.captions_per_image,
        )
        return [
            [
                Caption(
                    one.text,
                    "synthetic",
                    mean_log_probability=one.mean_log_probability,
                    model=self.model,
                    decoding=self.decoding.to_json(),
                    seed=seed,
                )
                for one in several
            ]
            for several, seed in zip(written, seeds, strict=True)
        ]
