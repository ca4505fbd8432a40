"""VQA accuracy on hand-worked cases, and the evaluation of a tiny model."""

import io
from functools import partial

import pytest
import torch
from PIL import Image

from openblip.answering import Answer, Candidates, encode_questions, rank_answers
from openblip.data.samples import Sample
from openblip.evaluation.vqa import evaluate_vqa
from openblip.evaluation.vqa_accuracy import normalise_answer, vqa_accuracy
from openblip.inference import Engine
from openblip.models.context import Context
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.models.vqa import Vqa, VqaConfig
from openblip.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red  car.", "red car"),
        ("two", "2"),
        ("none of the ten", "0 of 10"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),  # two apostrophes are missing
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("yes, sir", "yes sir"),
        ("yes,sir", "yes sir"),
        ("t-shirt", "t shirt"),
        ("1,000 km/h", "1000 kmh"),  # one comma in a number, and no punctuation leaves a trace
        ("3.14", "3.14"),
        ("e.g. this.", "eg this"),
        ("what?!", "what"),
        ("on\nthe\ttable", "on table"),
    ],
)
def test_answers_are_compared_as_the_challenge_does(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_accuracy_of_ten_people(same: int, expected: float) -> None:
    # One of ten is left out in turn: of two that agree, 1/3 twice and 2/3 eight times.
    references = ["dog"] * same + ["cat"] * (10 - same)
    assert vqa_accuracy("A dog", references) == pytest.approx(expected)


def test_accuracy_of_few_is_that_of_any() -> None:
    assert vqa_accuracy("two", ["2"]) == 1.0
    assert vqa_accuracy("3", ["2", "3", "4"]) == 1.0
    assert vqa_accuracy("5", ["2", "3", "4"]) == 0.0
    with pytest.raises(ValueError, match="no answer"):
        vqa_accuracy("5", [])


ANSWERS = ["red", "a dog", "blue cat", "green", "a cat", "dog on the grass"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*ANSWERS, "what is it ?"], vocab_size=80, min_frequency=1)


@pytest.fixture(scope="module")
def vqa(tokenizer: Tokenizer) -> Vqa:
    torch.manual_seed(0)
    vision = VisionConfig(
        image_size_px=16, patch_size_px=8, width=16, num_layers=1, num_heads=2, init_std=0.3
    )
    text = MedConfig(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, ffn_width=16,
        max_positions=20, context_width=16, init_std=0.3,
    )  # fmt: skip
    return Vqa(VqaConfig.from_text(vision, text, tokenizer.special)).eval()


def sample(key: str, *questions: dict) -> Sample:
    data = io.BytesIO()
    Image.new("RGB", (9, 9), (len(key) * 40, 9, 0)).save(data, "PNG")
    return Sample(key, data.getvalue(), meta={"qa": list(questions)})


def test_every_question_is_answered_and_judged(vqa: Vqa, tokenizer: Tokenizer) -> None:
    samples = [
        sample("a", {"question": "what?", "question_id": 1, "answers": ["red"] * 10}),
        sample(
            "bb",
            {"question": "Is (it)?", "question_id": 2, "answer": "red"},
            {"question": "what is it?", "question_id": 3},
        ),
        sample("ccc", {"question": "it", "question_id": 4, "answers": ["blue"] * 10}),
    ]
    sizes = []

    def red(context: Context) -> list[Answer]:
        sizes.append(context.num_images)
        return [Answer("Red", -1.0, 1.0)] * context.num_images

    report = evaluate_vqa(vqa, tokenizer, samples, answer=red, batch_size=2)
    assert sizes == [3, 1]
    assert [one.accuracy for one in report.answers] == [1.0, 1.0, None, 0.0]
    assert report.accuracy == pytest.approx(200 / 3)
    assert report.num_judged == 3
    assert [one.question for one in report.answers][1] == "is it?"
    assert report.predictions() == [{"question_id": n, "answer": "Red"} for n in (1, 2, 3, 4)]
    nameless = evaluate_vqa(vqa, tokenizer, [sample("a", {"question": "it"})], answer=red)
    assert nameless.accuracy is None
    with pytest.raises(ValueError, match="1 questions have no question_id"):
        nameless.predictions()
    dark = Sample("dark", b"x", meta={"question": "it"})
    with pytest.raises(ValueError, match="sample dark is unusable: not_an_image"):
        evaluate_vqa(vqa, tokenizer, [dark], answer=red)
    with pytest.raises(ValueError, match="sample a is unusable: no_question"):
        evaluate_vqa(vqa, tokenizer, [sample("a", {"answer": "x"})], answer=red)


@torch.no_grad()
def test_a_batch_answers_as_each_question_alone(vqa: Vqa, tokenizer: Tokenizer) -> None:
    samples = [
        sample("a", {"question": "what?"}),
        sample("bb", {"question": "is it a red dog on the grass?"}, {"question": "it"}),
    ]
    candidates = Candidates.of(ANSWERS, tokenizer)
    for shortlist in (2, 100):
        choose = partial(rank_answers, vqa, candidates=candidates, shortlist=shortlist)
        together = evaluate_vqa(vqa, tokenizer, samples, answer=choose)
        alone = evaluate_vqa(vqa, tokenizer, samples, answer=choose, batch_size=1)
        assert [a.answer for a in together.answers] == [a.answer for a in alone.answers]
    with pytest.raises(ValueError, match="no candidate"):
        Candidates.of([], tokenizer)


def test_ranking_in_parts_is_ranking(
    vqa: Vqa, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = Candidates.of(ANSWERS, tokenizer)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    context = encode_questions(vqa, tokenizer, images, [["what?", "is it red?"], ["it"]])
    whole = rank_answers(vqa, context, candidates, shortlist=4)
    monkeypatch.setattr("openblip.answering.RANKED_ROWS", 8)
    parts = rank_answers(vqa, context, candidates, shortlist=4)
    assert [one.text for one in parts] == [one.text for one in whole]
    for one, other in zip(parts, whole, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5)
    with pytest.raises(ValueError, match="1 lists of questions for 2 images"):
        encode_questions(vqa, tokenizer, images, [["it"]])
    with pytest.raises(ValueError, match="no question"):
        encode_questions(vqa, tokenizer, images, [[], []])


def test_a_written_answer_has_its_own_log_probability(vqa: Vqa, tokenizer: Tokenizer) -> None:
    image = sample("a").image_bytes
    engine = Engine.plain(vqa, tokenizer)
    [[first, second], none, [third]] = engine.ask(
        [image] * 3, [["what is it?", "what is (it)?"], [], ["what is it?"]]
    )
    assert none == []
    assert third.text == first.text
    assert first == second
    assert first.log_probability < 0
