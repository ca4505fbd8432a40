"""Questions as samples hold them, and the stream of them."""

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from openblip.data.position import Position
from openblip.data.questions import VqaBatch, VqaStream, read_questions
from openblip.data.samples import Sample
from openblip.data.sources import BadSample
from openblip.images import TrainTransform
from openblip.tokenizer import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "?", "dog", "cat", "2"]
TOKENIZER = Tokenizer.from_vocabulary([*WORDS, *(f"w{i}" for i in range(40))])


def image() -> str:
    data = io.BytesIO()
    Image.new("RGB", (9, 9), (200, 10, 10)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def read(meta: dict[str, Any]) -> list[Any]:
    made = read_questions(Sample("k", b"", meta=meta), 50)
    return [one.reason if isinstance(one, BadSample) else one[1] for one in made]


def test_answers_weigh_their_share_unless_weights_are_given() -> None:
    [asked] = read({"question": "What is (it)?", "answers": ["dog", "cat", "dog", "dog "]})
    assert asked.text == "what is it?"
    assert asked.answers == ("dog", "cat")
    assert asked.weights == (0.75, 0.25)
    assert asked.references == ("dog", "cat", "dog", "dog")
    [asked] = read({"question": "it", "answers": ["dog", "cat"], "weights": [0.2, 1]})
    assert asked.weights == (0.2, 1.0)
    [asked] = read({"question": "it", "answer": "dog", "question_id": 7})
    assert (asked.answers, asked.weights, asked.question_id) == (("dog",), (1.0,), 7)
    [asked] = read({"question": "it", "answers": [{"answer": "dog", "answer_id": 1}]})
    assert asked.answers == ("dog",)


def test_an_image_may_have_several_questions_and_some_may_be_bad() -> None:
    good = {"question": "it", "answers": ["dog"]}
    bad = {
        "no_question": [{"answers": ["dog"]}, {"question": "(.)", "answer": "dog"}, 3],
        "bad_answers": [
            {"question": "it", "answers": [3]}, {"question": "it", "answers": {"a": 1}},
            {"question": "it", "answers": ["dog", " "]},
        ],
        "bad_weights": [
            {"question": "it", "answers": ["a", "b"], "weights": [1]},
            {"question": "it", "answers": ["a", "a"], "weights": [1, 1]},
            {"question": "it", "answers": ["a"], "weights": [-1]},
        ],
    }  # fmt: skip
    for reason, rows in bad.items():
        for row in rows:
            found = read({"qa": [good, row, good]})
            assert found[1] == reason, row
            assert found[0] == found[2]
    assert read({"url": "x"}) == ["no_question"]


def test_weights_and_cleaning_are_the_originals(reference: Path, tmp_path: Path) -> None:
    facts = json.loads((reference / "datasets.json").read_text())["vqa_dataset_train"]
    items = facts["items_(question,answers,weights)"]
    for row, (question, answers, weights) in zip(facts["annotation"], items, strict=True):
        more = {"weights": [0.2]} if row["dataset"] == "vg" else {}
        [asked] = read({"question": row["question"], "answer": row["answer"]} | more)
        assert asked.text == question
        assert list(asked.answers) == answers
        assert asked.weights == pytest.approx(weights)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    rows = [
        {"key": f"k{i}", "image_base64": image(),
         "qa": [{"question": f"w{i} w{j}", "answers": ["dog", "cat", "dog"][: j + 1]}
                for j in range(3)]}
        for i in range(12)
    ]  # fmt: skip
    rows.append({"key": "bad", "image_base64": image(), "qa": [{"question": "it"}, {"q": 1}]})
    rows.append({"key": "dark", "image_base64": "AAAA", "question": "it", "answer": "dog"})
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stream(path: Path, **options: Any) -> VqaStream:
    values = {"batch_size": 3, "max_tokens": 9, "max_answer_tokens": 5, "seed": 3} | options
    transform = TrainTransform(8, 0.5, 1, 5, flip=True)
    return VqaStream([path], TOKENIZER, transform, **values)


def same(first: VqaBatch, second: VqaBatch) -> bool:
    return first.keys == second.keys and all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("images", "question_ids", "answer_ids", "weights", "owners")
    )


def test_every_question_comes_once_an_epoch_and_what_is_bad_is_counted(shard: Path) -> None:
    questions = stream(shard)
    assert questions.count_pairs(100) == (37, False)
    with_batches = list(itertools.islice(questions, 12))
    texts = [TOKENIZER.decode(row.tolist()) for batch in with_batches for row in batch.question_ids]
    assert sorted(texts) == sorted(f"w{i} w{j}" for i in range(12) for j in range(3))
    for batch in with_batches:
        assert batch.owners.tolist() == sorted(batch.owners.tolist())
        sums = torch.zeros(3).index_add(0, batch.owners, batch.weights)
        assert sums.tolist() == pytest.approx([1.0] * 3)
    next(iter(questions))
    problems = questions.position.problems
    assert problems["no_answer"] >= 1
    assert problems["no_question"] == problems["no_answer"]
    assert problems["not_an_image"] >= 1


def test_a_stream_goes_on_where_it_was(shard: Path) -> None:
    whole = list(itertools.islice(stream(shard), 30))
    for stop in (1, 11, 13, 29):
        first = stream(shard, num_workers=2)
        taken = list(itertools.islice(first, stop))
        saved = json.loads(json.dumps(first.position.to_json()))
        rest = stream(shard, position=Position.from_json(saved))
        taken += itertools.islice(rest, 30 - stop)
        assert all(map(same, taken, whole))


def test_data_without_a_question_are_told(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text(json.dumps({"image_base64": image(), "caption": "a dog"}) + "\n")
    with pytest.raises(ValueError, match=r"no usable question in .*no_question"):
        next(iter(stream(path)))
