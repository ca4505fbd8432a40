"""The only training loop: forward, backward, optimizer, log."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from openblip.data.batches import ImageTextBatch
from openblip.training.log import MeasureFile, ProgressLine
from openblip.training.momentum import QueueEntries
from openblip.training.optim import (
    OptimizerRecipe,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)

LOG_EVERY_STEPS = 10

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class StepOutput:
    """What one forward gives to the loop.

    total      () the weighted sum to differentiate
    measures   scalars worth a line in the log
    entries    features for the queue, once the optimizer has moved; empty where there is no queue
    """

    total: Tensor
    measures: Mapping[str, Tensor | float]
    entries: tuple[QueueEntries, ...] = ()


class TrainingStep(nn.Module, ABC):
    """A model with its objective: one forward per batch, writes only after the optimizer."""

    @abstractmethod
    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        """Compute the losses of a batch. step counts optimizer steps from 0."""

    @abstractmethod
    def after_optimizer_step(self, output: StepOutput) -> None:
        """Write what changes once per step: queue, temperature clamp, momentum twin."""


def fit(
    training_step: TrainingStep,
    batches: Iterator[ImageTextBatch],
    recipe: OptimizerRecipe,
    *,
    num_steps: int,
    title: str,
    log_path: Path,
    precision: Precision = "float32",
) -> None:
    """Train for `num_steps` batches, logging every tenth step and the last to `log_path` (JSONL).

    Raises FloatingPointError if the loss of a logged step is not finite, naming step and losses.
    """
    training_step.train()
    optimizer = build_optimizer(training_step, recipe)
    device = next(training_step.parameters()).device
    autocast = (
        torch.autocast(device.type, torch.bfloat16)
        if precision == "bfloat16"
        else contextlib.nullcontext()
    )
    with ProgressLine(title, num_steps) as progress, MeasureFile(log_path) as measures_file:
        note = ""
        for step in range(num_steps):
            lr = learning_rate(recipe, step, num_steps)
            set_learning_rate(optimizer, lr)
            with autocast:
                output: StepOutput = training_step(next(batches).to(device), step)
            optimizer.zero_grad(set_to_none=True)
            output.total.backward()  # type: ignore[no-untyped-call]
            if recipe.max_gradient_norm:
                nn.utils.clip_grad_norm_(training_step.parameters(), recipe.max_gradient_norm)
            optimizer.step()
            training_step.after_optimizer_step(output)
            if step % LOG_EVERY_STEPS == 0 or step == num_steps - 1:
                measures = {name: float(value) for name, value in output.measures.items()}
                if not torch.isfinite(output.total):
                    raise FloatingPointError(f"step {step}: the loss is not finite: {measures}")
                measures_file.write({"step": step, "lr": lr} | measures)
                note = " ".join(f"{name} {value:.3g}" for name, value in measures.items())
            progress.advance(note=note)
    training_step.eval()
