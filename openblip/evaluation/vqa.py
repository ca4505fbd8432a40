"""VQA: one answer to every question, scored as the VQA challenge does (BLIP sec. 5.3)."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from openblip.answering import Answer, encode_questions
from openblip.batching import read_image
from openblip.data.questions import Question, read_questions
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.evaluation.vqa_accuracy import vqa_accuracy
from openblip.images import ImageDecodeError
from openblip.models.context import Context
from openblip.models.vqa import Vqa
from openblip.tokenizer import Tokenizer
from openblip.training.log import ProgressLine

MAX_WORDS = 50


@dataclass(frozen=True)
class Answered:
    """A question, what the model answers, and how right that is; None where nobody has answered."""

    key: str
    question: str
    question_id: int | str | None
    answer: str
    accuracy: float | None


@dataclass(frozen=True)
class VqaReport:
    """All answers, and the mean accuracy in percent of those that can be judged."""

    answers: tuple[Answered, ...]

    @property
    def num_judged(self) -> int:
        return sum(one.accuracy is not None for one in self.answers)

    @property
    def accuracy(self) -> float | None:
        judged = [one.accuracy for one in self.answers if one.accuracy is not None]
        return 100 * sum(judged) / len(judged) if judged else None

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "accuracy": self.accuracy,
            "num_questions": len(self.answers),
            "num_judged": self.num_judged,
            "answers": [asdict(one) for one in self.answers],
        }

    def predictions(self) -> list[dict[str, object]]:
        """Return what the challenge's evaluation server takes.

        Raises ValueError for a question without `question_id`.
        """
        nameless = [one.question for one in self.answers if one.question_id is None]
        if nameless:
            raise ValueError(
                f"{len(nameless)} questions have no question_id, which predictions need; the first "
                f"is {nameless[0]!r}"
            )
        return [{"question_id": one.question_id, "answer": one.answer} for one in self.answers]


def evaluate_vqa(
    vqa: Vqa,
    tokenizer: Tokenizer,
    samples: Iterable[Sample],
    *,
    answer: Callable[[Context], list[Answer]],
    batch_size: int = 16,
    is_silent: bool = False,
) -> VqaReport:
    """Answer every question of all samples, and compare with the answers that they have.

    answer      how, of `inference`: `write_answers`, or `rank_answers` among candidates
    batch_size  images at a time, with all their questions
    is_silent   tell no progress
    Raises ValueError for a sample without a question, or with a bad one or a bad image.
    """
    answered: list[Answered] = []
    batch: list[tuple[Sample, list[Question]]] = []
    with ProgressLine("questions", None, unit="images", is_silent=is_silent) as progress:
        for sample in samples:
            batch.append((sample, questions_of(sample)))
            if len(batch) == batch_size:
                answered += _answered(vqa, tokenizer, batch, answer)
                progress.advance(len(batch))
                batch = []
        if batch:
            answered += _answered(vqa, tokenizer, batch, answer)
    return VqaReport(tuple(answered))


def questions_of(sample: Sample) -> list[Question]:
    """Return a sample's questions. Raises ValueError if one is bad, or there is none."""
    questions = []
    for made in read_questions(sample, MAX_WORDS):
        if isinstance(made, BadSample):
            raise ValueError(f"sample {sample.key} is unusable: {made.reason}")
        questions.append(made[1])
    if not questions:
        raise ValueError(f"sample {sample.key} is unusable: no_question")
    return questions


def _answered(
    vqa: Vqa,
    tokenizer: Tokenizer,
    batch: list[tuple[Sample, list[Question]]],
    answer: Callable[[Context], list[Answer]],
) -> list[Answered]:
    size_px = vqa.config.vision.image_size_px
    images = torch.stack([_image(sample, size_px) for sample, _ in batch])
    texts = [[question.text for question in questions] for _, questions in batch]
    given = iter(answer(encode_questions(vqa, tokenizer, images, texts)))
    return [
        Answered(
            sample.key,
            question.text,
            question.question_id,
            own := next(given).text,
            vqa_accuracy(own, question.references) if question.references else None,
        )
        for sample, questions in batch
        for question in questions
    ]


def _image(sample: Sample, size_px: int) -> Tensor:
    try:
        return read_image(sample.image_bytes, size_px)
    except ImageDecodeError as error:
        raise ValueError(f"sample {sample.key} is unusable: {error}") from error
