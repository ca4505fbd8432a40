"""Captions and questions as text: clean-up, the prompt, and what a mirrored image would make false.

Source of both clean-ups: the text side of the released BLIP code.
"""

import re

DEFAULT_PROMPT = "a picture of "

_PUNCTUATION = '.!"()*#:;~'
_TO_SPACES = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_TO_NOTHING = str.maketrans(dict.fromkeys(_PUNCTUATION))
_SPACE_RUN = re.compile(r"\s{2,}")
_LEFT_OR_RIGHT = re.compile(r"\b(left|right)(most|hand|wards?)?\b", re.IGNORECASE)


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower-case a caption, turn punctuation into spaces and keep its first words.

    max_words   words kept, at least 1
    Returns     the caption; it may be empty. A single tab or newline between words stays, and
                commas, question marks, hyphens and apostrophes are kept.
    Raises ValueError if max_words is below 1.
    """
    spaced = _SPACE_RUN.sub(" ", text.lower().translate(_TO_SPACES))
    return _first_words(spaced.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """Lower-case a question, delete punctuation and keep its first words.

    max_words   words kept, at least 1; two spaces in a row hold an empty word between them
    Returns     the question, with leading spaces and line ends as they were.
    Raises ValueError if max_words is below 1.
    """
    return _first_words(text.lower().translate(_TO_NOTHING).rstrip(" "), max_words)


def has_left_or_right(text: str) -> bool:
    """Say whether a caption names a side, so that mirroring its image would make it false."""
    return _LEFT_OR_RIGHT.search(text) is not None


def _first_words(text: str, max_words: int) -> str:
    if max_words < 1:
        raise ValueError(f"max_words is {max_words}; it must be at least 1")
    return " ".join(text.split(" ")[:max_words])
