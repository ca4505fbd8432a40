"""Questions about images: how a sample holds them, and the stream that VQA is trained on.

A sample's JSON has one question, or several under `qa`:
- `question`, and perhaps `question_id`;
- `answers` (or `answer`): a list, as of VQAv2's ten people with repetitions, or a single one;
- `weights`, one per answer. Without them an answer weighs its share of the list, as in the released
  code.

Letters: B questions, R answers of all of them, L tokens.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from openblip.captions import clean_question, has_left_or_right
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.data.sources import Data, address_of, list_shards, read_samples
from openblip.data.stream import SampleStream, StreamOptions
from openblip.images import TrainTransform, decode_image
from openblip.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A question, cleaned, with its answers.

    question_id  as the data have it; else None
    references   all answers that were given, with repetitions: to judge another one by
    answers      each once, as the model learns to give it, with its weight
    """

    text: str
    question_id: int | str | None
    references: tuple[str, ...]
    answers: tuple[str, ...]
    weights: tuple[float, ...]


def read_questions(sample: Sample, max_words: int) -> Iterator[tuple[int, Question] | BadSample]:
    """Yield number and content of every question of a sample, or what is wrong with it."""
    several = sample.meta.get("qa")
    rows = several if isinstance(several, list) else [sample.meta]
    for number, row in enumerate(rows):
        try:
            yield number, _question(row, max_words)
        except ValueError as error:
            yield BadSample(sample.key, str(error))


def question_texts(data: Sequence[Data], max_words: int) -> Iterator[str]:
    """Yield the questions of data sets and their answers, for what needs no images.

    What cannot be used is passed over: it is counted where the images are read.
    """
    for each in data:
        for shard in list_shards(address_of(each)):
            for sample in read_samples(shard, on_bad=lambda key, reason: None):
                for made in read_questions(sample, max_words):
                    if not isinstance(made, BadSample):
                        yield made[1].text
                        yield from made[1].answers


def _question(row: object, max_words: int) -> Question:
    """Raises ValueError with the reason if it is none."""
    if not isinstance(row, Mapping) or not isinstance(row.get("question"), str):
        raise ValueError("no_question")
    text = clean_question(row["question"], max_words)
    if not text.strip():
        raise ValueError("no_question")
    question_id = row.get("question_id")
    if not isinstance(question_id, int | str):
        question_id = None
    given = row.get("answers", row.get("answer", []))
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list):
        raise ValueError("bad_answers")
    references = [_answer(one).strip() for one in given]
    if not all(references):
        raise ValueError("bad_answers")
    weights = row.get("weights")
    if weights is None:
        counts = Counter(references)
        shares = [count / len(references) for count in counts.values()]
        return Question(text, question_id, tuple(references), tuple(counts), tuple(shares))
    if not _fit(weights, references):
        raise ValueError("bad_weights")
    answers = tuple(references)
    return Question(text, question_id, answers, answers, tuple(map(float, weights)))


def _answer(value: Any) -> str:
    """Return the text of an answer, which in VQAv2's files is an object."""
    text = value.get("answer") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise ValueError("bad_answers")
    return text


def _fit(weights: object, answers: Sequence[str]) -> bool:
    return (
        isinstance(weights, list)
        and len(weights) == len(answers) == len(set(answers))
        and all(isinstance(one, int | float) and 0 <= one < float("inf") for one in weights)
    )


@dataclass(frozen=True)
class VqaBatch:
    """B questions with R answers.

    images                            (B, 3, S, S) normalised
    question_ids, question_mask       (B, L) token ids, [CLS] first, 1 = real token
    answer_ids, answer_mask, weights  (R, L), (R, L), (R,)
    owners                            (R,) the question that an answer belongs to
    keys                              of the samples, to name them in an error
    """

    images: Tensor
    question_ids: Tensor
    question_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    weights: Tensor
    owners: Tensor
    keys: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "VqaBatch":
        return VqaBatch(
            self.images.to(device),
            self.question_ids.to(device),
            self.question_mask.to(device),
            self.answer_ids.to(device),
            self.answer_mask.to(device),
            self.weights.to(device),
            self.owners.to(device),
            self.keys,
        )


@dataclass(frozen=True)
class AskedImage:
    """One training example: an image, still encoded, and a question about it."""

    image_bytes: bytes
    question: Question


class VqaStream(SampleStream[AskedImage, VqaBatch]):
    """Questions about images; every question of an image is an example of its own."""

    example_name = "question"
    why_none = "no image has one"

    def __init__(
        self,
        data: Sequence[Data],
        tokenizer: Tokenizer,
        transform: TrainTransform,
        *,
        max_tokens: int,
        max_answer_tokens: int,
        max_words: int = 50,
        **options: Unpack[StreamOptions],
    ) -> None:
        """Raises ValueError if something in `data` is no data set."""
        super().__init__(data, **options)
        self.tokenizer, self.transform = tokenizer, transform
        self.max_tokens, self.max_words = max_tokens, max_words
        self.max_answer_tokens = max_answer_tokens

    def examples(self, sample: Sample, epoch: int) -> Iterator[tuple[int, AskedImage] | BadSample]:
        for made in read_questions(sample, self.max_words):
            if isinstance(made, BadSample):
                yield made
            elif not made[1].answers:
                yield BadSample(sample.key, "no_answer")
            else:
                yield made[0], AskedImage(sample.image_bytes, made[1])

    def load(self, example: AskedImage, rng: np.random.Generator) -> Tensor:
        texts = (example.question.text, *example.question.answers)
        may_flip = not any(map(has_left_or_right, texts))
        return self.transform(decode_image(example.image_bytes), rng, may_flip=may_flip)

    def collate(
        self, keys: Sequence[str], examples: Sequence[AskedImage], images: Sequence[Tensor]
    ) -> VqaBatch:
        asked = [example.question for example in examples]
        questions = self.tokenizer.encode_batch(
            [question.text for question in asked], max_tokens=self.max_tokens
        )
        answers = self.tokenizer.encode_batch(
            [answer for question in asked for answer in question.answers],
            max_tokens=self.max_answer_tokens,
        )
        return VqaBatch(
            images=torch.stack(list(images)),
            question_ids=questions.token_ids,
            question_mask=questions.text_mask,
            answer_ids=answers.token_ids,
            answer_mask=answers.text_mask,
            weights=torch.tensor([weight for question in asked for weight in question.weights]),
            owners=torch.tensor([i for i, question in enumerate(asked) for _ in question.answers]),
            keys=tuple(keys),
        )
