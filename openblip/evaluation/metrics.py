"""Retrieval recalls and ROC-AUC as pure functions of scores.

Equal scores have no order. Both measures take the mean over all orders of the tied items, so that
a model that gives every pair one score reaches chance, and results depend on no sorting routine.

I  images    T  texts    R  queries    C  candidates
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RetrievalRecalls:
    """Recalls in percent: `tr` finds texts for an image, `ir` finds images for a text."""

    tr_at_1: float
    tr_at_5: float
    tr_at_10: float
    ir_at_1: float
    ir_at_5: float
    ir_at_10: float
    tr_mean: float
    ir_mean: float
    mean: float

    def to_json(self) -> dict[str, float]:
        """Return the recalls by name."""
        return asdict(self)


def retrieval_recalls(
    image_to_text: Tensor, text_to_image: Tensor, text_image: Tensor
) -> RetrievalRecalls:
    """Measure how often a match is among the 1, 5 and 10 best candidates.

    image_to_text  (I, T) score of each text for an image, higher is better
    text_to_image  (T, I) score of each image for a text
    text_image     (T,) index of the image that a text belongs to; an image may own several texts
    Returns        percent; `tr_mean` and `ir_mean` over the three cut-offs, `mean` over these two
    Raises ValueError for shapes that do not fit, NaN scores, an index out of range, or an image
    without a text.
    Source: the evaluation of ALBEF and BLIP, but for ties (see the module).
    """
    num_images, num_texts = image_to_text.shape
    if text_to_image.shape != (num_texts, num_images) or text_image.shape != (num_texts,):
        raise ValueError(
            f"image_to_text is {tuple(image_to_text.shape)}, so text_to_image must be "
            f"{(num_texts, num_images)} and text_image {(num_texts,)}; they are "
            f"{tuple(text_to_image.shape)} and {tuple(text_image.shape)}"
        )
    if image_to_text.isnan().any() or text_to_image.isnan().any():
        raise ValueError("the scores hold NaN; every score must be a number")
    is_match = text_image.to(image_to_text.device) == torch.arange(
        num_images, device=image_to_text.device
    ).unsqueeze(1)
    if not is_match.any(dim=0).all():
        text = int((~is_match.any(dim=0)).nonzero()[0])
        raise ValueError(
            f"text {text} belongs to image {int(text_image[text])}; images are 0 to "
            f"{num_images - 1}"
        )
    if not is_match.any(dim=1).all():
        image = int((~is_match.any(dim=1)).nonzero()[0])
        raise ValueError(f"image {image} has no text; leave it out of the evaluation")

    tr = recalls(image_to_text, is_match)
    ir = recalls(text_to_image, is_match.T)
    tr_mean, ir_mean = sum(tr) / len(tr), sum(ir) / len(ir)
    return RetrievalRecalls(*tr, *ir, tr_mean, ir_mean, (tr_mean + ir_mean) / 2)


def median_rank(scores: Tensor, is_match: Tensor) -> float:
    """Return the median, over queries, of the rank of a query's best match; 1 is the best rank.

    scores    (R, C) higher is better
    is_match  (R, C) bool, at least one in every row
    """
    best = scores.masked_fill(~is_match, -torch.inf).amax(dim=1, keepdim=True)
    is_tied = scores == best
    # Of t tied candidates, m of them matches, the first match stands at (t + 1) / (m + 1).
    place = (is_tied.sum(dim=1) + 1) / ((is_tied & is_match).sum(dim=1) + 1)
    return float(((scores > best).sum(dim=1) + place).quantile(0.5))


def roc_auc(scores: Tensor | Sequence[float], labels: Tensor | Sequence[int]) -> float:
    """Return the chance that a positive scores above a negative; a tie counts half.

    scores  (R,) higher means more likely positive
    labels  (R,) 1 or True for positives, 0 or False for negatives
    Raises ValueError for lengths that differ, other labels, NaN, or a single class.
    """
    values = torch.as_tensor(scores, dtype=torch.float64).cpu().numpy()
    marks = torch.as_tensor(labels).cpu().numpy()
    if values.ndim != 1 or values.shape != marks.shape:
        raise ValueError(
            f"scores are {values.shape} and labels {marks.shape}; both must be one row of "
            "one length"
        )
    if np.isnan(values).any():
        raise ValueError("the scores hold NaN; every score must be a number")
    is_positive = marks == 1
    if not (is_positive | (marks == 0)).all():
        raise ValueError(f"labels are {np.unique(marks).tolist()}; they must be 0 or 1")
    num_positives = int(is_positive.sum())
    num_negatives = len(values) - num_positives
    if num_positives == 0 or num_negatives == 0:
        raise ValueError(
            f"{num_positives} positives and {num_negatives} negatives; both classes are needed"
        )
    distinct, group = np.unique(values, return_inverse=True)
    positives = np.bincount(group[is_positive], minlength=len(distinct))
    negatives = np.bincount(group[~is_positive], minlength=len(distinct))
    num_below = negatives.cumsum() - negatives
    # Whole numbers until the last division, so the result is exact.
    num_half_wins = int((positives * (2 * num_below + negatives)).sum())
    return num_half_wins / (2 * num_positives * num_negatives)


def recalls(scores: Tensor, is_match: Tensor) -> tuple[float, float, float]:
    """Return recall at 1, 5 and 10 in percent for scores (R, C) and is_match (R, C) bool.

    A query's best match is tied with t - 1 other candidates, m of the t are matches, and g
    candidates stand above. With n = k - g places left for the tied, it misses with the chance that
    n draws without replacement from the t avoid all m: a hypergeometric term.
    """
    best = scores.masked_fill(~is_match, -torch.inf).amax(dim=1, keepdim=True)
    is_tied = scores == best
    num_above = (scores > best).sum(dim=1)
    num_tied = is_tied.sum(dim=1)
    num_tied_matches = (is_tied & is_match).sum(dim=1)

    def recall_at(k: int) -> float:
        num_places = torch.minimum((k - num_above).clamp_min(0), num_tied)
        miss = torch.ones(len(scores), dtype=torch.float64, device=scores.device)
        for drawn in range(min(k, scores.shape[1])):
            chance = (num_tied - num_tied_matches - drawn).clamp_min(0) / (
                num_tied - drawn
            ).double()
            miss = torch.where(drawn < num_places, miss * chance, miss)
        return 100.0 * float((1.0 - miss).mean())

    return recall_at(1), recall_at(5), recall_at(10)
