import base64
import json
import tarfile
from pathlib import Path

import pytest
import webdataset

from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_samples

SAMPLES = [
    Sample("a", b"image a", (Caption("one"), Caption("two", "human")), {"id": 7}),
    Sample(
        "b",
        b"image b",
        (Caption("three", "synthetic", 0.25, drop_reason="unmatched", seed=3),),
        image_extension="png",
    ),
    Sample("c", b"image c"),
]


def write(path: Path) -> Path:
    with ShardWriter(path) as writer:
        for sample in SAMPLES:
            writer.write(sample)
    return path


def read(shard: Path) -> tuple[list[Sample], list[tuple[str, str]]]:
    bad: list[tuple[str, str]] = []
    samples = list(read_samples(shard, on_bad=lambda key, reason: bad.append((key, reason))))
    return samples, bad


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path) -> None:
    samples, bad = read(write(tmp_path / "0.tar"))
    assert samples == SAMPLES
    assert bad == []
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "0.tar").read_bytes() == write(tmp_path / "1.tar").read_bytes()


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    rows = list(webdataset.WebDataset(str(write(tmp_path / "0.tar")), shardshuffle=False))
    assert [row["__key__"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["png"] == b"image b"


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dot"), ShardWriter(tmp_path / "0.tar") as writer:
        writer.write(Sample("a.b", b"x"))
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_gives_what_is_whole_and_says_so(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar")
    shard.write_bytes(shard.read_bytes()[:2600])
    samples, bad = read(shard)
    assert [sample.key for sample in samples] == ["a"]
    assert [reason for _, reason in bad] == ["truncated_tar"]


def test_bad_samples_are_named_and_skipped(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    files = {"a.json": b"{}", "b.jpg": b"x", "b.json": b"{", "c.jpg": b"x", "c.txt": b"a cat\n"}
    with tarfile.open(shard, "w") as tar:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
            tar.add(tmp_path / name, name)
    samples, bad = read(shard)
    assert [(s.key, s.captions) for s in samples] == [("c", (Caption("a cat"),))]
    assert bad == [("a", "missing_image"), ("b", "bad_json")]


def test_a_folder_and_jsonl(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "x.jpg").write_bytes(b"x")
    (folder / "x.txt").write_text("a cat")
    (folder / "y.png").write_bytes(b"y")
    (folder / "y.json").write_text(json.dumps({"caption": "a dog", "url": "u"}))
    samples, bad = read(list_shards(folder)[0])
    assert [(s.key, s.captions[0].text) for s in samples] == [("x", "a cat"), ("y", "a dog")]
    assert samples[1].meta == {"url": "u"}
    assert bad == []

    lines = [
        {"image": "images/x.jpg", "captions": ["a cat", {"text": "b", "source": "human"}]},
        {"image_base64": base64.b64encode(b"z").decode(), "caption": "c", "key": "z"},
        {"image": "images/absent.jpg", "caption": "d"},
        {"caption": "e"},
    ]
    jsonl = tmp_path / "data.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    samples, bad = read(list_shards(jsonl)[0])
    assert [s.image_bytes for s in samples] == [b"x", b"z"]
    assert samples[0].captions == (Caption("a cat"), Caption("b", "human"))
    assert [reason for _, reason in bad] == ["missing_image", "missing_image", "bad_json"]


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no data set"):
        list_shards(tmp_path)
