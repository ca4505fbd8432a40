import itertools
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openblip.config import Recipe
from openblip.data.batches import ImageTextBatch
from openblip.data.position import Position
from openblip.training.loop import LOG_EVERY_STEPS, StepOutput, TrainingStep, fit
from openblip.training.optim import OptimizerRecipe, learning_rate
from openblip.training.state import SavingRecipe, TrainingState

RECIPE = OptimizerRecipe(lr=0.1, min_lr=0.0, warmup_steps=2, warmup_lr=0.01)


class Line(TrainingStep):
    """Learn the mean of the images; the loss is NaN from step `bad` on."""

    def __init__(self, bad: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 3))
        self.bad = bad
        self.calls: list[tuple[str, int, bool]] = []

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        self.calls.append(("forward", step, self.training))
        total = (self.weight - batch.images.mean()).square().sum()
        if self.bad is not None and step >= self.bad:
            total = total * torch.nan
        return StepOutput(total, {"loss": total.detach(), "half": 0.5})

    def after_optimizer_step(self, output: StepOutput) -> None:
        self.calls.append(("after", len(self.calls) // 2, self.weight.grad is not None))


class Batches:
    """Images of ones and of twos in turn; the position counts them."""

    def __init__(self) -> None:
        self.position = Position()

    def __iter__(self) -> Generator[ImageTextBatch]:
        ids = torch.zeros(2, dtype=torch.long)
        for number in itertools.count(self.position.num_seen):
            images = torch.full((2, 3, 4, 4), 1.0 + number % 2)
            self.position = Position(num_seen=number + 1)
            yield ImageTextBatch(images, ids[:, None], ids[:, None], ids, ids, (f"key{number}",))


def run(step: Line, folder: Path, num_steps: int, recipe: Any = RECIPE, **options: Any) -> list:
    path = folder / "log.jsonl"
    fit(
        step, Batches(), recipe, num_steps=num_steps, title="line", log_path=path, **options
    )  # fmt: skip
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_forward_then_after(tmp_path: Path) -> None:
    step = Line()
    run(step, tmp_path, 3)
    assert step.calls == [
        ("forward", 0, True), ("after", 0, True),
        ("forward", 1, True), ("after", 1, True),
        ("forward", 2, True), ("after", 2, True),
    ]  # fmt: skip
    assert not step.training


def test_it_learns_and_logs_every_tenth_step_and_the_last(tmp_path: Path) -> None:
    lines = run(Line(), tmp_path, 25)
    assert [line["step"] for line in lines] == [0, LOG_EVERY_STEPS, 2 * LOG_EVERY_STEPS, 24]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["half"] == 0.5 for line in lines)
    for line in lines:
        assert line["lr"] == pytest.approx(learning_rate(RECIPE, line["step"], 25))


def test_the_log_starts_anew(tmp_path: Path) -> None:
    run(Line(), tmp_path, 12)
    assert len(run(Line(), tmp_path, 1)) == 1


@pytest.mark.parametrize("bad", [0, 3, 10])
def test_a_loss_that_is_not_finite_stops_at_the_next_logged_step(tmp_path: Path, bad: int) -> None:
    step = Line(bad)
    noticed = -(-bad // LOG_EVERY_STEPS) * LOG_EVERY_STEPS
    with pytest.raises(FloatingPointError, match=rf"step {bad}: .*'loss': nan.*samples: key{bad}$"):
        run(step, tmp_path, 30)
    assert step.calls[-2][:2] == ("forward", noticed)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] == line["loss"] for line in logged)


def test_a_loss_that_is_not_finite_at_the_end_stops_too(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 13"):
        run(Line(13), tmp_path, 15)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path) -> None:
    class Remembers(Line):
        norms: list[float] = []  # noqa: RUF012

        def after_optimizer_step(self, output: StepOutput) -> None:
            assert self.weight.grad is not None
            self.norms.append(self.weight.grad.norm().item())

    for limit, expected in ((0.5, True), (0.0, False)):
        Remembers.norms = []
        recipe = RECIPE.model_copy(update={"max_gradient_norm": limit})
        run(Remembers(), tmp_path, 2, recipe)
        assert (max(Remembers.norms) <= 0.5 + 1e-6) == expected


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    class Root(Line):
        """From the fourth step on, the loss is 0 and its gradient is not a number."""

        def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
            output = super().forward(batch, step)
            if step < 3:
                return output
            total = (self.weight - self.weight.detach()).square().sum().sqrt()
            return StepOutput(total, {"loss": total.detach()})

    saving = SavingRecipe(every_steps=2, every_minutes=0.0)
    state = TrainingState(tmp_path / "m.state", saving, Recipe())
    with pytest.raises(
        FloatingPointError,
        match=r"^step 3: the weight weight is not finite; the last good state is kept: "
        r".*m\.state/step-00000002; samples: key3$",
    ):
        run(Root(), tmp_path, 8, state=state)
    assert [path.name for path in (tmp_path / "m.state").glob("step*")] == ["step-00000002"]


class Overflowing(Line):
    """Its gradient overflows at a loss scale of 2 ** 13 or more; its loss in the step `bad`."""

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        total = (self.weight * 2.0**-115 * 2.0**115).square().sum()
        if self.bad == step:
            total = total * torch.inf
        return StepOutput(total, {"loss": total.detach()})

    def after_optimizer_step(self, output: StepOutput) -> None:
        self.calls.append(("after", 0, False))


def overflowing(bad: int | None = None) -> Overflowing:
    step = Overflowing(bad)
    nn.init.constant_(step.weight, 0.5)
    return step


def test_float16_leaves_out_steps_that_overflow_and_counts_them(tmp_path: Path) -> None:
    step = overflowing()
    lines = run(step, tmp_path, 12, precision="float16")
    first, last = lines[0], lines[-1]
    assert (first["skipped_steps"], first["loss_scale"]) == (1, 2.0**15)
    assert (last["skipped_steps"], last["loss_scale"]) == (4, 2.0**12)
    assert last["loss"] < first["loss"]
    assert len(step.calls) == 12


def test_float16_goes_on_with_its_scale(tmp_path: Path) -> None:
    def train(folder: Path, num_steps: int) -> tuple[Overflowing, list]:
        folder.mkdir(exist_ok=True)
        saving = SavingRecipe(every_steps=1, every_minutes=0.0)
        state = TrainingState(folder / "m.state", saving, Recipe())
        step = overflowing()
        recipe = RECIPE.model_copy(update={"schedule": "constant"})
        return step, run(step, folder, num_steps, recipe, precision="float16", state=state)

    whole, expected = train(tmp_path / "whole", 12)
    train(tmp_path / "part", 3)
    stopped, lines = train(tmp_path / "part", 12)
    assert torch.equal(whole.weight, stopped.weight)
    assert lines[-1] == expected[-1]


def test_float16_tells_a_loss_that_overflows_from_a_gradient(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"step 5: the loss is not finite: .*'loss': inf.*; float16 ends"
    ):
        run(overflowing(5), tmp_path, 30, precision="float16")


def test_gradients_that_always_overflow_stop_float16(tmp_path: Path) -> None:
    class Never(Line):
        def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
            total = (self.weight - self.weight.detach()).square().sum().sqrt()
            return StepOutput(total, {"loss": total.detach()})

    with pytest.raises(FloatingPointError, match="step 16: gradients are not finite at a loss sca"):
        run(Never(), tmp_path, 30, precision="float16")


def test_reduced_precision_is_autocast(tmp_path: Path) -> None:
    class Layer(Line):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
            out = self.layer(batch.images[:, :, 0, 0])
            self.dtype = out.dtype
            return StepOutput(out.float().square().sum(), {})

        def after_optimizer_step(self, output: StepOutput) -> None:
            pass

    for precision, dtype in (
        ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16),
    ):  # fmt: skip
        step = Layer()
        run(step, tmp_path, 1, precision=precision)
        assert step.dtype == dtype
        assert step.layer.weight.dtype == torch.float32


def test_progress_keeps_telling_the_last_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("openblip.training.log.PLAIN_INTERVAL_S", 0.0)
    run(Line(), tmp_path, 12)
    lines = capsys.readouterr().err.splitlines()
    assert all("loss" in line for line in lines[:12])


def test_the_curves_stand_beside_the_log(tmp_path: Path) -> None:
    run(Line(), tmp_path, 25)
    page = (tmp_path / "log.html").read_text()
    assert "<title>line</title>" in page
    for name in ("lr", "loss", "half"):
        assert f"<figcaption>{name}</figcaption>" in page
    assert "half from 0.5 to 0.5" in page
    assert "4 lines of log.jsonl" in page
