from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openblip.evaluation.metrics import roc_auc
from openblip.evaluation.thresholds import (
    OperatingPoint,
    average_precision,
    best_precision,
    operating_point,
    roc_curve,
    smallest_threshold,
)

SCORES = [0.9, 0.8, 0.7, 0.6, 0.4, 0.2]
LABELS = [True, True, False, True, False, False]

pairs = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1), st.booleans()),
    min_size=2,
).filter(lambda rows: len({label for _, label in rows}) == 2)


def test_the_curve_of_six_pairs() -> None:
    third = pytest.approx(1 / 3)
    two = pytest.approx(2 / 3)
    assert roc_curve(SCORES, LABELS) == [(0, 0), (0, two), (third, two), (third, 1), (1, 1)]


def test_ties_are_one_step_of_the_curve() -> None:
    assert roc_curve([0.5, 0.5], [True, False]) == [(0, 0), (1, 1)]
    assert roc_curve([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == [
        (0, 0), (0, 0.5), (0.5, 1), (1, 1),
    ]  # fmt: skip


@given(pairs)
def test_the_area_under_the_curve_is_the_roc_auc(rows: list[tuple[float, bool]]) -> None:
    scores, labels = zip(*rows, strict=True)
    curve = roc_curve(scores, labels)
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    area = sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(curve))
    assert area == pytest.approx(roc_auc(scores, [int(label) for label in labels]))


def test_average_precision_by_hand() -> None:
    # Matches stand at places 1, 2 and 4: precisions 1, 1 and 3/4, a third of the recall each.
    assert average_precision(SCORES, LABELS) == pytest.approx((1 + 1 + 3 / 4) / 3)
    # One step of both: its precision is the share of matches.
    assert average_precision([0.5, 0.5, 0.5, 0.5], [True, False, False, False]) == 0.25
    assert average_precision([0.9, 0.1], [True, False]) == 1


def test_a_threshold_keeps_what_is_at_or_above_it() -> None:
    point = operating_point(SCORES, LABELS, 0.6)
    assert point == OperatingPoint(0.6, 3 / 4, 1.0, pytest.approx(6 / 7), pytest.approx(4 / 6))
    assert operating_point(SCORES, LABELS, 0.95) == OperatingPoint(0.95, None, 0.0, 0.0, 0.0)


def test_the_smallest_threshold_of_a_precision() -> None:
    assert smallest_threshold(SCORES, LABELS, 1.0) == 0.8
    assert smallest_threshold(SCORES, LABELS, 0.75) == 0.6
    assert smallest_threshold(SCORES, LABELS, 0.5) == 0
    assert smallest_threshold([0.9, 0.5], [False, True], 0.6) is None


def test_a_threshold_is_as_short_as_it_may_be() -> None:
    labels = [True, False, True]
    assert smallest_threshold([0.99987612, 0.99987604, 0.1], labels, 1.0) == 0.9998761
    assert smallest_threshold([1.0, 0.9999999, 0.1], labels, 1.0) == 1.0
    assert smallest_threshold([0.99987612, 0.5, 0.1], labels, 1.0) == 0.9


def test_a_share_that_is_reached_to_the_pair_is_reached() -> None:
    # 0.55 * 100 is more than 55 to a computer.
    scores = [0.5] * 100 + [0.1] * 100
    labels = [True] * 55 + [False] * 145
    assert smallest_threshold(scores, labels, 0.55) == 0.5


@given(pairs, st.floats(0.01, 1))
def test_no_smaller_threshold_reaches_the_precision(
    rows: list[tuple[float, bool]], precision: float
) -> None:
    scores, labels = zip(*rows, strict=True)
    found = smallest_threshold(scores, labels, precision)
    reaching = [
        score for score in scores
        if (operating_point(scores, labels, score).precision or 0) >= precision
    ]  # fmt: skip
    if found is None:
        assert not reaching
    else:
        assert found <= min(reaching)
        kept = operating_point(scores, labels, min(reaching))
        assert operating_point(scores, labels, found).kept_share == kept.kept_share


def test_of_equal_precisions_the_one_that_keeps_most_is_best() -> None:
    assert best_precision(SCORES, LABELS) == operating_point(SCORES, LABELS, 0.8)
    wrong_first = best_precision([0.9, 0.5, 0.3], [False, True, False])
    assert (wrong_first.precision, wrong_first.threshold) == (0.5, 0.5)
