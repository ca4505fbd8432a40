"""Captioning: one caption per image, scored against the image's own (BLIP sec. 5.2)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from openblip.data.samples import Sample
from openblip.evaluation.caption_metrics import CaptionScores, score_captions
from openblip.generation import Decoding
from openblip.inference import batched, caption_images, read_image
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.log import ProgressLine


@dataclass(frozen=True)
class CaptioningReport:
    """Scores of the whole set, and what was written, by sample key."""

    scores: CaptionScores
    captions: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {"scores": self.scores.to_json(), "captions": dict(self.captions)}


def evaluate_captioning(
    blip: Blip,
    tokenizer: Tokenizer,
    samples: Iterable[Sample],
    *,
    prompt: str,
    decoding: Decoding,
    batch_size: int = 32,
    is_silent: bool = False,
) -> CaptioningReport:
    """Caption every sample and score it against the captions that the sample has.

    is_silent  tell no progress
    Raises ValueError for a sample without captions, and ImageDecodeError for a bad image.
    """
    samples = list(samples)
    size_px = blip.config.vision.image_size_px
    images = (read_image(sample.image_bytes, size_px) for sample in samples)
    texts: list[str] = []
    with ProgressLine("captioning", len(samples), unit="images", is_silent=is_silent) as progress:
        for batch in batched(images, batch_size):
            seeds = [0] * batch.shape[0]
            written = caption_images(
                blip, tokenizer, batch, seeds=seeds, prompt=prompt, decoding=decoding
            )
            texts += [one.text for [one] in written]
            progress.advance(batch.shape[0])
    keys = [sample.key for sample in samples]
    captions = dict(zip(keys, texts, strict=True))
    references = {sample.key: [c.text for c in sample.captions] for sample in samples}
    return CaptioningReport(score_captions(captions, references), captions)
