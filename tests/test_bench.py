"""What `openblip bench` says it measured is what it measured."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from openblip import bench
from openblip.bench import Row, Work, measure, product_rates, ratio_of, works
from openblip.bench_chart import ratio_chart
from openblip.bench_peer import Peer, check_equal
from openblip.inference import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*bench.random_model("tiny", 32), dtype="float32")


def rows_of(ours: list[Work], theirs: dict, deadline: float) -> Iterator[Row]:
    return measure(ours, theirs, "float32", rounds=3, deadline=deadline, on_row=lambda name: None)


def test_a_ratio_is_the_median_of_neighbours() -> None:
    assert ratio_of([1.0, 2.0, 4.0], [2.0, 2.0, 40.0]) == 2.0
    assert ratio_of([1.0], []) is None


def test_runs_alternate_and_a_first_short_one_does_not_count() -> None:
    calls: list[str] = []

    def ours() -> None:
        calls.append("ours")
        time.sleep(0.01)

    def theirs() -> None:
        calls.append("theirs")
        time.sleep(0.03)

    [row] = rows_of([Work("a", "pairs", 5, ours)], {"a": theirs}, time.monotonic() + 60)
    assert calls == ["ours", "theirs"] * 4
    assert row.rounds == 3
    assert row.ratio == pytest.approx(3, rel=0.5)
    assert row.per_second == 5 / row.seconds
    [late] = rows_of([Work("a", "pairs", 5, ours)], {}, time.monotonic() - 1)
    assert (late.rounds, late.seconds, late.ratio) == (0, None, None)
    assert len(calls) == 8


def test_every_work_does_what_its_name_says(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are encoded as often as the work has it, and captions have 20 tokens."""
    counts = {
        "image encoder, batch 8": 8, "caption, batch 1, greedy": 1, "caption, batch 1, beam 3": 1,
        "caption, batch 8, greedy": 8, "caption, batch 8, beam 3": 8,
        "ITM, 1 image x 128 texts, image to encode": 1,
        "ITM, 1 image x 128 texts, states at hand": 0,
        "ITM, 1 image x 8 texts, encoded again for every text": 1, "ITC, 128 texts": 0,
        "CapFilt, batch 8, an image encoder each": 16, "CapFilt, batch 8, one image encoder": 8,
    }  # fmt: skip
    encoded: list[int] = []
    encode = engine.backend.encode_images

    def counted(images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return encode(images)

    several = works(engine, engine)
    monkeypatch.setattr(engine.backend, "encode_images", counted)
    assert [work.name for work in several] == list(counts)
    for work in several:
        encoded.clear()
        work.run()
        assert sum(encoded) == counts[work.name], work.name
    for num_beams in (1, 3):
        [[caption]] = engine.caption(
            bench.random_images(1, 32), decoding=bench.decoding_of(num_beams)
        )
        assert len(caption.token_log_probabilities) == bench.NEW_TOKENS


def test_the_peer_does_equal_work_or_is_refused(engine: Engine) -> None:
    blip, tokenizer = bench.random_model("tiny", 32)
    peer = Peer(blip, tokenizer)
    check_equal(engine, peer)
    assert set(peer.works()) == {work.name for work in works(engine, engine)}
    with torch.no_grad():
        peer.judge.itm_head.bias[1] += 0.5
    with pytest.raises(ValueError, match="match logits differ"):
        check_equal(engine, peer)
    with torch.no_grad():
        peer.captioner.text_decoder.cls.predictions.bias[7] += 100
    with pytest.raises(ValueError, match="captions of 1 beams differ"):
        check_equal(engine, peer)


def test_rates_and_advice() -> None:
    rates = product_rates("int8", 20, 64)
    assert rates["int8"] > 0
    slow_half = {"float32": {"plain": 3e11}, "bfloat16": {"plain": 1e11}, "int8": {"int8": 9e11}}
    [told, hint] = bench.advice(slow_half, "float32")
    assert told.startswith("auto takes float32")
    assert "int8 is faster still" in hint
    [_, warning, _] = bench.advice(slow_half, "bfloat16")
    assert warning.startswith("warning: float32 is faster here than bfloat16")


def test_the_chart_is_a_picture_of_the_ratios() -> None:
    rows = [
        Row("ITC & more", "texts", "float32", 1, 2, 1.0, 2.0, 2.0),
        Row("ITC & more", "texts", "bfloat16", 1, 2, 1.0, 4.0, 4.0),
        Row("left out", "texts", "float32", 1, 0),
    ]
    root = ElementTree.fromstring(ratio_chart(rows))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(r.get("width")) for r in root.iter(f"{space}rect") if r.get("y") != "32"]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    assert "ITC & more" in [text.text for text in root.iter(f"{space}text")]
    with pytest.raises(ValueError, match="nothing to draw"):
        ratio_chart(rows[2:])


def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "openblip", "bench", "--size", "tiny", "--image-size", "32",
            "--dtype", "float32", "--work", "ITC", "--against", "transformers", "--json",
            "--out", tmp_path / "bench.json", "--chart", tmp_path / "bench.svg",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "bench.json").read_text())
    [row] = result["rows"]
    assert row["name"] == "ITC, 128 texts"
    assert row["ratio"] > 0
    assert row["per_second"] == pytest.approx(128 / row["seconds"])
    assert result["limits"]["float32"]["matrix_peak_per_s"] > 0
    assert result["advice"][0].startswith("auto takes")
    ElementTree.parse(tmp_path / "bench.svg")
    wrong = subprocess.run(
        [sys.executable, "-m", "openblip", "bench", "--dtype", "float8"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "float8" in wrong.stderr
