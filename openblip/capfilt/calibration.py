"""How far a filter's match probabilities can be trusted, from pairs whose truth is known.

Two questions. Does the filter order pairs well (ROC, precision and recall over the threshold)? And
is it right as often as it says (reliability)? A temperature mends the second and leaves the first.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openblip.capfilt.filter import CLIPPED_AT, tempered
from openblip.checkpoint import CALIBRATION
from openblip.data.sinks import write_json_atomically
from openblip.evaluation.metrics import roc_auc
from openblip.evaluation.reliability import (
    ReliabilityBin,
    expected_calibration_error,
    likeliest_temperature,
    reliability_bins,
)
from openblip.evaluation.thresholds import (
    OperatingPoint,
    average_precision,
    best_precision,
    operating_point,
    roc_curve,
    smallest_threshold,
)

FEWEST_PAIRS = 10
"""Of each class; with fewer a curve is a matter of luck."""
COOLEST, HOTTEST = 0.05, 20.0
"""Limits of the search for a temperature: of pairs that the filter separates without a mistake the
likelihood rises for ever towards 0, and where it knows nothing, towards infinity."""
MOST_CURVE_POINTS = 500

_GRID = [step / 100 for step in range(101)]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """How one scale of probabilities does: as the filter gives them, or tempered.

    smallest    threshold that reaches the wanted precision; None where none does
    points      of the thresholds 0, 0.01 ... 1
    ece         expected calibration error, the mean distance of the bins from the truth
    brier       mean squared distance of p from 1 or 0
    negative_log_likelihood  mean over pairs, nats
    """

    smallest: OperatingPoint | None
    points: tuple[OperatingPoint, ...]
    bins: tuple[ReliabilityBin, ...]
    ece: float
    brier: float
    negative_log_likelihood: float


@dataclass(frozen=True)
class Calibration:
    """What labelled pairs say of a filter.

    roc               (false positive rate, true positive rate), from (0, 0) to (1, 1)
    at_half           the threshold 0.5, which no temperature moves
    temperature       that fits best, 6 digits
    wanted_precision  of `Scale.smallest`
    notes             sentences that the numbers must not be read without
    """

    num_matching: int
    num_wrong: int
    roc: tuple[tuple[float, float], ...]
    roc_auc: float
    average_precision: float
    at_half: OperatingPoint
    temperature: float
    wanted_precision: float
    before: Scale
    after: Scale
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def calibrate(
    probabilities: Sequence[float], labels: Sequence[bool], precision: float = 0.95
) -> Calibration:
    """Measure a filter on labelled pairs, and fit its temperature.

    probabilities  of a match, in [0, 1], without a temperature
    labels         whether the pair matches
    precision      that a threshold is sought for
    Raises ValueError for lengths that differ, values out of range, and fewer than `FEWEST_PAIRS`
    pairs of a class.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"the precision is {precision}; it must be above 0 and at most 1")
    if len(probabilities) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(probabilities)} probabilities")
    if wrong := [p for p in probabilities if not 0 <= p <= 1]:
        raise ValueError(f"{wrong[0]} is no probability; all must be within 0 and 1")
    num_matching = sum(map(bool, labels))
    num_wrong = len(labels) - num_matching
    if min(num_matching, num_wrong) < FEWEST_PAIRS:
        raise ValueError(
            f"{num_matching} matching and {num_wrong} wrong pairs: at least {FEWEST_PAIRS} of each "
            "are needed"
        )
    temperature = fit_temperature(probabilities, labels)
    moved = [tempered(p, temperature) for p in probabilities]
    before = _scale(probabilities, probabilities, labels, 1.0, precision)
    after = _scale(moved, probabilities, labels, temperature, precision)
    return Calibration(
        num_matching=num_matching,
        num_wrong=num_wrong,
        roc=tuple(_some(roc_curve(probabilities, labels), MOST_CURVE_POINTS)),
        roc_auc=roc_auc(probabilities, [int(label) for label in labels]),
        average_precision=average_precision(probabilities, labels),
        at_half=operating_point(probabilities, labels, 0.5),
        temperature=temperature,
        wanted_precision=precision,
        before=before,
        after=after,
        notes=tuple(_notes(probabilities, labels, precision, before, after, temperature)),
    )


def fit_temperature(probabilities: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the T that makes the labels likeliest under sigmoid(logit(p) / T), to 6 digits.

    Probabilities are clipped at `CLIPPED_AT`, and T lies within `COOLEST` and `HOTTEST`. Where
    every p is 0.5, all T are equally good, and it is 1.
    Source: Guo et al. 2017, section 4.2. The likelihood has one peak over 1 / T, which bisection
    of its slope finds, to the same bits each time.
    """
    logits = _logits(probabilities)
    is_match = np.asarray(labels, dtype=np.float64)
    if not logits.any():
        return 1.0

    def is_likelier_beyond(log_temperature: float) -> bool:
        """Say whether the likelihood still rises here, towards higher temperatures."""
        said = _sigmoid(logits / math.exp(log_temperature))
        return float(((said - is_match) * logits).sum()) > 0

    return likeliest_temperature(is_likelier_beyond, COOLEST, HOTTEST)


def negative_log_likelihood(
    probabilities: Sequence[float], labels: Sequence[bool], temperature: float = 1.0
) -> float:
    """Return the mean over pairs, in nats, of p clipped at `CLIPPED_AT` and then tempered."""
    logits = _logits(probabilities) / temperature
    is_match = np.asarray(labels, dtype=np.float64)
    return float((np.logaddexp(0.0, logits) - is_match * logits).mean())


def brier_score(probabilities: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the mean squared distance of p from 1 for matches and 0 for others."""
    distance = np.asarray(probabilities, dtype=np.float64) - np.asarray(labels, dtype=np.float64)
    return float((distance**2).mean())


def save_temperature(folder: Path, calibration: Calibration, model: str) -> Path:
    """Write the temperature into the folder of the filter that it was fitted for; return the file.

    model  hash of the filter's weights
    Raises ValueError if the folder is not there, as for a model that has a name of the Hub.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no local folder: a temperature cannot be saved there")
    values = {
        "temperature": calibration.temperature,
        "num_pairs": calibration.num_matching + calibration.num_wrong,
        "ece_before": calibration.before.ece,
        "ece_after": calibration.after.ece,
        "model": model,
    }
    write_json_atomically(folder / CALIBRATION, values)
    return folder / CALIBRATION


def read_temperature(folder: Path, model: str) -> float:
    """Return the temperature that `save_temperature` wrote; 1 where there is none.

    model  hash of the weights in the folder
    Raises ValueError if the file is damaged, or was made for other weights.
    """
    path = folder / CALIBRATION
    if not path.exists():
        return 1.0
    try:
        values = json.loads(path.read_text("utf-8"))
        temperature, made_for = values["temperature"], values["model"]
        # What json reads may be any value; a truth value is a number to Python.
        if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
            raise ValueError(f"the temperature is {temperature!r}; it must be a number above 0")
    except (KeyError, OSError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is damaged: {reason}; calibrate again, or remove the file"
        ) from error
    if made_for != model:
        raise ValueError(
            f"{path} was made for the weights {made_for}, and these are {model}: calibrate again, "
            "or remove the file"
        )
    return float(temperature)


def _scale(
    values: Sequence[float],
    untempered: Sequence[float],
    labels: Sequence[bool],
    temperature: float,
    precision: float,
) -> Scale:
    bins = reliability_bins(values, labels)
    threshold = smallest_threshold(values, labels, precision)
    return Scale(
        smallest=None if threshold is None else operating_point(values, labels, threshold),
        points=tuple(operating_point(values, labels, one) for one in _GRID),
        bins=bins,
        ece=expected_calibration_error(bins),
        brier=brier_score(values, labels),
        # From the logits, as a tempered probability may have been rounded to 0.
        negative_log_likelihood=negative_log_likelihood(untempered, labels, temperature),
    )


def _notes(
    probabilities: Sequence[float],
    labels: Sequence[bool],
    precision: float,
    before: Scale,
    after: Scale,
    temperature: float,
) -> list[str]:
    notes = []
    if before.smallest is None:
        best = best_precision(probabilities, labels)
        notes.append(
            f"No threshold reaches a precision of {precision:g}: the highest is "
            f"{best.precision:.4f}, at {best.threshold:.6g}, which keeps "
            f"{100 * best.kept_share:.1f} % of the pairs."
        )
    num_clipped = sum(not CLIPPED_AT <= p <= 1 - CLIPPED_AT for p in probabilities)
    if num_clipped:
        notes.append(
            f"Probabilities nearer than {CLIPPED_AT:g} to 0 or 1 ({num_clipped} of "
            f"{len(probabilities)}) were moved there for the temperature: a logit must be finite."
        )
    if temperature == COOLEST:
        notes.append(
            f"The temperature stands at {COOLEST:g}, the limit of the search: the filter makes "
            "next to no mistake on these pairs, so they cannot tell how sure it may be. Take more "
            "pairs, and harder ones."
        )
    if temperature == HOTTEST:
        notes.append(
            f"The temperature stands at {HOTTEST:g}, the limit of the search: what the filter says "
            "tells nothing of these pairs."
        )
    if after.ece > before.ece:
        notes.append(
            "The calibration error rose, although the labels became likelier: one temperature does "
            "not mend this filter."
        )
    return notes


def _logits(probabilities: Sequence[float]) -> Floats:
    values = np.clip(np.asarray(probabilities, dtype=np.float64), CLIPPED_AT, 1 - CLIPPED_AT)
    logits: Floats = np.log(values) - np.log1p(-values)
    return logits


def _sigmoid(logits: Floats) -> Floats:
    # The same as 1 / (1 + exp(-x)), without an overflow.
    result: Floats = 0.5 * (1 + np.tanh(0.5 * logits))
    return result


def _some(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return points evenly picked by their place, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[place * (len(points) - 1) // (most - 1)] for place in range(most)]
