"""Commands that need no training: classify, evaluate classification, evaluate video."""

import json
from pathlib import Path

import pytest

from openblip.data.sources import list_shards, read_samples


@pytest.fixture
def classes(world: Path, tmp_path: Path) -> Path:
    """Return a folder of two classes, the images drawn from the world."""
    [shard] = list_shards(world / "human")
    samples = list(read_samples(shard, on_bad=lambda key, reason: None))[:4]
    for number, sample in enumerate(samples):
        folder = tmp_path / "classes" / ("red_circle" if number % 2 else "n01440764")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(sample.image_bytes)
    return tmp_path / "classes"


def test_classify(run, model: Path, classes: Path, tmp_path: Path) -> None:
    labels = ["red circle", "blue square", "green cross"]
    (classes / "notes.txt").write_text("no image")
    result = run("classify", classes, "--labels", ",".join(labels), "--model", model, "--json")
    assert result.code == 0
    assert len(result.json["images"]) == 4
    assert [one["path"] for one in result.json["failed"]] == [str(classes / "notes.txt")]
    for image in result.json["images"]:
        assert {guess["label"] for guess in image["labels"]} == set(labels)
        assert sum(guess["probability"] for guess in image["labels"]) == pytest.approx(1.0)
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n")
    again = run(
        "classify", classes, "--labels", tmp_path / "labels.txt", "--model", model, "--top", 1
    )
    assert [line.split("\t")[:2] for line in again.out.splitlines()] == [
        [image["path"], image["labels"][0]["label"]] for image in result.json["images"]
    ]
    (tmp_path / "templates.txt").write_text("{}\n\nnothing but {}\n")
    other = run(
        "classify", classes, "--labels", ",".join(labels), "--model", model, "--json",
        "--templates", tmp_path / "templates.txt",
    )  # fmt: skip
    assert other.json["images"] != result.json["images"]


def test_classify_by_itm_with_a_file_of_labels(
    run, model: Path, classes: Path, tmp_path: Path
) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("red circle\n\nblue square\ngreen cross\n")
    options = ["classify", classes, "--model", model, "--json", "--labels-file", file]
    itc = run(*options).json["images"]
    for score in ("itm", "both"):
        images = run(*options, "--score", score).json["images"]
        for image, plain in zip(images, itc, strict=True):
            assert sum(one["probability"] for one in image["labels"]) == pytest.approx(1.0)
            assert all(0 < one["match_probability"] < 1 for one in image["labels"])
            assert all(one["match_probability"] is None for one in plain["labels"])
            if score == "itm":
                matches = [one["match_probability"] for one in image["labels"]]
                assert matches == sorted(matches, reverse=True)
    even = run(*options, "--temperature", 1e6).json["images"]
    assert even[0]["labels"][0]["probability"] == pytest.approx(1 / 3, abs=1e-3)
    for wrong in ([], ["--labels", "a,b", "--labels-file", file]):
        result = run("classify", classes, "--model", model, *wrong)
        assert (result.code, "either by --labels or by" in result.err) == (2, True)


def test_evaluate_classification_says_how_far_shares_can_be_trusted(
    run, model: Path, classes: Path
) -> None:
    for score in ("itc", "both"):
        report = run("evaluate", "classification", model, classes, "--score", score, "--json").json
        assert report["score"] == score
        assert 0 <= report["ece"] <= 1
        text = run("evaluate", "classification", model, classes, "--score", score).out
        assert f"with temperature {report['temperature']:g}" in text
        assert f"{report['ece_calibrated']:.4f}" in text


def test_evaluate_classification(run, model: Path, classes: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"n01440764": "tench", "red_circle": "red circle"}))
    result = run("evaluate", "classification", model, classes, "--names", names, "--json")
    assert result.code == 0
    assert (result.json["num_images"], result.json["num_classes"]) == (4, 2)
    assert result.json["top_5"] == 100.0
    assert result.json["top_1_by_class"].keys() == {"tench", "red circle"}
    text = run("evaluate", "classification", model, classes, "--names", names).out
    assert f"{result.json['top_1']:.2f}" in text
    names.write_text('["tench"]')
    refused = run("evaluate", "classification", model, classes, "--names", names)
    assert refused.code == 2
    assert "must hold an object" in refused.err
    assert "is no folder" in run("evaluate", "classification", model, names).err
    empty = run("classify", classes, "--labels", " , ", "--model", model)
    assert empty.code == 2
    assert "0 labels" in empty.err


def test_evaluate_video(run, model: Path, world: Path, tmp_path: Path) -> None:
    [shard] = list_shards(world / "human")
    samples = list(read_samples(shard, on_bad=lambda key, reason: None))[:6]
    rows = []
    for number, sample in enumerate(samples):
        folder = tmp_path / "videos" / f"video{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(sample.image_bytes)
        rows.append({"clip_name": folder.name, "caption": sample.captions[0].text})
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("evaluate", "video", model, tmp_path / "videos", "--texts", texts)
    result = run(*arguments, "--frames", 2, "--shortlist", 2, "--json")
    assert result.code == 0
    assert (result.json["num_videos"], result.json["num_texts"]) == (3, 6)
    assert result.json["itc"]["ir_at_5"] == 100.0
    text = run(*arguments, "--frames", 2, "--shortlist", 2).out
    assert f"{result.json['reranked']['ir_at_1']:.2f}" in text
    assert "3 videos of 2 frames" in text
    texts.write_text('{"clip_name": "video9", "caption": "a"}\n')
    refused = run(*arguments)
    assert refused.code == 2
    assert "holds no video video9" in refused.err
