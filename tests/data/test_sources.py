import base64
import io
import itertools
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet

from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_part, read_samples

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


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with the images a.png and sub/b.png."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "sub" / "b.png").write_bytes(png(2))
    return tmp_path


@pytest.mark.parametrize(("name", "comma"), [("t.csv", ","), ("t.tsv", "\t")])
def test_a_csv_names_images_and_captions(photos: Path, name: str, comma: str) -> None:
    rows = [
        ["image", "caption", "id", "width"],
        ["a.png", '"one, ""so"" it is\nand on"', "7", "4"],
        ["sub/b.png", "two", "", ""],
        ["absent.png", "three", "", ""],
        ["", "four", "9", ""],
    ]
    path = photos / name
    path.write_text("\ufeff" + "".join(comma.join(row) + "\n" for row in rows))
    [shard] = list_shards(path)
    samples, bad = read(shard)
    assert samples == [
        Sample("7", png(1), (Caption('one, "so" it is\nand on'),), {"width": "4"}, "png"),
        Sample("t_00000002", png(2), (Caption("two"),), {}, "png"),
    ]
    assert bad == [("t_00000003", "missing_image"), ("9", "missing_image")]


def test_parquet_as_img2dataset_and_datasets_write_it(photos: Path) -> None:
    img2dataset = pyarrow.table(
        {
            "key": ["0001", "0002", "0003"],
            "url": ["u", "v", "w"],
            "status": ["success", "failed_to_download", "success"],
            "caption": ["one", "two", None],
            "jpg": [b"image one", None, b"image three"],
            "width": [4, None, 5],
        }
    )
    datasets = pyarrow.table(
        {"image": [{"bytes": png(3), "path": "x.png"}, {"bytes": None, "path": "y.png"}],
         "text": ["three", "four"]}
    )  # fmt: skip
    for name, table in (("0.parquet", img2dataset), ("1.parquet", datasets)):
        parquet.write_table(table, photos / name)
    first, second = list_shards(photos)
    samples, bad = read(first)
    assert samples == [
        Sample(
            "0001", b"image one", (Caption("one"),), {"url": "u", "status": "success", "width": 4}
        ),
        Sample("0003", b"image three", (), {"url": "w", "status": "success", "width": 5}),
    ]
    assert bad == [("0002", "not_downloaded")]
    samples, bad = read(second)
    assert samples == [Sample("1_00000001", png(3), (Caption("three"),))]
    assert bad == [("1_00000002", "missing_image")]


def test_an_image_gets_an_extension_that_is_read_back(photos: Path) -> None:
    """A shard that has the image as `x.jfif` or `x.png?size=4` would hold no image."""
    for name in ("a.jfif", "b.png?size=4", "c.PNG", "d"):
        (photos / name).write_bytes(b"x")
    (photos / "t.csv").write_text("image\na.jfif\nb.png?size=4\nc.PNG\nd\n")
    samples, bad = read(photos / "t.csv")
    assert [sample.image_extension for sample in samples] == ["jpg", "jpg", "png", "jpg"]
    assert bad == []


def test_only_rows_of_ours_have_their_meta_unpacked(tmp_path: Path) -> None:
    packed = {"key": "inner", "url": "u"}
    cases: list[tuple[dict[str, object], dict[str, object], str]] = [
        ({"meta": packed}, {"meta": packed}, "jpg"),
        ({"meta": packed, "image_extension": "png"}, packed, "png"),
        ({"meta": json.dumps(packed), "image_extension": "png", "n": 1}, {"n": 1, **packed}, "png"),
        ({"meta": "no json", "image_extension": "png"}, {"meta": "no json"}, "png"),
        ({"meta": "[1]", "image_extension": "png"}, {"meta": "[1]"}, "png"),
        (
            {"meta": packed, "image_extension": ".PNG"},
            {"meta": packed, "image_extension": ".PNG"},
            "jpg",
        ),
    ]
    image = base64.b64encode(b"x").decode()
    rows = [{"key": "k", "image_base64": image, **row} for row, _, _ in cases]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, bad = read(tmp_path / "t.jsonl")
    assert samples == [Sample("k", b"x", (), meta, extension) for _, meta, extension in cases]
    assert bad == []


def test_jsonl_beside_images_are_not_taken_for_the_data(photos: Path, tmp_path: Path) -> None:
    """Without images they are shards; the other kinds come before both."""
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "about it"}\n')
    assert [shard.path for shard in list_shards(photos)] == [photos]
    (photos / "a.png").unlink()
    assert [shard.path for shard in list_shards(photos)] == [photos]
    (photos / "sub" / "b.png").unlink()
    assert [shard.name for shard in list_shards(photos)] == ["metadata.jsonl"]
    write(photos / "t.tar")
    assert [shard.name for shard in list_shards(photos)] == ["t.tar"]


def test_cocos_json_gathers_the_captions_of_an_image(photos: Path) -> None:
    content = {
        "images": [
            {"id": 5, "file_name": "sub/b.png"},
            {"id": 6, "file_name": "absent.png"},
            {"id": 4, "file_name": "a.png"},
        ],
        "annotations": [
            {"id": 1, "image_id": 4, "caption": "one"},
            {"id": 2, "image_id": 5, "caption": "two"},
            {"id": 3, "image_id": 4, "caption": "three"},
        ],
    }
    path = photos / "captions.json"
    path.write_text(json.dumps(content))
    samples, bad = read(list_shards(path)[0])
    assert samples == [
        Sample("5", png(2), (Caption("two"),), {}, "png"),
        Sample("4", png(1), (Caption("one"), Caption("three")), {}, "png"),
    ]
    assert bad == [("6", "missing_image")]
    for wrong in ("[]", "{", '{"images": [{"id": 1}], "annotations": []}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"captions\.json is no annotation file"):
            read(path)


def test_a_broken_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"cannot read shard .*t\.parquet"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_parts_hold_every_entry_once(photos: Path, num_parts: int) -> None:
    """Of any kind, bad ones too; and from any entry on, a part is what it is read whole."""
    write(photos / "t.tar")
    (photos / "t.csv").write_text("image,caption\n" + "a.png,x\nabsent.png,y\nsub/b.png,z\n" * 3)
    lines = [{"image": "a.png", "caption": "x"}, {"caption": "y"}, {"image": "sub/b.png"}]
    (photos / "t.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines * 2))
    (photos / "t.json").write_text(json.dumps(lines * 2))
    rows = {"jpg": [b"1", None, b"3", b"4"] * 3, "caption": ["a", "b", "c", "d"] * 3}
    parquet.write_table(pyarrow.table(rows), photos / "t.parquet", row_group_size=5)
    kinds = ("tar", "csv", "jsonl", "parquet", "json")
    for shard in (photos, *(photos / f"t.{kind}" for kind in kinds)):
        whole = list(read_part(shard))
        assert len(whole) >= 2
        parts = [list(read_part(shard, part, num_parts)) for part in range(num_parts)]
        assert sorted(map(repr, itertools.chain(*parts))) == sorted(map(repr, whole))
        for part, entries in enumerate(parts):
            for first in range(len(entries) + 2):
                assert list(read_part(shard, part, num_parts, first=first)) == entries[first:]
