"""What a threshold on a score keeps, as pure functions of scores and labels.

Equal scores have no order: a threshold keeps all of them or none.

scores  within 0 and 1, higher means more likely a match
labels  whether the pair matches; at least one does, and one does not
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold keeps.

    precision   share of matching pairs among the kept; None where none is kept
    recall      share of the matching pairs that is kept
    f1          harmonic mean of both; 0 where none is kept
    kept_share  share of all pairs that is kept
    """

    threshold: float
    precision: float | None
    recall: float
    f1: float
    kept_share: float


def roc_curve(scores: Sequence[float], labels: Sequence[bool]) -> list[tuple[float, float]]:
    """Return the corners (false positive rate, true positive rate), from (0, 0) to (1, 1).

    Points on the line between their neighbours are left out.
    """
    _, matching, kept = _cumulated(scores, labels)
    ys = np.concatenate([np.zeros(1, np.int64), matching])
    xs = np.concatenate([np.zeros(1, np.int64), kept - matching])
    dx, dy = np.diff(xs), np.diff(ys)
    # Whole numbers, so that what lies on a line is found exactly.
    is_corner = np.concatenate([[True], dx[:-1] * dy[1:] != dx[1:] * dy[:-1], [True]])
    corners = zip(xs[is_corner] / xs[-1], ys[is_corner] / ys[-1], strict=True)
    return [(float(x), float(y)) for x, y in corners]


def average_precision(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the sum, over falling thresholds, of precision times what recall gains.

    Source: as scikit-learn's average_precision_score: not interpolated, ties are one step.
    """
    _, matching, kept = _cumulated(scores, labels)
    gains = np.diff(matching, prepend=0) / matching[-1]
    return float((gains * matching / kept).sum())


def operating_point(
    scores: Sequence[float], labels: Sequence[bool], threshold: float
) -> OperatingPoint:
    """Return what is kept from a threshold on, as `KeepRule` keeps."""
    is_kept = np.asarray(scores, dtype=np.float64) >= threshold
    is_match = np.asarray(labels, dtype=bool)
    num_kept, num_matching = int(is_kept.sum()), int(is_match.sum())
    num_right = int((is_kept & is_match).sum())
    return OperatingPoint(
        threshold=threshold,
        precision=num_right / num_kept if num_kept else None,
        recall=num_right / num_matching,
        f1=2 * num_right / (num_kept + num_matching),
        kept_share=num_kept / len(is_kept),
    )


def smallest_threshold(
    scores: Sequence[float], labels: Sequence[bool], precision: float
) -> float | None:
    """Return the smallest threshold whose kept pairs match at this share; None if none does.

    Of the numbers that keep the same pairs it is the one with the fewest digits: it can be typed,
    and does not hang on the last bit of a score. Higher thresholds may fall below again.
    """
    thresholds, matching, kept = _cumulated(scores, labels)
    # Divided, not multiplied: 55 of 100 is 0.55, and 0.55 * 100 is more than 55.
    reaching = np.nonzero(matching / kept >= precision)[0]
    if not len(reaching):
        return None
    place = reaching[-1]
    below = float(thresholds[place + 1]) if place + 1 < len(thresholds) else -math.inf
    return _shortest_between(below, float(thresholds[place]))


def best_precision(scores: Sequence[float], labels: Sequence[bool]) -> OperatingPoint:
    """Return the threshold of the highest precision; of several, the one that keeps most."""
    thresholds, matching, kept = _cumulated(scores, labels)
    shares = matching / kept
    place = int(np.nonzero(shares == shares.max())[0][-1])
    return operating_point(scores, labels, float(thresholds[place]))


def _cumulated(
    scores: Sequence[float], labels: Sequence[bool]
) -> tuple[Floats, Integers, Integers]:
    """Return the distinct scores, falling, and how many pairs from each on match and are."""
    values = np.asarray(scores, dtype=np.float64)
    is_match = np.asarray(labels, dtype=bool)
    distinct, group = np.unique(values, return_inverse=True)
    matching = np.bincount(group[is_match], minlength=len(distinct))
    kept = np.bincount(group, minlength=len(distinct))
    return distinct[::-1], matching[::-1].cumsum(), kept[::-1].cumsum()


def _shortest_between(low: float, high: float) -> float:
    """Return the number with the fewest decimals that is above `low` and at most `high`."""
    exact = Decimal(repr(high))
    for digits in range(18):
        number = float(exact.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))
        if number > low:
            return number
    return high
