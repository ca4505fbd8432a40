"""What an engine answers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WrittenCaption:
    """A caption as the decoder wrote it.

    token_log_probabilities  nats, of the new tokens and of [SEP] if it came
    is_finished              whether [SEP] came before the longest length
    """

    text: str
    token_log_probabilities: tuple[float, ...]
    mean_log_probability: float
    is_finished: bool


@dataclass(frozen=True)
class Judgement:
    """How well a text fits an image: probability of the ITM head, and ITC cosine."""

    match_probability: float
    similarity: float


@dataclass(frozen=True)
class Labels:
    """Names of classes, and what an image is compared with for each: (number, E), unit norm."""

    names: tuple[str, ...]
    embedding: Tensor


@dataclass(frozen=True)
class LabelGuess:
    """How well a label fits an image: its share among all labels, and ITC cosine."""

    label: str
    probability: float
    similarity: float
