from pathlib import Path

import fsspec
import pytest

from openblip.data.samples import Sample
from openblip.data.shards import Shard, expanded
from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_part


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{9..11}.tar", ["9.tar", "10.tar", "11.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("s3://b/{x,y}/{0..1}.tar", [f"s3://b/{d}/{n}.tar" for d in "xy" for n in "01"]),
        ("{alone}.tar", ["{alone}.tar"]),
        ("{7..7}", ["7"]),
    ],
)  # fmt: skip
def test_braces_stand_for_several(address: str, expected: list[str]) -> None:
    assert expanded(address) == expected


def test_a_range_backwards_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\{5\.\.3\} ends before it starts"):
        expanded("{5..3}.tar")


def test_parts_of_an_address() -> None:
    shard = Shard.at("https://host/a/x.json?version=1#val")
    assert (shard.name, shard.stem, shard.suffix) == ("x.json", "x_val", ".json")
    assert str(shard) == "https://host/a/x.json?version=1#val"
    local = Shard.at(Path("a/b.c/x.tar"))
    assert (local.name, local.stem, local.suffix, local.is_remote) == ("x.tar", "x", ".tar", False)


def test_local_braces_name_shards_that_exist(tmp_path: Path) -> None:
    for number in range(3):
        with ShardWriter(tmp_path / f"{number}.tar") as writer:
            writer.write(Sample(f"k{number}", b"x"))
    shards = list_shards(tmp_path / "{0..2}.tar")
    assert [shard.name for shard in shards] == ["0.tar", "1.tar", "2.tar"]
    assert shards == list_shards(tmp_path)
    with pytest.raises(ValueError, match=r"3\.tar is no data set"):
        list_shards(tmp_path / "{0..3}.tar")


def test_a_remote_folder_is_listed_and_read(tmp_path: Path, cache: Path) -> None:
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write(Sample("k", b"x"))
    files = fsspec.filesystem("memory")
    files.pipe("/folder/1.tar", b"never read here")
    files.pipe("/folder/0.tar", (tmp_path / "0.tar").read_bytes())
    shards = list_shards("memory://folder")
    assert [str(shard) for shard in shards] == ["memory://folder/0.tar", "memory://folder/1.tar"]
    assert list(read_part(shards[0])) == [Sample("k", b"x")]
    files.pipe("/lines/0.jsonl", b"never read here")
    files.pipe("/lines/0.captions.jsonl", b"never read here")
    assert [str(shard) for shard in list_shards("memory://lines")] == ["memory://lines/0.jsonl"]
    files.pipe("/empty/readme.txt", b"x")
    with pytest.raises(ValueError, match="memory://empty is no data set"):
        list_shards("memory://empty")


def test_images_of_a_remote_table_lie_beside_it(cache: Path) -> None:
    files = fsspec.filesystem("memory")
    rows = b'{"image": "a b.png"}\n{"image": "memory://else/c.png"}\n{"image": "d"}'
    files.pipe("/table/rows/t.jsonl", rows)
    files.pipe("/table/rows/a b.png", b"image a")
    files.pipe("/else/c.png", b"image c")
    [shard] = list_shards("memory://table/rows/t.jsonl")
    first, second, absent = read_part(shard)
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert (first.image_bytes, second.image_bytes) == (b"image a", b"image c")
    assert absent.reason == "missing_image"
