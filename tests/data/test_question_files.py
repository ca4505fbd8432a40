"""Public question files become data."""

import json
from pathlib import Path

import pytest

from openblip.data.question_files import (
    read_blip_questions,
    read_visual_genome,
    read_vqa2,
    write_questions,
)
from openblip.data.questions import read_questions
from openblip.data.sources import read_samples


def asked(path: Path) -> dict[str, list]:
    """Return what a written file holds, by key; images that are absent are passed over."""
    return {
        sample.key: [made[1] for made in read_questions(sample, 50)]
        for sample in read_samples(path, on_bad=lambda key, reason: None)
    }


def save(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_vqa2(tmp_path: Path) -> None:
    questions = save(
        tmp_path / "q.json",
        {"data_subtype": "val2014", "questions": [
            {"image_id": 42, "question": "What is it?", "question_id": 420},
            {"image_id": 7, "question": "How many?", "question_id": 70},
            {"image_id": 42, "question": "Where?", "question_id": 421},
        ]},
    )  # fmt: skip
    people = ["dog"] * 7 + ["cat"] * 3
    annotations = save(
        tmp_path / "a.json",
        {"annotations": [
            {"question_id": number, "answers": [
                {"answer": text, "answer_id": i} for i, text in enumerate(people)
            ]} for number in (420, 421, 70)
        ]},
    )  # fmt: skip
    images = tmp_path / "coco"
    (images / "val2014").mkdir(parents=True)
    (images / "val2014" / "COCO_val2014_000000000042.jpg").write_bytes(b"x")
    out = tmp_path / "new" / "vqa.jsonl"
    written = write_questions(read_vqa2(questions, annotations), images, out)
    assert (written.num_images, written.num_questions, written.num_missing) == (2, 3, 1)
    found = asked(out)
    assert list(found) == ["COCO_val2014_000000000042"]
    first, second = found["COCO_val2014_000000000042"]
    assert (first.text, first.question_id, second.question_id) == ("what is it?", 420, 421)
    assert first.references == tuple(people)
    assert first.weights == (0.7, 0.3)
    write_questions(read_vqa2(questions, None), images, out)
    assert asked(out)["COCO_val2014_000000000042"][0].references == ()
    save(tmp_path / "a.json", {"annotations": []})
    with pytest.raises(ValueError, match=r"no questions and annotations of VQA v2: KeyError\(420"):
        read_vqa2(questions, annotations)


def test_visual_genome(tmp_path: Path) -> None:
    path = save(
        tmp_path / "qa.json",
        [{"id": 9, "qas": [{"qa_id": 3, "question": "Where?", "answer": "On the Grass."}]},
         {"id": 10, "qas": []}],
    )  # fmt: skip
    (tmp_path / "VG_100K_2").mkdir()
    (tmp_path / "VG_100K_2" / "9.jpg").write_bytes(b"x")
    out = tmp_path / "vg.jsonl"
    assert write_questions(read_visual_genome(path), tmp_path, out).num_missing == 0
    [question] = asked(out)["9"]
    assert (question.answers, question.weights) == (("on the grass",), (0.2,))
    with pytest.raises(ValueError, match="no file of Visual Genome's kind"):
        read_visual_genome(save(path, {"questions": []}))


def test_the_lists_of_the_released_code(reference: Path, tmp_path: Path) -> None:
    facts = json.loads((reference / "datasets.json").read_text())["vqa_dataset_train"]
    rows = read_blip_questions(save(tmp_path / "list.json", facts["annotation"]))
    for row in facts["annotation"]:
        image = tmp_path / row["image"]
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(b"x")
    out = tmp_path / "data.jsonl"
    write_questions(rows, tmp_path, out)
    found = [question for several in asked(out).values() for question in several]
    items = facts["items_(question,answers,weights)"]
    for question, (text, answers, weights) in zip(found, items, strict=True):
        assert (question.text, list(question.answers)) == (text, answers)
        assert question.weights == pytest.approx(weights)
    with pytest.raises(ValueError, match="no list of questions"):
        read_blip_questions(save(tmp_path / "list.json", [{"image": "a"}]))
