import json
import re
from pathlib import Path

import pytest

from openblip.captions import clean_caption, clean_question, has_left_or_right


@pytest.mark.parametrize(
    ("group", "clean"), [("pre_caption", clean_caption), ("pre_question", clean_question)]
)
def test_clean_up_equals_the_reference(reference: Path, group, clean):
    cases = json.loads((reference / "text_cleaning.json").read_text())[group]
    num_compared = 0
    for case in cases:
        for key, expected in case.items():
            if limit := re.search(r"_(\d+)$", key):
                assert clean(case["text"], max_words=int(limit[1])) == expected, (case["text"], key)
                num_compared += 1
    assert num_compared >= len(cases) > 0


def test_fifty_words_are_kept_by_default():
    text = " ".join(f"w{i}" for i in range(60))
    assert clean_caption(text).split(" ")[-1] == "w49"
    assert clean_question(text).split(" ")[-1] == "w49"


@pytest.mark.parametrize("clean", [clean_caption, clean_question])
def test_zero_words_are_refused(clean):
    with pytest.raises(ValueError, match="max_words is 0"):
        clean("a dog", max_words=0)


@pytest.mark.parametrize(
    "text",
    [
        "a dog LEFT of a cat",
        "right-hand drive",
        "the leftmost door",
        "she turns rightwards",
        "Left!",
    ],
)
def test_sides_are_found(text):
    assert has_left_or_right(text)


@pytest.mark.parametrize("text", ["bright lights", "leftover rice", "a copyright sign", ""])
def test_other_words_are_not_sides(text):
    assert not has_left_or_right(text)
