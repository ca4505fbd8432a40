"""Trackers get what the log has; the libraries are stood in for, as they are no dependency."""

import json
import sys
from collections.abc import Generator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from openblip.data.batches import ImageTextBatch
from openblip.data.position import Position
from openblip.training.best import Evaluation, Scores
from openblip.training.loop import StepOutput, TrainingStep, fit
from openblip.training.optim import OptimizerRecipe
from openblip.training.tracking import trackers


@pytest.fixture
def calls() -> list[Any]:
    return []


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    """Put libraries in place that note how they are called."""

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            calls.append(("open", Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("close")

    def init(**options: Any) -> Any:
        calls.append(("init", options["resume"], options["name"], options["id"]))
        return SimpleNamespace(
            define_metric=lambda *names, **options: None,
            log=calls.append,
            finish=lambda: calls.append("finish"),
        )

    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter = Writer  # type: ignore[attr-defined]
    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)


def test_tensorboard_gets_every_measure(libraries: None, calls: list[Any], tmp_path: Path) -> None:
    with trackers(["tensorboard"], tmp_path / "m.log.jsonl", "title", 40) as [tracker]:
        tracker.write(50, {"loss": 1.5, "itc": 0.5})
    assert calls == [
        ("open", "m.log.tensorboard", 40), ("loss", 1.5, 50), ("itc", 0.5, 50), "close",
    ]  # fmt: skip


def test_wandb_knows_a_training_that_goes_on(
    libraries: None, calls: list[Any], tmp_path: Path
) -> None:
    for first_step in (0, 40, 0):
        with trackers(["wandb"], tmp_path / "m.log.jsonl", "title", first_step) as [tracker]:
            tracker.write(50, {"loss": 1.5})
    first, second, anew = calls[0], calls[3], calls[6]
    assert first[:3] == ("init", "allow", "m (title)")
    assert second == first
    assert anew[:3] == first[:3]
    assert anew[3] != first[3]
    assert calls[1:3] == [{"loss": 1.5, "step": 50}, "finish"]


def test_the_library_is_closed_when_the_training_fails(
    libraries: None, calls: list[Any], tmp_path: Path
) -> None:
    def fail() -> None:
        with trackers(["wandb"], tmp_path / "m.log.jsonl", "title", 0):
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        fail()
    assert calls[-1] == "finish"


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_library_that_is_not_there_is_named_with_its_extra(
    name: Any, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    def open_it() -> None:
        with trackers([name], tmp_path / "m.log.jsonl", "title", 0):
            pass

    with pytest.raises(ValueError, match=rf"tracking: {name} is not .*'openblip\[{name}\]'"):
        open_it()


class Constant(TrainingStep):
    """Its loss is that of no data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        return StepOutput(self.weight.square(), {"loss": self.weight.detach() ** 2})

    def after_optimizer_step(self, output: StepOutput) -> None:
        pass


class Batches:
    def __init__(self) -> None:
        self.position = Position()

    def __iter__(self) -> Generator[ImageTextBatch]:
        ids = torch.zeros(1, dtype=torch.long)
        while True:
            yield ImageTextBatch(torch.zeros(1, 3, 2, 2), ids[None], ids[None], ids, ids, ("a",))


def test_a_training_writes_what_its_log_has(
    libraries: None, calls: list[Any], tmp_path: Path
) -> None:
    log = tmp_path / "m.log.jsonl"
    evaluation = Evaluation(5, lambda: Scores({"mean": 2.0}, 2.0), lambda num_steps, scores: None)
    fit(
        Constant(), Batches(), OptimizerRecipe(), num_steps=12, title="t", log_path=log,
        tracking=("wandb",), evaluation=evaluation,
    )  # fmt: skip
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    scores = {"evaluation/mean": 2.0, "evaluation/criterion": 2.0}
    assert len(lines) == 6
    assert calls[1:-1] == [
        {"step": line["step"], **scores} if "evaluation" in line else line for line in lines
    ]
