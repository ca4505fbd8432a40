"""Data sets far larger than memory: what is held must not grow with them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openblip.data.blocks import BlockReader, BlockSize
from openblip.data.position import Position
from openblip.data.shards import Shard
from openblip.data.sources import kept_texts, list_shards, read_part

MAX_GROWTH_MB = 30
"""Between a file and one that is five times as long; a block of its rows takes less."""

READ_AN_EPOCH = """
import resource, sys
from openblip.data.blocks import BlockReader, BlockSize
from openblip.data.position import Position
from openblip.data.sources import kept_texts, list_shards, read_part

shards, size = list_shards(sys.argv[1]), BlockSize(num_samples=2048)
reader = BlockReader(shards, size, 0, read_part, lambda sample, epoch: kept_texts(sample, 50))
num = 0
for loaded in reader.blocks(Position()):
    num += len(loaded.examples)
    if loaded.behind.next_unit >= reader.num_units and not loaded.behind.units:
        break
print(num, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_rows(path: Path, num: int) -> Path:
    """Write a table of tiny images and captions of a usual length."""
    with path.open("w") as file:
        for number in range(num):
            caption = f"a picture of thing number {number}, which stands on a table in a room"
            row = {"key": f"k{number}", "image_base64": "iVBORw0KGgo=", "caption": caption}
            match path.suffix:
                case ".jsonl":
                    file.write(json.dumps(row) + "\n")
                case ".csv":
                    file.write("" if number else ",".join(row) + "\n")
                    file.write(",".join(json.dumps(value) for value in row.values()) + "\n")
                case _:
                    file.write(("," if number else "[") + json.dumps(row))
        file.write("]" if path.suffix == ".json" else "")
    return path


def new_reader(shards: list[Shard], num_samples: int = 8192) -> BlockReader[str]:
    size = BlockSize(num_samples=num_samples)
    return BlockReader(shards, size, 0, read_part, lambda sample, epoch: kept_texts(sample, 50))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_memory_does_not_grow_with_an_annotation_file(kind: str, tmp_path: Path) -> None:
    held = []
    for num in (40_000, 200_000):
        path = write_rows(tmp_path / f"{num}.{kind}", num)
        command = [sys.executable, "-c", READ_AN_EPOCH, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        num_read, held_mb = map(int, done.stdout.split())
        assert num_read == num
        held.append(held_mb)
    assert held[1] - held[0] < MAX_GROWTH_MB


@pytest.mark.slow
def test_a_hundred_thousand_shards_are_ordered_at_once() -> None:
    start = time.process_time()
    shards = list_shards("http://host/{000000..099999}.tar")
    reader = new_reader(shards)
    assert (len(shards), reader.num_units) == (100_000, 100_000)
    places = {reader._place_of(unit)[0].name for unit in range(0, 100_000, 10)}
    assert len(places) == 10_000
    assert time.process_time() - start < 10


def test_a_part_that_was_read_long_ago_is_gone_on_with_in_the_middle(tmp_path: Path) -> None:
    [shard] = list_shards(write_rows(tmp_path / "x.jsonl", 4000))
    reader = new_reader([shard], num_samples=8)
    behind = Position(units=tuple((unit, 900) for unit in range(4)), next_unit=4, num_units=4)
    loaded = next(reader.blocks(behind))
    assert loaded.block.ranges == tuple((unit, 900, 2) for unit in range(4))
    assert len({placed.key for placed in loaded.examples}) == 8
