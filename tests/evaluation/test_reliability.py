import math

import pytest
import torch

from openblip.evaluation.reliability import (
    COOLEST,
    HOTTEST,
    expected_calibration_error,
    fit_softmax_temperature,
    reliability_bins,
    top_label_error,
)


def test_the_error_worked_by_hand() -> None:
    """Four images, two classes: shares .9 right, .9 wrong, .6 right, .6 right."""
    odds = torch.tensor([9.0, 9.0, 1.5, 1.5]).log()
    logits = torch.stack([odds, torch.zeros(4)], dim=1)
    truth = torch.tensor([0, 1, 0, 0])
    assert top_label_error(logits, truth) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    bins = reliability_bins([0.9, 0.9, 0.6, 0.6], [True, False, True, True])
    assert expected_calibration_error(bins) == pytest.approx(0.4)


def test_the_temperature_that_spoiled_shares_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    truth = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()
    for spoiled in (0.25, 1.0, 3.0):
        found = fit_softmax_temperature(spoiled * logits, truth)
        assert found == pytest.approx(spoiled, rel=0.1)
        assert top_label_error(spoiled * logits, truth, found) < 0.03
    assert top_label_error(4 * logits, truth) > 0.1


def test_the_temperature_is_the_likeliest() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 1.0], [0.5, 2.0]])
    truth = torch.tensor([0, 1, 0, 1])

    def likelihood(temperature: float) -> float:
        logs = (logits / temperature).log_softmax(dim=1)
        return float(logs.gather(1, truth[:, None]).sum())

    found = fit_softmax_temperature(logits, truth)
    assert likelihood(found) > max(likelihood(0.98 * found), likelihood(1.02 * found))


def test_limits() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    assert fit_softmax_temperature(logits, torch.tensor([0, 0])) == COOLEST
    assert fit_softmax_temperature(logits, torch.tensor([1, 1])) == HOTTEST
    assert fit_softmax_temperature(torch.zeros(2, 2), torch.tensor([0, 1])) == 1.0
    assert math.isfinite(top_label_error(1e4 * logits, torch.tensor([0, 0])))
