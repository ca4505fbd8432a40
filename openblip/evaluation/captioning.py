"""Captioning: one caption per image, scored against the image's own (BLIP sec. 5.2)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from openblip.data.samples import Sample
from openblip.evaluation.caption_metrics import CaptionScores, score_captions
from openblip.generation import Decoding
from openblip.inference import Engine
from openblip.training.log import ProgressLine


@dataclass(frozen=True)
class CaptioningReport:
    """Scores of the whole set, None where it has no captions, and what was written, by key."""

    scores: CaptionScores | None
    captions: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        scores = {"scores": self.scores.to_json()} if self.scores is not None else {}
        return {**scores, "captions": dict(self.captions)}


def evaluate_captioning(
    engine: Engine,
    samples: Iterable[Sample],
    *,
    prompt: str,
    decoding: Decoding,
    is_silent: bool = False,
) -> CaptioningReport:
    """Caption every sample and score it against the captions that the sample has.

    is_silent  tell no progress
    A test set, of which no sample has captions, is not scored.
    Raises ValueError if some samples have captions and some not, and ImageDecodeError for a bad
    image.
    """
    samples = list(samples)
    images = (sample.image_bytes for sample in samples)
    texts: list[str] = []
    with ProgressLine("captioning", len(samples), unit="images", is_silent=is_silent) as progress:
        for batch in engine.batches(images):
            seeds = [0] * len(batch)
            written = engine.caption(batch, seeds=seeds, prompt=prompt, decoding=decoding)
            texts += [one.text for [one] in written]
            progress.advance(len(batch))
    keys = [sample.key for sample in samples]
    captions = dict(zip(keys, texts, strict=True))
    references = {sample.key: [c.text for c in sample.captions] for sample in samples}
    is_test_set = bool(samples) and not any(references.values())
    scores = None if is_test_set else score_captions(captions, references)
    return CaptioningReport(scores, captions)


def predictions(
    samples: Sequence[Sample], captions: Mapping[str, str]
) -> list[dict[str, int | str]]:
    """Return what the evaluation servers of COCO and NoCaps take: one object an image.

    The image's id is its key, a number where the data set numbers its images.
    """
    return [
        {
            "image_id": int(sample.key) if _is_number(sample.key) else sample.key,
            "caption": captions[sample.key],
        }
        for sample in samples
    ]


def _is_number(key: str) -> bool:
    return key.isdecimal() and str(int(key)) == key
