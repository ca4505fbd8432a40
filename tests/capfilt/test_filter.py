import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openblip.capfilt.filter import Filter, tempered


def test_a_temperature_moves_probabilities_and_shows_in_the_name(judge: Filter) -> None:
    images = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    texts = [["a blue dog", "a red cat"]]
    warm = Filter(judge.blip, judge.tokenizer, temperature=1.25)
    assert warm.model == f"{judge.model}@1.25"
    [plain], [moved] = judge.probabilities(images, texts), warm.probabilities(images, texts)
    assert moved == [tempered(before, 1.25) for before in plain]
    assert moved != plain
    assert warm.similarities(images, texts) == judge.similarities(images, texts)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(judge: Filter, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature is"):
        Filter(judge.blip, judge.tokenizer, temperature=temperature)


def test_a_temperature_divides_the_logit() -> None:
    # logit(0.8) is log 4, half of it log 2, twice it log 16.
    assert tempered(0.8, 2.0) == pytest.approx(2 / 3)
    assert tempered(0.2, 2.0) == pytest.approx(1 / 3)
    assert tempered(0.8, 0.5) == pytest.approx(16 / 17)
    assert tempered(0.5, 7.0) == 0.5


@pytest.mark.parametrize("temperature", [1e-300, 0.05, 3.0, 1e300])
def test_certainty_has_a_probability_at_any_temperature(temperature: float) -> None:
    nothing, all_ = tempered(0.0, temperature), tempered(1.0, temperature)
    assert 0 <= nothing <= 0.5 <= all_ <= 1
    assert nothing + all_ == pytest.approx(1)


@given(st.floats(0, 1))
def test_temperature_one_changes_nothing(probability: float) -> None:
    assert tempered(probability, 1.0) == probability


@given(st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.floats(0.01, 100))
def test_a_temperature_keeps_the_order(a: float, b: float, temperature: float) -> None:
    low, high = sorted((a, b))
    assert tempered(low, temperature) <= tempered(high, temperature)
    assert (tempered(a, temperature) >= 0.5) == (a >= 0.5)
