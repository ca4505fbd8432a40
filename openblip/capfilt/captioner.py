"""CapFilt's captioner: images to synthetic captions (BLIP sec. 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from openblip.batching import Images
from openblip.checkpoint import image_encoder_id, model_id
from openblip.data.batches import stable_id
from openblip.data.samples import Caption
from openblip.generation import Decoding
from openblip.inference import Dtype, Engine
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer

DECIMALS = 6
"""What is stored of a probability: beyond these it depends on the machine's number of threads."""


@dataclass(frozen=True)
class Captioner:
    """A model with the role `decode`, and how it writes.

    prompts             each gets captions of its own
    captions_per_image  for each prompt
    seed                together with the sample's key it fixes what is drawn, whatever else is in
                        the batch
    dtype               of the engine that runs the model
    model               hash of the weights
    encoder             hash of the image encoder's weights, and their precision
    """

    blip: Blip
    tokenizer: Tokenizer
    decoding: Decoding
    prompts: tuple[str, ...]
    captions_per_image: int = 1
    seed: int = 0
    dtype: Dtype = "float32"
    model: str = field(init=False)
    encoder: str = field(init=False)
    engine: Engine = field(init=False)

    def __post_init__(self) -> None:
        engine = Engine(self.blip, self.tokenizer, dtype=self.dtype)
        object.__setattr__(self, "model", model_id(self.blip))
        object.__setattr__(self, "encoder", f"{image_encoder_id(self.blip)}/{engine.precision}")
        object.__setattr__(self, "engine", engine)

    def caption(self, images: Images, keys: Sequence[str]) -> list[list[Caption]]:
        """Write captions of prepared images (B, 3, S, S), or of encoded ones, that the keys name.

        Those of the first prompt come first.
        """
        images = self.engine.encode(images)
        captions: list[list[Caption]] = [[] for _ in keys]
        for number, prompt in enumerate(self.prompts):
            more = f"/{number}" if number else ""
            seeds = [stable_id(f"{self.seed}/{key}{more}") for key in keys]
            written = self.engine.caption(
                images,
                seeds=seeds,
                prompt=prompt,
                decoding=self.decoding,
                captions_per_image=self.captions_per_image,
            )
            for own, several, seed in zip(captions, written, seeds, strict=True):
                own += [
                    Caption(
                        one.text,
                        "synthetic",
                        mean_log_probability=round(one.mean_log_probability, DECIMALS),
                        model=self.model,
                        prompt=prompt,
                        decoding=self.decoding.to_json(),
                        seed=seed,
                    )
                    for one in several
                ]
        return captions
