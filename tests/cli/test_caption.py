"""`openblip caption` into files: whole or going on, with captions beside the images."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from openblip import cli
from openblip.data.caption_rows import CaptionRows, check_sidecars_differ
from openblip.data.sources import list_shards, read_samples


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """Return a folder of five images and a file that is none, in the middle."""
    folder = tmp_path / "photos"
    folder.mkdir()
    [shard] = list_shards(world / "human")
    samples = list(read_samples(shard, on_bad=lambda key, reason: None))[:5]
    for name, sample in zip("abdef", samples, strict=True):
        (folder / f"{name}.jpg").write_bytes(sample.image_bytes)
    (folder / "c.jpg").write_bytes(b"no image")
    return folder


def arguments(photos: Path, model: Path, *more: object) -> list[str]:
    common = ["--model", model, "--max-tokens", 8, "--batch-size", 2, "--method", "nucleus"]
    return [str(part) for part in ("caption", photos, *common, *more)]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_kinds_of_files_hold_the_same(run, model: Path, photos: Path, tmp_path: Path) -> None:
    for kind in ("jsonl", "csv", "parquet"):
        result = run(*arguments(photos, model, "--captions", 2, "--out", tmp_path / f"o.{kind}"))
        assert result.code == 0
        assert result.out == ""
        assert "1 of 6 files were not captioned" in result.err
    rows = rows_of(tmp_path / "o.jsonl")
    good = [row for row in rows if "error" not in row]
    assert [Path(row["path"]).name for row in good] == [f"{n}.jpg" for n in "abdef"]
    assert [row["path"] for row in rows if "error" in row] == [str(photos / "c.jpg")]
    assert all(len(row["captions"]) == 2 for row in good)
    with (tmp_path / "o.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    flat = [(row["path"], one["text"]) for row in good for one in row["captions"]]
    assert [(row["path"], row["caption"]) for row in found] == flat
    table = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert [(row["path"], text) for row in table for text in row["captions"]] == flat
    for name in ("o.csv", "o.parquet"):
        [lost] = rows_of(tmp_path / f"{name}.failed.jsonl")
        assert lost["error"].startswith("not_an_image")
    assert not list(tmp_path.glob(".*"))
    again = run(*arguments(photos, model, "--out", tmp_path / "o.csv"))
    assert again.code == 2
    assert "exists: remove it" in again.err


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*arguments(photos, model, "--out", tmp_path / "whole.jsonl")).code == 0
    append, out = CaptionRows.append, tmp_path / "stopped.jsonl"

    def stop(rows: CaptionRows, batch: list) -> None:
        append(rows, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(CaptionRows, "append", stop)
    partial = tmp_path / ".stopped.jsonl.partial"
    for batches in (1, 2):
        result = run(*arguments(photos, model, "--out", out))
        assert result.code == cli.EXIT_INTERRUPTED
        assert "goes on from there" in result.err
        assert len(partial.read_text().splitlines()) == 1 + batches
        with partial.open("ab") as file:  # a batch that SIGKILL has cut off
            file.write(b'[{"path": "x", "capt')
    monkeypatch.setattr(CaptionRows, "append", append)
    other = run(*arguments(photos, model, "--out", out, "--captions", 3))
    assert other.code == 2
    assert "captions 1, now 3" in other.err
    assert run(*arguments(photos, model, "--out", out)).code == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_a_file_among_the_images_goes_on_as_well(
    run, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run itself wrote, or a killed one left, is no image; images that came are named."""
    more = ("--sidecar", "--skip-existing", "--out")
    (photos / "d.txt").write_text("mine\n")
    assert run(*arguments(photos, model, *more, tmp_path / "whole.csv")).code == 0
    for path in photos.glob("[!d].txt"):
        path.unlink()
    append, out = CaptionRows.append, photos / "a.csv"

    def stop(rows: CaptionRows, batch: list) -> None:
        append(rows, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(CaptionRows, "append", stop)
    assert run(*arguments(photos, model, *more, out)).code == cli.EXIT_INTERRUPTED
    monkeypatch.setattr(CaptionRows, "append", append)
    (photos / ".b.txt.77.tmp").write_text("a half")
    (photos / "b2.jpg").write_bytes((photos / "b.jpg").read_bytes())
    changed = run(*arguments(photos, model, *more, out))
    assert changed.code == 2
    assert "begun with other files" in changed.err
    (photos / "b2.jpg").unlink()
    assert run(*arguments(photos, model, *more, out)).code == 0
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    lost = [
        rows_of(path.with_name(f"{path.name}.failed.jsonl"))
        for path in (out, tmp_path / "whole.csv")
    ]
    assert lost[0] == lost[1]
    assert (photos / "d.txt").read_text() == "mine\n"
    (photos / ".o.jsonl.partial").write_text("")
    damaged = run(*arguments(photos, model, "--out", photos / "o.jsonl"))
    assert damaged.code == 2
    assert ".o.jsonl.partial is damaged" in damaged.err


def test_captions_beside_images(run, model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("mine\n")
    result = run(*arguments(photos, model, "--sidecar", "--skip-existing", "--json"))
    assert result.json["skipped"] == [str(photos / "a.jpg")]
    assert (photos / "a.txt").read_text() == "mine\n"
    for image in result.json["images"]:
        text = Path(image["path"]).with_suffix(".txt").read_text()
        assert text == image["captions"][0]["text"] + "\n"
    assert len(result.json["images"]) == 4
    assert not (photos / "c.txt").exists()
    # What was written is no image that failed, and nothing is left to do.
    again = run(*arguments(photos, model, "--sidecar", "--skip-existing", "--json"))
    assert [one["path"] for one in again.json["failed"]] == [str(photos / "c.jpg")]
    assert again.json["images"] == []
    assert run(*arguments(photos, model, "--sidecar")).code == 0
    assert (photos / "a.txt").read_text() != "mine\n"


def test_what_cannot_be_is_named(run, model: Path, photos: Path, tmp_path: Path) -> None:
    result = run(*arguments(photos, model, "--out", tmp_path / "o.xml"))
    assert result.code == 2
    assert "must end in .jsonl, .csv, .parquet" in result.err
    with pytest.raises(ValueError, match=r"would share .*a\.txt"):
        check_sidecars_differ([Path("x/a.jpg"), Path("x/a.png")])


def test_words_and_flags_when_asked_for(run, model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "c.jpg").unlink()
    plain = run(*arguments(photos, model))
    told = run(*arguments(photos, model, "--words"))
    lines = [line.split("\t") for line in told.out.splitlines()]
    assert ["\t".join(line[:2]) for line in lines] == plain.out.splitlines()
    shown = run(*arguments(photos, model, "--words", "--json")).json["images"]
    bare = run(*arguments(photos, model, "--json")).json["images"]
    for line, image, old in zip(lines, shown, bare, strict=True):
        [caption], [same] = image["captions"], old["captions"]
        assert same == {key: caption[key] for key in ("text", "mean_log_probability")}
        assert " ".join(word["text"] for word in caption["words"]) == caption["text"]
        pairs = [f"{word['text']} {word['probability']:.2f}" for word in caption["words"]]
        assert line[2:] == [" ".join(pairs), " ".join(caption["flags"])]
        # Weights are random, and so are captions.
        assert "low_confidence" in caption["flags"]
    for kind in ("jsonl", "csv", "parquet"):
        assert run(*arguments(photos, model, "--words", "--out", tmp_path / f"o.{kind}")).code == 0
    assert [row["captions"] for row in rows_of(tmp_path / "o.jsonl")] == [
        image["captions"] for image in shown
    ]
    with (tmp_path / "o.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "o.parquet").to_pylist()
    for row, columns, image in zip(found, table, shown, strict=True):
        [caption] = image["captions"]
        assert row["flags"].split() == caption["flags"] == columns["flags"][0]
        assert columns["words"] == [[word["text"] for word in caption["words"]]]
        probabilities = [word["probability"] for word in caption["words"]]
        assert columns["word_probabilities"] == [probabilities]
        assert [float(one) for one in row["word_probabilities"].split()] == pytest.approx(
            probabilities, rel=1e-5
        )
