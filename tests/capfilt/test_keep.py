from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from openblip.capfilt.keep import DUPLICATE, EMPTY, NOT_ASKED_FOR, UNMATCHED, KeepRule
from openblip.data.samples import Caption


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
