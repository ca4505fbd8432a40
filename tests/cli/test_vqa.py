"""The commands about questions: finetune vqa, evaluate vqa, ask, questions."""

import json
from pathlib import Path

import pytest
import torch

from openblip.checkpoint import load_checkpoint, save_checkpoint
from openblip.data.sources import list_shards, read_samples
from openblip.models.vqa import vqa_from_blip


@pytest.fixture(scope="module")
def vqa(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    blip, tokenizer = load_checkpoint(model)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vqa") / "model"
    save_checkpoint(folder, vqa_from_blip(blip).model, tokenizer, "# tiny\n")
    return folder


@pytest.fixture(scope="module")
def asked(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder: four images and their questions as JSONL."""
    folder = tmp_path_factory.mktemp("asked")
    [shard] = list_shards(world / "human")
    rows = []
    for number, sample in enumerate(list(read_samples(shard, on_bad=print))[:4]):
        (folder / f"{number}.jpg").write_bytes(sample.image_bytes)
        qa = [{"question": "What is red?", "question_id": 2 * number, "answers": ["circle"] * 10}]
        qa.append({"question": "Where?", "question_id": 2 * number + 1})
        rows.append({"image": f"{number}.jpg", "qa": qa})
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_asking(run, vqa: Path, asked: Path, model: Path) -> None:
    image = asked / "0.jpg"
    result = run("ask", image, "What is red?", "Where?", "--model", vqa, "--json")
    assert result.code == 0
    assert result.json["image"] == str(image)
    answers = result.json["answers"]
    assert [one["question"] for one in answers] == ["What is red?", "Where?"]
    assert all(one["log_probability"] <= 0 for one in answers)
    lines = run("ask", image, "What is red?", "Where?", "--model", vqa).out.splitlines()
    assert lines == [f"{one['question']}\t{one['answer']}" for one in answers]
    (asked / "answers.txt").write_text("circle\n\nsquare\n")
    (asked / "answers.json").write_text('["circle", "square"]')
    for name in ("answers.txt", "answers.json"):
        result = run("ask", image, "Where?", "--model", vqa, "--answers", asked / name)
        assert result.out.removeprefix("Where?\t").strip() in {"circle", "square"}
    (asked / "answers.json").write_text('{"a": 1}')
    result = run("ask", image, "Where?", "--model", vqa, "--answers", asked / "answers.json")
    assert (result.code, "is no list of answers" in result.err) == (2, True)
    result = run("ask", asked / "asked.jsonl", "Where?", "--model", vqa)
    assert (result.code, "asked.jsonl: not_an_image" in result.err) == (2, True)
    result = run("ask", image, "Where?", "--model", model)
    assert (result.code, "a model for no task, expected vqa" in result.err) == (2, True)


def test_evaluating_and_predictions(run, vqa: Path, asked: Path, tmp_path: Path) -> None:
    (asked / "one.txt").write_text("circle\n")
    out = tmp_path / "new" / "predictions.json"
    arguments = ("evaluate", "vqa", vqa, asked / "asked.jsonl", "--answers", asked / "one.txt")
    result = run(*arguments, "--predictions", out, "--json")
    assert result.json["accuracy"] == 100.0
    assert (result.json["num_questions"], result.json["num_judged"]) == (8, 4)
    assert json.loads(out.read_text()) == [
        {"question_id": number, "answer": "circle"} for number in range(8)
    ]
    assert run(*arguments).out.split()[3] == "100.00"
    written = run("evaluate", "vqa", vqa, asked / "asked.jsonl", "--json")
    assert written.json["num_questions"] == 8
    (asked / "bad.jsonl").write_text('{"image": "0.jpg", "qa": [{"question": 3}]}\n')
    result = run("evaluate", "vqa", vqa, asked / "bad.jsonl")
    assert (result.code, "is unusable: no_question" in result.err) == (2, True)


def test_ranked_answers(run, vqa: Path, asked: Path) -> None:
    image, question = asked / "0.jpg", "What is red?"
    (asked / "some.txt").write_text("circle\nsquare\ncross\ntriangle\n")
    chosen = ["--answers", asked / "some.txt"]
    plain = run("ask", image, question, "--model", vqa, *chosen).out
    lines = run("ask", image, question, "--model", vqa, *chosen, "--top", 3).out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(plain.strip() + "\t")
    told = run("ask", image, question, "--model", vqa, *chosen, "--top", 9, "--json").json
    [row] = told["answers"]
    assert {one["text"] for one in row["ranked"]} == {"circle", "square", "cross", "triangle"}
    assert sum(one["probability"] for one in row["ranked"]) == pytest.approx(1.0)
    assert row["answer"] == row["ranked"][0]["text"]
    assert row["probability"] == row["ranked"][0]["probability"]
    written = run("ask", image, question, "--model", vqa, "--top", 9, "--json").json
    assert 1 <= len(written["answers"][0]["ranked"]) <= 3


def test_training(run, model: Path, asked: Path, tmp_path: Path) -> None:
    (asked / "judged.jsonl").write_text(
        (asked / "asked.jsonl").read_text().replace('"Where?"', '"Where?", "answer": "here"')
    )
    recipe = tmp_path / "vqa.yaml"
    recipe.write_text(
        f"data: [{asked / 'judged.jsonl'}]\ninit: {model}\nnum_steps: 2\nbatch_size: 2\n"
    )
    dry = run("finetune", "vqa", recipe, "--out", tmp_path / "m", "--dry-run", "--json")
    assert dry.json["pairs_per_epoch"] == 8
    result = run("finetune", "vqa", recipe, "--out", tmp_path / "m", "--json")
    assert result.json["roles"] == ["decode", "pair"]
    asking = run("ask", asked / "0.jpg", "Where?", "--model", tmp_path / "m", "--json")
    assert asking.code == 0
    recipe.write_text(f"data: [{asked / 'judged.jsonl'}]\n")
    result = run("finetune", "vqa", recipe, "--out", tmp_path / "n")
    assert (result.code, "expected either init" in result.err) == (2, True)


def test_public_question_files(run, asked: Path, tmp_path: Path) -> None:
    row = {"dataset": "vqa", "image": "0.jpg", "question": "What?", "question_id": 5}
    file = tmp_path / "list.json"
    file.write_text(json.dumps([row | {"answer": ["a", "b"]}]))
    out = tmp_path / "out.jsonl"
    result = run("questions", "blip", file, "--images", asked, "--out", out)
    assert result.out == f"{out}: 1 questions about 1 images\n"
    [sample] = read_samples(out, on_bad=print)
    assert sample.meta["qa"] == [{"question": "What?", "question_id": 5, "answers": ["a", "b"]}]
    arguments = ("questions", "blip", file, "--images", asked, "--out", out)
    result = run(*arguments, "--annotations", file)
    assert (result.code, "--annotations are of vqa2 alone" in result.err) == (2, True)
