"""Is a model right as often as it says? Reliability, and the temperature of a softmax.

Letters: I images, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

NUM_BINS = 15
COOLEST, HOTTEST = 0.01, 100.0
"""Limits of the search for a temperature of a softmax."""


@dataclass(frozen=True)
class ReliabilityBin:
    """The guesses whose probability p is low <= p < high; the last bin holds p = 1 too.

    mean_probability, match_share  what the filter said of them, and the share that matches; None
                                   where there are none
    """

    low: float
    high: float
    num_pairs: int
    mean_probability: float | None
    match_share: float | None


def reliability_bins(
    probabilities: Sequence[float], labels: Sequence[bool], num_bins: int = NUM_BINS
) -> tuple[ReliabilityBin, ...]:
    """Compare p with the share of matches in bins of equal width."""
    values = np.asarray(probabilities, dtype=np.float64)
    is_match = np.asarray(labels, dtype=np.float64)
    place = np.minimum((values * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(place, minlength=num_bins)
    said = np.bincount(place, weights=values, minlength=num_bins)
    true = np.bincount(place, weights=is_match, minlength=num_bins)
    return tuple(
        ReliabilityBin(
            low=number / num_bins,
            high=(number + 1) / num_bins,
            num_pairs=int(count),
            mean_probability=float(said[number] / count) if count else None,
            match_share=float(true[number] / count) if count else None,
        )
        for number, count in enumerate(counts)
    )


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the mean, over pairs, of the distance between what their bin said and what was true.

    Source: Naeini et al. 2015; of the probability of a match, not of the likelier class.
    """
    total = sum(one.num_pairs for one in bins)
    error = 0.0
    for one in bins:
        if one.mean_probability is not None and one.match_share is not None:
            error += one.num_pairs / total * abs(one.mean_probability - one.match_share)
    return error


def fit_softmax_temperature(logits: Tensor, truth: Tensor) -> float:
    """Return the T that makes the true classes likeliest under softmax(logits / T), to 6 digits.

    logits  (I, C); truth (I,) numbers of the classes
    T lies within `COOLEST` and `HOTTEST`; where all logits of each image are equal it is 1.
    Source: Guo et al. 2017, section 4.2. The likelihood has one peak over 1 / T, which bisection
    of its slope finds.
    """
    values = logits.double()
    own = values.gather(1, truth[:, None])
    if bool((values == own).all()):
        return 1.0

    def is_likelier_beyond(log_temperature: float) -> bool:
        """Say whether the likelihood still rises here, towards higher temperatures."""
        shares = (values / math.exp(log_temperature)).softmax(dim=1)
        return float(((shares * values).sum(dim=1, keepdim=True) - own).sum()) > 0

    return likeliest_temperature(is_likelier_beyond, COOLEST, HOTTEST)


def likeliest_temperature(
    is_likelier_beyond: Callable[[float], bool], coolest: float, hottest: float
) -> float:
    """Return the T within limits where a likelihood has its only peak, to 6 digits.

    is_likelier_beyond  says of log T whether the likelihood still rises there, towards higher T
    """
    low, high = math.log(coolest), math.log(hottest)
    if is_likelier_beyond(high):
        return hottest
    if not is_likelier_beyond(low):
        return coolest
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if is_likelier_beyond(middle) else (low, middle)
    # A filter's name shows as many digits: another temperature is then another name.
    return float(f"{math.exp(low):.6g}")


def top_label_error(logits: Tensor, truth: Tensor, temperature: float = 1.0) -> float:
    """Return the expected calibration error of each image's best guess.

    logits  (I, C), divided by the temperature; truth (I,) numbers of the classes
    """
    best = (logits.double() / temperature).softmax(dim=1).max(dim=1)
    bins = reliability_bins(best.values.tolist(), (best.indices == truth).tolist())
    return expected_calibration_error(bins)
