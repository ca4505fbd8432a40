"""VQA accuracy: how far an answer agrees with those of several people.

Source: the evaluation code of the VQA challenge (Antol et al. 2015, Goyal et al. 2017).
"""

import re
from collections import Counter
from collections.abc import Sequence

FEWEST_PEOPLE = 4
"""Answers to a question from which the challenge's measure can reach 1."""

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
    "should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've "
    "you'd you'd've you'll you're you've"
)


def _misspelt(word: str) -> list[str]:
    """Return a contraction's forms in which one apostrophe is missing."""
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


# The challenge's table has this one the other way round.
_CONTRACTIONS = {wrong: word for word in _CONTRACTED.split() for wrong in _misspelt(word)} | {
    "somebody'd": "somebodyd"
}


def normalise_answer(text: str) -> str:
    """Return an answer as the challenge compares it.

    Lower case, no articles, numbers to ten as digits, apostrophes put back, punctuation dropped:
    without a trace beside a space, or where a number has a comma; else a space takes its place.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_beside_space or has_comma else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Judge an answer by those that people gave, in [0, 1].

    The mean, over all choices of all references but one, of min(1, number that say the same / 3).
    With fewer than four references, as in data with one answer to a question, an answer is right
    if it equals one of them. All are normalised, also where all references agree.
    Raises ValueError if there is no reference.
    """
    if not references:
        raise ValueError("no answer to compare with")
    own = normalise_answer(answer)
    same = Counter(normalise_answer(reference) for reference in references)[own]
    if len(references) < FEWEST_PEOPLE:
        return float(same > 0)
    others = len(references) - same
    return (same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)) / len(references)
