import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openblip.capfilt.calibration import (
    COOLEST,
    HOTTEST,
    Calibration,
    brier_score,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    read_temperature,
    reliability_bins,
    save_temperature,
)
from openblip.capfilt.filter import tempered


def drawn(
    temperature: float, number: int = 20_000, seed: int = 0
) -> tuple[list[float], list[bool]]:
    """Draw pairs of a filter whose logits are `temperature` times what they should be."""
    generator = np.random.default_rng(seed)
    true = generator.normal(0.3, 1.5, number)
    labels = generator.random(number) < 1 / (1 + np.exp(-true))
    said = 1 / (1 + np.exp(-temperature * true))
    return said.tolist(), labels.tolist()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_temperature_that_was_put_in_is_found(temperature: float) -> None:
    probabilities, labels = drawn(temperature)
    found = fit_temperature(probabilities, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    assert found == fit_temperature(probabilities, labels)
    assert f"{found:g}" == repr(found).removesuffix(".0")


def test_the_temperature_by_hand() -> None:
    # Three of four match where p is 16/17: the logit must be log 3 and is log 16.
    probabilities = [16 / 17] * 4
    labels = [True, True, True, False]
    expected = math.log(16) / math.log(3)
    assert fit_temperature(probabilities, labels) == pytest.approx(expected, rel=1e-5)


def test_no_other_temperature_is_likelier() -> None:
    probabilities, labels = drawn(2.0, 300)
    best = fit_temperature(probabilities, labels)
    reached = negative_log_likelihood(probabilities, labels, best)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert reached < negative_log_likelihood(probabilities, labels, factor * best)


@pytest.mark.parametrize(
    ("probabilities", "labels", "expected"),
    [
        ([0.9, 0.1], [True, False], COOLEST),
        ([0.9, 0.1], [False, True], HOTTEST),
        ([0.5, 0.5], [True, False], 1.0),
        ([1.0, 0.0, 1.0], [True, False, False], None),
    ],
)
def test_the_temperature_is_always_a_number(
    probabilities: Sequence[float], labels: Sequence[bool], expected: float | None
) -> None:
    found = fit_temperature(probabilities, labels)
    assert COOLEST <= found <= HOTTEST
    assert expected is None or found == expected


def test_bins_error_and_brier_score_by_hand() -> None:
    probabilities = [0.05, 0.15, 0.5, 1.0]
    labels = [False, True, True, True]
    low, high = reliability_bins(probabilities, labels, num_bins=2)
    assert (low.low, low.high, low.num_pairs) == (0, 0.5, 2)
    assert low.mean_probability == pytest.approx(0.1)
    assert low.match_share == 0.5
    assert (high.num_pairs, high.mean_probability, high.match_share) == (2, 0.75, 1.0)
    assert expected_calibration_error([low, high]) == pytest.approx((0.4 + 0.25) / 2)
    squares = 0.05**2 + 0.85**2 + 0.5**2 + 0
    assert brier_score(probabilities, labels) == pytest.approx(squares / 4)
    empty = reliability_bins(probabilities, labels, num_bins=10)[7]
    assert (empty.num_pairs, empty.mean_probability, empty.match_share) == (0, None, None)


def test_the_likelihood_by_hand() -> None:
    assert negative_log_likelihood([0.8, 0.8], [True, False]) == pytest.approx(
        -(math.log(0.8) + math.log(0.2)) / 2
    )
    assert negative_log_likelihood([1.0], [False]) == pytest.approx(-math.log(1e-7))


def test_a_calibration_mends_probabilities_and_keeps_their_order() -> None:
    probabilities, labels = drawn(3.0, 4000)
    result = calibrate(probabilities, labels, precision=0.9)
    assert result.num_matching + result.num_wrong == 4000
    assert result.after.ece < 0.03 < result.before.ece
    assert result.after.brier < result.before.brier
    assert result.after.negative_log_likelihood < result.before.negative_log_likelihood
    assert [note for note in result.notes if "nearer than 1e-07" not in note] == []
    before, after = result.before.smallest, result.after.smallest
    assert before is not None
    assert after is not None
    # The same pairs, on another scale.
    assert (before.precision, before.kept_share) == (after.precision, after.kept_share)
    assert before.precision is not None
    assert before.precision >= 0.9
    assert after.threshold < before.threshold
    assert len(result.roc) <= 500
    assert sum(one.num_pairs for one in result.after.bins) == 4000
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["temperature"] > 2


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_any_pairs_give_numbers(rows: list[tuple[float, bool]]) -> None:
    rows += [(0.3, True), (0.6, False)] * 10
    probabilities, labels = map(list, zip(*rows, strict=True))
    result = calibrate(probabilities, labels)
    json.dumps(result.to_json(), allow_nan=False)
    assert result.after.negative_log_likelihood <= result.before.negative_log_likelihood + 1e-9
    at_half = [tempered(p, result.temperature) >= 0.5 for p in probabilities]
    assert sum(at_half) / len(at_half) == pytest.approx(result.at_half.kept_share)


def test_what_the_numbers_hide_is_said() -> None:
    labels = [True] * 20 + [False] * 20
    sure = calibrate([1.0] * 20 + [0.0] * 20, labels)
    assert sure.temperature == COOLEST
    assert any("nearer than 1e-07 to 0 or 1 (40 of 40)" in note for note in sure.notes)
    assert any("limit of the search" in note for note in sure.notes)
    bad = calibrate([0.1] * 20 + [0.9] * 20, labels)
    assert bad.before.smallest is None
    assert any("No threshold reaches a precision of 0.95: the highest is 0.5000, at 0.1, which "
               "keeps 100.0 % of the pairs." in note for note in bad.notes)  # fmt: skip
    assert bad.temperature == HOTTEST


@pytest.mark.parametrize(
    ("probabilities", "labels", "precision", "message"),
    [
        ([0.5] * 19, [True] * 10 + [False] * 9, 0.9, "10 matching and 9 wrong pairs"),
        ([], [], 0.9, "0 matching and 0 wrong pairs: at least 10"),
        ([0.5], [], 0.9, "0 labels for 1 probabilities"),
        ([0.5, 1.5], [True, False], 0.9, "1.5 is no probability"),
        ([math.nan], [True], 0.9, "nan is no probability"),
        ([0.5], [True], 0.0, "the precision is 0.0"),
        ([0.5], [True], 1.1, "the precision is 1.1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    probabilities: list[float], labels: list[bool], precision: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(probabilities, labels, precision)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(*drawn(1.7, 500))


def test_a_temperature_comes_back(calibration: Calibration, tmp_path: Path) -> None:
    assert read_temperature(tmp_path, "0123") == 1.0
    path = save_temperature(tmp_path, calibration, "0123")
    assert read_temperature(tmp_path, "0123") == calibration.temperature
    assert json.loads(path.read_text()) == {
        "temperature": calibration.temperature,
        "num_pairs": 500,
        "ece_before": calibration.before.ece,
        "ece_after": calibration.after.ece,
        "model": "0123",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"]


def test_a_temperature_of_other_weights_is_refused(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = save_temperature(tmp_path, calibration, "0123")
    with pytest.raises(ValueError, match=f"{path} was made for the weights 0123, and these are 4"):
        read_temperature(tmp_path, "4567")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"model": "a"}', '{"temperature": 1.5}', '{"temperature": 0, "model": "a"}',
     '{"temperature": "2", "model": "a"}', '{"temperature": true, "model": "a"}',
     '{"temperature": NaN, "model": "a"}', "\xff"],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{tmp_path / 'calibration.json'} is damaged: "):
        read_temperature(tmp_path, "a")


def test_a_model_without_a_folder_keeps_no_temperature(
    calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no local folder"):
        save_temperature(tmp_path / "owner" / "model", calibration, "a")
