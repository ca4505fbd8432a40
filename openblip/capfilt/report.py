"""What CapFilt did: counts, keep rates and the filter's accuracy where the truth is known."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from openblip.capfilt.shard import JudgedImage
from openblip.evaluation.metrics import roc_auc

TRUE_CAPTION = "none"
"""Value of the meta field `noise` of an image whose web caption is true."""


@dataclass(frozen=True)
class PlantedTruth:
    """The filter against web captions of known truth, which the meta field `noise` tells.

    roc_auc           of the match probability, all kinds of noise together
    roc_auc_by_noise  true captions against the wrong ones of one kind
    keep_rate         share kept at the threshold by kind; `none` are the true ones
    num_captions      by kind
    precision         share of true captions among the kept ones
    """

    roc_auc: float
    roc_auc_by_noise: Mapping[str, float]
    keep_rate: Mapping[str, float]
    num_captions: Mapping[str, int]
    precision: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def planted_truth(images: Iterable[JudgedImage], threshold: float) -> PlantedTruth | None:
    """Compare the filter's judgement of web captions with the planted truth; None without one."""
    by_noise: dict[str, list[float]] = defaultdict(list)
    for image in images:
        if "noise" not in image.meta:
            continue
        for caption in image.captions:
            if caption.source == "web":
                assert caption.match_probability is not None
                by_noise[str(image.meta["noise"])].append(caption.match_probability)
    true = by_noise.pop(TRUE_CAPTION, [])
    if not true or not by_noise:
        return None
    wrong = [probability for several in by_noise.values() for probability in several]

    def auc(negatives: list[float]) -> float:
        return roc_auc(true + negatives, [1] * len(true) + [0] * len(negatives))

    def kept(probabilities: list[float]) -> int:
        return sum(probability >= threshold for probability in probabilities)

    kinds = {TRUE_CAPTION: true, **dict(sorted(by_noise.items()))}
    return PlantedTruth(
        roc_auc=auc(wrong),
        roc_auc_by_noise={kind: auc(values) for kind, values in sorted(by_noise.items())},
        keep_rate={kind: kept(values) / len(values) for kind, values in kinds.items()},
        num_captions={kind: len(values) for kind, values in kinds.items()},
        precision=kept(true) / max(1, kept(true) + kept(wrong)),
    )
