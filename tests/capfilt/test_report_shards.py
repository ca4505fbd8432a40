from pathlib import Path

import pytest

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.manifest import Manifest
from openblip.capfilt.report import capfilt_report, write_capfilt_report
from openblip.capfilt.report_shards import NUM_RATE_BINS, throughput
from openblip.data.samples import Caption
from tests.capfilt.judged import write_judged


def write(folder: Path, name: str, kept: int, *, num: int = 10, seconds: float = 2.0) -> Path:
    """Write a shard of which so many web captions are kept."""
    images = [
        JudgedImage(
            str(index),
            (Caption("a", "web", 0.5, drop_reason=None if index < kept else "unmatched"),),
            {},
        )
        for index in range(num)
    ]
    return write_judged(folder, name, images, seconds=seconds)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write seven shards, of which `odd` keeps less, and `slow` took longer."""
    for number in range(5):
        write(tmp_path, f"0000{number}", 8 if number else 9)
    write(tmp_path, "odd", 1)
    return write(tmp_path, "slow", 8, seconds=20.0)


def test_an_odd_shard_stands_out(folder):
    report = write_capfilt_report(folder)
    rates = report["keep_rate_by_shard"]["web"]
    assert rates["num_shards"] == 7
    expected = [0] * NUM_RATE_BINS
    expected[2], expected[16], expected[18] = 1, 5, 1
    assert rates["counts"] == expected
    assert rates["lowest"][0] == {"name": "odd", "keep_rate": 0.1, "kept": 1, "judged": 10}
    names = [one["name"] for one in rates["lowest"]]
    assert names == ["odd", "00001", "00002", "00003", "00004"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>0.10 to 0.15: 1</title>" in page
    assert "web: 7 shards; all captions 71.4 %" in page
    assert "Shards with the lowest keep rates" in page


def test_slow_shards_are_named(folder):
    report = capfilt_report(folder)
    speed = report["throughput"]
    assert speed["num_shards"] == 7
    assert speed["median_images_per_s"] == 5
    assert speed["slowest"][0] == {
        "name": "slow", "images_per_s": 0.5, "num_images": 10, "seconds": 20.0,
    }  # fmt: skip
    assert [one["name"] for one in speed["slowest"][1:]] == ["00000", "00001", "00002", "00003"]
    assert report["seconds"] == 32
    assert [shard["images_per_s"] for shard in report["shards"]] == [5, 5, 5, 5, 5, 5, 0.5]
    assert Manifest.read(folder / "slow.json").seconds["total"] == 20


def test_a_perfect_shard_is_in_the_last_bin(tmp_path):
    rates = capfilt_report(write(tmp_path, "00000", 10))["keep_rate_by_shard"]["web"]
    assert rates["counts"] == [0] * (NUM_RATE_BINS - 1) + [1]


def test_a_few_shards_are_a_table_alone(tmp_path):
    out = write(tmp_path, "00000", 10)
    write_capfilt_report(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "lowest keep rates" not in page
    assert "Slowest shards" not in page
    assert "images per second" in page


def test_shards_without_images_or_time_have_no_speed(tmp_path):
    write(tmp_path, "00000", 0, num=0)
    out = write(tmp_path, "00001", 1, seconds=0.0)
    report = write_capfilt_report(out)
    assert report["throughput"] == {"num_shards": 0, "median_images_per_s": None, "slowest": []}
    assert [shard["images_per_s"] for shard in report["shards"]] == [0, None]
    assert report["keep_rate_by_shard"]["web"]["num_shards"] == 1


def test_a_slow_speed_keeps_its_digits(tmp_path):
    out = write(tmp_path, "00000", 1, num=1, seconds=80.0)
    write_capfilt_report(out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '<td class="number">0.013</td>' in page


def test_a_median_lies_between_two_speeds():
    shards = [
        {"name": name, "images_per_s": speed, "num_images": 1, "seconds": 1 / speed}
        for name, speed in (("a", 1.0), ("b", 4.0))
    ]
    assert throughput(shards)["median_images_per_s"] == 2.5
