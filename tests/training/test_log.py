import json
from pathlib import Path

import pytest

from openblip.training import log
from openblip.training.log import MeasureFile, ProgressLine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_at_intervals_and_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine("training", 100) as progress:
        for _ in range(40):
            clock[0] += 1.0
            progress.advance(note="loss 2")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 15/100 steps, 1.0/s, 85 s left loss 2",
        "training: 30/100 steps, 1.0/s, 70 s left loss 2",
        "training: 40/100 steps, 1.0/s, 60 s left",
    ]


def test_an_unknown_total_has_no_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine("reading", None, unit="images") as progress:
        clock[0] += 4.0
        progress.advance(10)
    assert capsys.readouterr().err == "reading: 10 images, 2.5/s\n"


def test_nothing_done_tells_no_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressLine("training", 100):
        pass
    assert capsys.readouterr().err == "training: 0/100 steps, 0.0/s\n"


def test_a_failure_prints_no_last_line(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError), ProgressLine("training", 100):
        raise KeyError
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True)
    with ProgressLine("training", 3) as progress:
        progress.advance(3, note="loss 2")
    err = capsys.readouterr().err
    assert "3/3" in err
    assert "loss 2" in err


def test_measures_are_one_object_a_line_and_can_be_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with MeasureFile(path) as measures:
        measures.write({"step": 0, "loss": 1.5})
        assert json.loads(path.read_text()) == {"step": 0, "loss": 1.5}
        measures.write({"step": 10, "loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10]
    with MeasureFile(path):
        pass
    assert path.read_text() == ""
