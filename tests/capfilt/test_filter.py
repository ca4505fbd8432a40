import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from openblip.capfilt.filter import (
    DUPLICATE,
    EMPTY,
    NOT_ASKED_FOR,
    UNMATCHED,
    Filter,
    KeepRule,
    tempered,
)
from openblip.checkpoint import model_id
from openblip.data.samples import Caption
from openblip.inference import Engine


def judged(*rows: tuple[str, str, float]) -> list[Caption]:
    return [Caption(text, source, match_probability=p) for text, source, p in rows]


def reasons(rule: KeepRule, captions: Sequence[Caption]) -> list[str | None]:
    return [caption.drop_reason for caption in rule.apply(captions)]


def test_a_caption_is_kept_from_the_threshold_on() -> None:
    captions = judged(("a", "web", 0.49), ("b", "web", 0.5), ("c", "synthetic", 0.51))
    assert reasons(KeepRule(), captions) == [UNMATCHED, None, None]


def test_every_reason() -> None:
    captions = judged(
        ("a cat", "web", 0.1),
        ("a cat", "synthetic", 0.9),
        ("A cat!", "web", 0.8),
        (" ... ", "web", 0.9),
        ("a dog", "human", 0.9),
    )
    rule = KeepRule(sources=("web", "synthetic"))
    assert reasons(rule, captions) == [UNMATCHED, None, DUPLICATE, EMPTY, NOT_ASKED_FOR]


def test_a_dropped_caption_does_not_make_the_next_a_duplicate() -> None:
    captions = judged(("a cat", "human", 0.9), ("a cat", "web", 0.2), ("a cat", "web", 0.9))
    rule = KeepRule(sources=("web",))
    assert reasons(rule, captions) == [NOT_ASKED_FOR, UNMATCHED, None]


def test_threshold_zero_keeps_all_and_one_only_the_certain() -> None:
    captions = judged(("a", "web", 0.0), ("b", "web", 0.999), ("c", "web", 1.0))
    assert reasons(KeepRule(threshold=0), captions) == [None, None, None]
    assert reasons(KeepRule(threshold=1), captions) == [UNMATCHED, UNMATCHED, None]


def test_another_rule_forgets_the_reasons_of_the_last() -> None:
    captions = judged(("a", "web", 0.3), ("b", "web", 0.7))
    strict = KeepRule(threshold=0.9).apply(captions)
    assert KeepRule(threshold=0.5).apply(strict) == KeepRule(threshold=0.5).apply(captions)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "A.", "b", "", "!"]),
            st.sampled_from(["web", "synthetic", "human"]),
            st.floats(0, 1),
        )
    ),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_rule_changes_reasons_alone_and_a_lower_threshold_keeps_more(
    rows: list[tuple[str, str, float]], a: float, b: float
) -> None:
    captions = judged(*rows)
    low, high = (KeepRule(threshold=t).apply(captions) for t in sorted((a, b)))
    for before, after in zip(captions, low, strict=True):
        assert (after.text, after.source) == (before.text, before.source)
        assert after.match_probability == before.match_probability
    assert sum(c.drop_reason is None for c in low) >= sum(c.drop_reason is None for c in high)


@pytest.mark.parametrize("values", [{"threshold": 1.5}, {"threshold": -0.1}, {"sources": ("me",)}])
def test_values_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KeepRule(**values)


def test_a_filter_adds_its_judgement_and_its_name(judge: Filter) -> None:
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    captions = [[Caption("a blue dog"), Caption("a red cat", "human", seed=3)], []]
    first, second = judge.judge(images, captions)
    assert second == []
    expected = Engine(judge.blip, judge.tokenizer, dtype="float32").match(
        images, [["a blue dog", "a red cat"], []]
    )
    for caption, judgement in zip(first, expected[0], strict=True):
        assert caption.match_probability == judgement.match_probability
        assert caption.similarity == judgement.similarity
        assert caption.filter_model == judge.model == model_id(judge.blip)
    assert (first[1].source, first[1].seed, first[1].text) == ("human", 3, "a red cat")


def test_a_temperature_moves_probabilities_and_shows_in_the_name(judge: Filter) -> None:
    images = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    captions = [[Caption("a blue dog"), Caption("a red cat")]]
    warm = Filter(judge.blip, judge.tokenizer, temperature=1.25)
    assert warm.model == f"{judge.model}@1.25"
    [plain], [moved] = judge.judge(images, captions), warm.judge(images, captions)
    for before, after in zip(plain, moved, strict=True):
        assert after.match_probability == tempered(before.match_probability, 1.25)
        assert after.match_probability != before.match_probability
        assert after.similarity == before.similarity
        assert after.filter_model == warm.model


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
