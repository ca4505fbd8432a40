import io
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import webdataset
from PIL import Image
from pyarrow import parquet

from openblip.data import writers
from openblip.data.samples import Caption, Sample
from openblip.data.shards import checksum
from openblip.data.sinks import FOLDER_MARK
from openblip.data.sources import list_shards, read_part, read_samples
from openblip.data.writers import OutputKind, open_writer, output_suffix

KINDS: tuple[OutputKind, ...] = get_args(OutputKind)
FULL = Caption(
    "ein Kätzchen 🐈\u2028auf “Leder”\nund zwei",
    "synthetic",
    match_probability=0.1 + 0.2,
    similarity=-1 / 3,
    mean_log_probability=-1e-300,
    model="abc",
    decoding={"method": "nucleus", "top_p": 0.9, "stop": None, "ids": [1, 2]},
    seed=2**63 - 1,
    filter_model="def",
    drop_reason="unmatched",
    match_probabilities=(0.1, 0.5),
    prompt="a picture of ",
)
ODD_META = {
    "key": "another",
    "id": 7,
    "status": "failed_to_download",
    "image": "absent.jpg",
    "image_base64": "!",
    "image_extension": "gif",
    "jpg": {"bytes": "x"},
    "caption": "of the web",
    "text": ["a", "b"],
    "meta": {"meta": [None, True, {"é": 1.5}]},
    "none": None,
    "cut": "half a character \ud83d",
}


def encoded(kind: str, color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


# In the order of a folder's files.
SAMPLES = [
    Sample("a", encoded("JPEG", 1), (Caption("one"), FULL, Caption("two", "human")), {"id": 7}),
    Sample("b", encoded("PNG", 2), (FULL,), ODD_META, "png"),
    Sample("c", b"no image at all"),
    Sample("d", encoded("WEBP", 3), (Caption("x"), Caption(" ")), {"meta": "x"}, "webp"),
    Sample("sub/ö/é 1", b"", (Caption("two\nlines"),), {"image_extension": None}, "jpeg"),
]


def write(path: Path, kind: OutputKind, samples: Iterable[Sample] = SAMPLES) -> Path:
    with open_writer(path, kind) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def write_into(folder: Path, kind: OutputKind) -> Path:
    return write(folder / f"x{output_suffix(kind)}", kind)


def read(path: Path) -> list[Sample]:
    bad: list[tuple[str, str]] = []
    [shard] = list_shards(path)
    samples = list(read_samples(shard, on_bad=lambda key, reason: bad.append((key, reason))))
    assert bad == []
    return samples


@pytest.mark.parametrize("kind", KINDS)
def test_samples_come_back_as_they_were(tmp_path: Path, kind: OutputKind) -> None:
    path = write_into(tmp_path / "new" / "folder", kind)
    samples = read(path)
    assert samples == SAMPLES
    # Equality takes True for 1, and has no opinion on the order of fields.
    assert [repr(sample) for sample in samples] == [repr(sample) for sample in SAMPLES]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_back_is_written_the_same_again(tmp_path: Path, kind: OutputKind) -> None:
    first = write_into(tmp_path / "1", kind)
    second = write(tmp_path / "2" / first.name, kind, read(first))
    assert checksum(first) == checksum(second)
    names = [sorted(p.relative_to(each) for p in each.rglob("*")) for each in (first, second)]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_parts", [1, 3])
def test_parts_hold_every_sample_once(tmp_path: Path, kind: OutputKind, num_parts: int) -> None:
    path = write_into(tmp_path, kind)
    parts = [list(read_part(path, part, num_parts)) for part in range(num_parts)]
    assert sorted((s for part in parts for s in part), key=lambda s: s.key) == SAMPLES


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_at_all(tmp_path: Path, kind: OutputKind) -> None:
    path = write(tmp_path / f"x{output_suffix(kind)}", kind, [])
    assert path.exists()
    assert list(read_part(path)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_leaves_what_was_there(tmp_path: Path, kind: OutputKind) -> None:
    path = tmp_path / f"x{output_suffix(kind)}"
    for left in ([], [path.name]):
        with pytest.raises(ZeroDivisionError):
            write(path, kind, (replace(s, meta={"n": 1 / (s.key < "c")}) for s in SAMPLES))
        assert [each.name for each in tmp_path.iterdir()] == left
        write(path, kind)
        assert read(path) == SAMPLES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (Sample("a.b", b"x"), "'a.b' must not be empty or contain a dot"),
        (Sample("", b"x"), "'' must not be empty"),
        (Sample("../a", b"x"), "contain a dot"),
        (Sample("k", b"x", meta={"captions": []}), "k: meta must not hold 'captions'"),
        (Sample("k", b"x", meta={"a": b"bytes"}), "k cannot be written: .*bytes"),
        (Sample("k", b"x", image_extension="heic"), "'heic'; it must be one of bmp"),
        (Sample("k" * 300, b"x"), "too long"),
    ],
)
def test_what_would_not_come_back_is_refused(
    tmp_path: Path, kind: OutputKind, sample: Sample, reason: str
) -> None:
    path = tmp_path / f"x{output_suffix(kind)}"
    if len(sample.key) == 300 and kind in ("parquet", "jsonl"):
        assert read(write(path, kind, [sample])) == [sample]
        return
    with pytest.raises(ValueError, match=reason):
        write(path, kind, [SAMPLES[0], sample])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "caption"),
    [
        ("parquet", Caption("a", seed=2**63)),
        ("parquet", Caption("a", model=5)),  # type: ignore[arg-type]
        ("parquet", Caption("a", similarity="high")),  # type: ignore[arg-type]
    ],
)
def test_a_column_of_one_type_holds_no_other(
    tmp_path: Path, kind: OutputKind, caption: Caption
) -> None:
    with pytest.raises(ValueError, match="sample 'k' cannot be written"):
        write(tmp_path / "x.parquet", kind, [SAMPLES[0], Sample("k", b"x", (caption,))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_comes_back_where_it_can(tmp_path: Path, kind: OutputKind) -> None:
    """A column of text holds none; a caption that was cut within an emoji does."""
    cut = Sample("k", b"x", (Caption("a cat \ud83d"),))
    path = tmp_path / f"x{output_suffix(kind)}"
    if kind == "parquet":
        with pytest.raises(ValueError, match=r"sample 'k' cannot be written: .*surrogates"):
            write(path, kind, [cut])
    else:
        assert read(write(path, kind, [cut])) == [cut]


@pytest.mark.parametrize("key", ["/a", "a//b", "a/", "/"])
def test_a_folder_takes_no_key_that_is_no_path(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="cannot be a path in a folder"):
        write(tmp_path / "out" / "x", "files", [Sample(key, b"x")])
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_a_folder_takes_a_key_once(tmp_path: Path) -> None:
    twice = [Sample("a", b"x"), Sample("a/b", b"y"), Sample("a", b"z", (), {}, "png")]
    with pytest.raises(ValueError, match="'a' comes twice"):
        write(tmp_path / "x", "files", twice)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_as_others_read_it(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "files")
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert names == sorted(
        f"{key}.{end}"
        for key, ends in {
            "": [FOLDER_MARK[1:]],
            "a": ["jpg", "json", "txt"],
            "b": ["png", "json"],  # it keeps no caption
            "c": ["jpg", "json"],
            "d": ["webp", "json", "txt"],
            "sub/ö/é 1": ["jpeg", "json", "txt"],
        }.items()
        for end in ends
    )
    assert (path / "a.txt").read_text() == "one\ntwo\n"
    assert (path / "sub/ö/é 1.txt").read_text() == "two lines\n"
    a = json.loads((path / "a.json").read_text())
    assert a == {"captions": [c.to_json() for c in SAMPLES[0].captions], "id": 7}


def test_a_table_as_others_read_it(tmp_path: Path) -> None:
    table = parquet.read_table(write(tmp_path / "x.parquet", "parquet"))
    assert table.column_names == ["key", "image", "image_extension", "captions", "meta"]
    assert {f.name for f in table.schema.field("captions").type.value_type} == {
        f.name for f in fields(Caption)
    }
    first = table.slice(0, 1).to_pylist()[0]
    assert first["image"] == {"bytes": SAMPLES[0].image_bytes, "path": "a.jpg"}
    assert [caption["text"] for caption in first["captions"]] == ["one", FULL.text, "two"]
    assert json.loads(first["meta"]) == {"id": 7}
    described = json.loads(table.schema.metadata[b"huggingface"])
    assert described["info"]["features"] == {"image": {"_type": "Image"}}


def test_a_table_that_others_wrote_anew_is_still_read(tmp_path: Path) -> None:
    """As pandas does after a selection: without the schema's metadata, with columns of its own."""
    table = parquet.read_table(write(tmp_path / "x.parquet", "parquet"))
    table = table.replace_schema_metadata(None).append_column("score", [[1, 2, 3, 4, 5]])
    parquet.write_table(table.slice(1), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [
        replace(sample, meta={"score": number, **sample.meta})
        for number, sample in enumerate(SAMPLES[1:], start=2)
    ]


def test_lines_as_others_read_them(tmp_path: Path) -> None:
    lines = write(tmp_path / "x.jsonl", "jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    assert list(rows[0]) == ["key", "image_extension", "captions", "meta", "image_base64"]
    assert [row["key"] for row in rows] == [sample.key for sample in SAMPLES]
    assert "Kätzchen 🐈".encode() in lines[0]


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", "tar", SAMPLES[:3])
    rows = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [row["__key__"] for row in rows] == ["a", "b", "c"]


def test_groups_of_rows_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Sample(f"{n:04}", bytes(1000), (Caption(str(n)),)) for n in range(600)]

    def group_sizes() -> list[int]:
        path = write(tmp_path / "x.parquet", "parquet", many)
        assert read(path) == many
        facts = parquet.read_metadata(path)
        return [facts.row_group(n).num_rows for n in range(facts.num_row_groups)]

    assert group_sizes() == [256, 256, 88]
    monkeypatch.setattr(writers, "BYTES_PER_GROUP", 100_000)
    assert group_sizes() == [100] * 6


def test_a_folder_of_an_earlier_run_is_replaced_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "files")
    write(path, "files", [Sample("new", b"x")])
    assert read(path) == [Sample("new", b"x")]
    assert not (path / "sub").exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["photos", "file", "link"])
def test_what_openblip_did_not_write_is_not_replaced(tmp_path: Path, what: str) -> None:
    own = write(tmp_path / "own", "files")
    path = tmp_path / "x"
    if what == "photos":
        path.mkdir()
        (path / "a.jpg").write_bytes(b"mine")
    elif what == "file":
        path.write_bytes(b"mine")
    else:
        path.symlink_to(own)
    with pytest.raises(ValueError, match="x exists and openblip did not write it"):
        write(path, "files")
    if what == "photos":
        assert (path / "a.jpg").read_bytes() == b"mine"
    assert read(own) == SAMPLES
    assert sorted(tmp_path.iterdir()) == [own, path]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert read(write(tmp_path / "x", "files")) == SAMPLES


KILLED = """
import os, signal, sys
from pathlib import Path
from openblip.data.samples import Sample
from openblip.data.writers import open_writer
with open_writer(Path(sys.argv[1]), sys.argv[2]) as writer:
    for number in range(300):
        writer.write(Sample(f"new{number}", b"x"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_writer_leaves_what_was_there(tmp_path: Path, kind: OutputKind) -> None:
    out = tmp_path / "out"
    path = write_into(out, kind)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert killed.returncode == -9
    assert len(list(out.iterdir())) == 2
    assert read(path) == SAMPLES
    # The folder around it is read without what the killed writer left.
    prefix = "x/" if kind == "files" else ""
    assert read(out) == [replace(sample, key=prefix + sample.key) for sample in SAMPLES]


FULL_DISK = """
import random, resource, sys
from pathlib import Path
from openblip.data.samples import Sample
from openblip.data.writers import open_writer
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with open_writer(Path(sys.argv[1]), sys.argv[2]) as writer:
        for number in range(5):
            writer.write(Sample(f"new{number}", random.randbytes(2 << 20)))
except OSError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_grow_leaves_what_was_there(tmp_path: Path, kind: OutputKind) -> None:
    path = write_into(tmp_path, kind)
    command = [sys.executable, "-c", FULL_DISK, str(path), kind]
    failed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "File too large" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == [path]
    assert read(path) == SAMPLES


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_folder_is_a_data_set(tmp_path: Path, kind: OutputKind) -> None:
    """As CapFilt writes it: beside each shard its judged captions and its manifest."""
    suffix = output_suffix(kind)
    for name, sample in (("x", SAMPLES[0]), ("y", SAMPLES[1])):
        (tmp_path / f"{name}.json").write_text('{"shard": "x", "captions": 5}')
        line = {"key": "k", "captions": ["judged"], "meta": {}}
        (tmp_path / f"{name}.captions.jsonl").write_text(json.dumps(line) + "\n")
        write(tmp_path / f"{name}{suffix}", kind, [sample])
    (tmp_path / "report.json").write_text("[]")
    (tmp_path / "model.log.jsonl").write_text("{}\n")
    shards = list_shards(tmp_path)
    bad: list[str] = []
    found = [s for shard in shards for s in read_samples(shard, on_bad=lambda *b: bad.append(b))]
    assert bad == []
    if kind == "files":
        assert found == [replace(SAMPLES[0], key="x/a"), replace(SAMPLES[1], key="y/b")]
    else:
        assert [shard.name for shard in shards] == [f"x{suffix}", f"y{suffix}"]
        assert found == SAMPLES[:2]


def test_an_output_folder_without_a_shard_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.captions.jsonl").write_text("{}\n")
    (tmp_path / "o.csv.failed.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"is no data set: .*\.jsonl files, or a folder of images"):
        list_shards(tmp_path)
