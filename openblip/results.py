"""What an engine answers."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Flag = Literal["repetition", "low_confidence"]


@dataclass(frozen=True)
class Word:
    """A written word, and how probable all its pieces are in a row, after what stands before."""

    text: str
    probability: float


@dataclass(frozen=True)
class WrittenCaption:
    """A caption as the decoder wrote it.

    token_log_probabilities  nats, of the new tokens and of [SEP] if it came
    is_finished              whether [SEP] came before the longest length
    words                    of the text; with spaces between them they are the text
    flags                    what should make one look twice; see `words.flags_of`
    """

    text: str
    token_log_probabilities: tuple[float, ...]
    mean_log_probability: float
    is_finished: bool
    words: tuple[Word, ...]
    flags: tuple[Flag, ...]


@dataclass(frozen=True)
class Judgement:
    """How well a text fits an image: probability of the ITM head, and ITC cosine."""

    match_probability: float
    similarity: float


@dataclass(frozen=True)
class Labels:
    """Names of classes, and what an image is compared with for each.

    embedding  (number, E), unit norm, for ITC
    sentences  of the first label, of the second, ..., as many of each, for ITM
    """

    names: tuple[str, ...]
    embedding: Tensor
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class LabelGuess:
    """How well a label fits an image.

    probability        share among all labels
    similarity         ITC cosine
    match_probability  of its sentences, by ITM; None where ITM was not asked
    """

    label: str
    probability: float
    similarity: float
    match_probability: float | None
