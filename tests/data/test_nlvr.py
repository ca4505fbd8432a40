"""Rows of sentences about two images: the original's data set, public files, and the stream."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from openblip.data.nlvr import NlvrPair, NlvrStream, read_pair, read_pairs, read_rows
from openblip.data.sources import BadSample
from openblip.images import ImageDecodeError, TrainTransform
from openblip.tokenizer import Tokenizer


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, level, level)).save(path)


def reasons(path: Path) -> list[str]:
    return [pair.reason for pair in read_pairs(path) if isinstance(pair, BadSample)]


def test_draws_of_the_original_data_set(reference: Path, tmp_path: Path) -> None:
    facts = json.loads((reference / "datasets.json").read_text())["nlvr_dataset"]
    # The released code reads one JSON list.
    path = tmp_path / "nlvr_train.json"
    path.write_text(json.dumps(facts["annotation"]))
    pairs = [pair for pair in read_pairs(path) if isinstance(pair, NlvrPair)]
    assert len(pairs) == len(facts["annotation"])
    random.seed(facts["python_random_seed"])
    draws = facts["draws_in_order_index_0_1_2_repeated_4_times"]
    for number, (first, second, sentence, label) in enumerate(draws):
        row = facts["annotation"][number % len(pairs)]
        pair = pairs[number % len(pairs)]
        drawn = pair if random.random() < 0.5 else pair.swapped()
        names = [paths[0].name for paths in drawn.images]
        # Image k of the reference is 10 + k high, and named by k.
        assert [10 + int(name.removesuffix(".jpg")[-2:]) for name in names] == [first[1], second[1]]
        assert drawn.sentence == sentence
        # The original takes every label but "True" for false; we read "true", too.
        assert drawn.label == (row["label"].lower() == "true")
        if row["label"] in {"True", "False"}:
            assert drawn.label == bool(label)


def test_images_of_the_official_files_are_found(tmp_path: Path) -> None:
    rows = [
        {"identifier": "dev-850-0-1", "sentence": "A dog.", "label": "True"},
        {"identifier": "train-17-3-0", "sentence": "A cat.", "label": "False", "directory": 63},
        {"identifier": "test1-1-0-0", "sentence": "Two cats."},
    ]
    (tmp_path / "data").mkdir()
    path = write_rows(tmp_path / "data" / "dev.json", rows)
    for level, name in enumerate(
        ("dev/dev-850-0", "images/train/63/train-17-3", "data/test1/test1-1-0")
    ):
        save(tmp_path / f"{name}-img0.png", level)
        save(tmp_path / f"{name}-img1.png", 100 + level)
    pairs = list(read_pairs(path))
    assert [pair.identifier for pair in pairs] == [row["identifier"] for row in rows]
    assert [pair.label for pair in pairs] == [True, False, None]
    folders = [tmp_path / "dev", tmp_path / "images/train/63", tmp_path / "data/test1"]
    for pair, folder in zip(pairs, folders, strict=True):
        name = pair.identifier.rpartition("-")[0]
        expected = [(folder / f"{name}-img{n}.png").read_bytes() for n in (0, 1)]
        assert list(pair.read_images()) == expected
    (tmp_path / "dev" / "dev-850-0-img1.png").unlink()
    with pytest.raises(ImageDecodeError, match="missing_image"):
        pairs[0].read_images()


def test_the_shared_annotations_are_read(shared: Path, tmp_path: Path) -> None:
    import gzip

    packed = shared / "data" / "nlvr" / "nlvr2-balanced-dev-annotations.jsonl.gz"
    (tmp_path / "dev.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    pairs = list(read_pairs(tmp_path / "dev.jsonl"))
    assert len(pairs) == 2300
    assert not [pair for pair in pairs if isinstance(pair, BadSample)]
    assert {pair.label for pair in pairs} == {True, False}


def test_what_is_wrong_with_a_row_is_its_reason(tmp_path: Path) -> None:
    good = {"sentence": "a cat", "label": True, "images": ["a.png", "b.png"]}
    path = write_rows(tmp_path / "a.jsonl", [
        good, {**good, "label": "maybe"}, {**good, "sentence": " . "},
        {**good, "images": ["a.png"]}, {"sentence": "a cat", "label": True}, "text",
    ])  # fmt: skip
    assert reasons(path) == ["bad_label", "no_sentence", "no_images", "no_images", "bad_json"]
    (tmp_path / "b.jsonl").write_text("{\n")
    assert reasons(tmp_path / "b.jsonl") == ["bad_json"]
    (tmp_path / "c.json").write_text("[1,")
    with pytest.raises(ValueError, match=r"c\.json is no JSON"):
        list(read_rows(tmp_path / "c.json"))
    with pytest.raises(ValueError, match=r"d\.tar: sentences about two images"):
        list(read_rows(tmp_path / "d.tar"))


def test_every_nth_row_is_read(tmp_path: Path) -> None:
    rows = [{"sentence": f"s{n}", "label": True, "images": ["a", "b"]} for n in range(7)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = [read_pair(sample, 40) for sample in read_rows(path, start=2, step=3)]
    assert [pair.sentence for pair in found] == ["s2", "s5"]
    # The same keys as when all are read.
    assert found[0] == list(read_pairs(path))[2]


def test_a_batch_holds_both_orders_and_counts_what_is_bad(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    save(tmp_path / "b.png", 255)
    images = ["a.png", "b.png"]
    path = write_rows(tmp_path / "a.jsonl", [
        {"sentence": "the left is dark", "label": True, "images": images},
        {"sentence": "all dark", "label": False, "images": images},
        {"sentence": "no label", "images": images},
        {"sentence": "gone", "label": True, "images": ["a.png", "c.png"]},
    ])  # fmt: skip
    tokenizer = Tokenizer.train(["the left right is dark all"], vocab_size=60, min_frequency=1)
    stream = NlvrStream(
        [path], tokenizer, TrainTransform(8, 1.0, 0, 0, False),
        batch_size=4, max_tokens=10, seed=0,
    )  # fmt: skip
    batches = iter(stream)
    batch = next(batches)
    assert batch.images.shape == (8, 3, 8, 8)
    first, second = (half.mean(dim=(1, 2, 3)) for half in batch.images.chunk(2))
    sentences = [tokenizer.decode(ids) for ids in batch.token_ids.tolist()]
    found = {
        (sentence, float(a) < float(b), bool(label))
        for sentence, a, b, label in zip(sentences, first, second, batch.labels, strict=True)
    }
    assert found == {
        ("the left is dark", True, True), ("the right is dark", False, True),
        ("all dark", True, False), ("all dark", False, False),
    }  # fmt: skip
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.labels, batch.labels)
    next(batches)
    batches.close()
    assert stream.position.problems["no_label"] >= 1
    assert stream.position.problems["missing_image"] >= 2
    assert stream.count_pairs(100) == (6, False)
