"""What an engine answers."""

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from openblip.generation_batch import Generated
from openblip.tokenizer import Tokenizer
from openblip.words import Flag as Flag
from openblip.words import Word as Word
from openblip.words import flags_of, words_of


@dataclass(frozen=True)
class WrittenCaption:
    """A caption as the decoder wrote it. Words and flags are made when they are first asked for.

    token_log_probabilities  nats, of the new tokens and of [SEP] if it came
    is_finished              whether [SEP] came before the longest length
    """

    text: str
    token_log_probabilities: tuple[float, ...]
    mean_log_probability: float
    is_finished: bool
    _generated: Generated = field(repr=False, compare=False)
    _tokenizer: Tokenizer = field(repr=False, compare=False)

    @classmethod
    def of(cls, generated: Generated, tokenizer: Tokenizer) -> "WrittenCaption":
        """Return decoded tokens as a caption."""
        return cls(
            tokenizer.decode(generated.token_ids),
            generated.log_probabilities,
            generated.mean_log_probability,
            generated.is_finished,
            generated,
            tokenizer,
        )

    @cached_property
    def words(self) -> tuple[Word, ...]:
        """The words of the text, with their probabilities; joined by spaces they are the text."""
        return words_of(self._tokenizer, self._generated)

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """What should make one look twice; see `words.flags_of`."""
        return flags_of(self.words, self.mean_log_probability)


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
