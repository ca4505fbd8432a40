"""The only training loop: forward, backward, optimizer, log."""

import contextlib
import logging
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from openblip.data.batches import Batch
from openblip.data.position import Position
from openblip.training.curves import write_curves
from openblip.training.distributed import world
from openblip.training.log import MeasureFile, ProgressLine
from openblip.training.momentum import QueueEntries
from openblip.training.optim import (
    OptimizerRecipe,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from openblip.training.state import TrainingState

LOG_EVERY_STEPS = 10

_log = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]
B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


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


class TrainingStep(nn.Module, ABC, Generic[B]):
    """A model with its objective: one forward per batch, writes only after the optimizer."""

    @abstractmethod
    def forward(self, batch: B, step: int) -> StepOutput:
        """Compute the losses of a batch. step counts optimizer steps from 0."""

    @abstractmethod
    def after_optimizer_step(self, output: StepOutput) -> None:
        """Write what changes once per step: queue, temperature clamp, momentum twin."""


class BatchStream(Protocol[B_co]):
    """Batches without end, and the position behind the one that was given out last."""

    position: Position

    def __iter__(self) -> Generator[B_co]: ...


def fit(
    training_step: TrainingStep[B],
    stream: BatchStream[B],
    recipe: OptimizerRecipe,
    *,
    num_steps: int,
    title: str,
    log_path: Path,
    precision: Precision = "float32",
    accumulation_steps: int = 1,
    state: TrainingState | None = None,
) -> None:
    """Train for `num_steps` optimizer steps, logging every tenth and the last to a JSONL file.

    A page with the curves stands beside the log, drawn whenever a state is saved and at the end.

    accumulation_steps  batches whose gradients are averaged for one optimizer step
    state               where the training is saved as it goes; one that was saved goes on, and
                        ends with the weights, the queue and the log of one that never stopped
    Raises FloatingPointError if a loss is not finite, noticed at the next logged step or before the
    next state is saved, naming step, losses and samples. SIGINT and SIGTERM end the step, save the
    state, and raise KeyboardInterrupt or SystemExit(143).
    """
    ranks = world()
    model = ranks.wrap(training_step).train()
    optimizer = build_optimizer(training_step, recipe)
    resumed = state.load(training_step, optimizer) if state is not None else None
    first_step = 0
    if resumed is not None:
        first_step, stream.position = resumed.num_steps, resumed.position
        _log.info("%s: goes on after step %d", title, first_step)
    elif ranks.rank:
        torch.manual_seed(torch.initial_seed() + ranks.rank)
    batches = iter(stream)
    device = ranks.device
    autocast = (
        torch.autocast(device.type, torch.bfloat16)
        if precision == "bfloat16"
        else contextlib.nullcontext()
    )
    watch = _FiniteWatch(device)
    with (
        state or contextlib.nullcontext(),
        ProgressLine(title, num_steps, done=first_step, is_silent=not ranks.is_first) as progress,
        MeasureFile(
            log_path if ranks.is_first else None, resumed.log_bytes if resumed is not None else 0
        ) as measures_file,
        _StopSignals() as stop,
        contextlib.closing(batches),
    ):
        note = ""
        for step in range(first_step, num_steps):
            lr = learning_rate(recipe, step, num_steps)
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)
            outputs: list[StepOutput] = []
            for number in range(accumulation_steps):
                batch = next(batches)
                with ranks.averaging(model, number == accumulation_steps - 1):
                    with autocast:
                        output: StepOutput = model(batch.to(device), step)
                    (output.total / accumulation_steps).backward()  # type: ignore[no-untyped-call]
                watch.see(step, output, batch.keys)
                outputs.append(output)
            if recipe.max_gradient_norm:
                nn.utils.clip_grad_norm_(training_step.parameters(), recipe.max_gradient_norm)
            optimizer.step()
            output = _mean(outputs)
            training_step.after_optimizer_step(output)
            is_last = step == num_steps - 1
            if step % LOG_EVERY_STEPS == 0 or is_last:
                watch.check()
                measures = ranks.mean({name: float(v) for name, v in output.measures.items()})
                measures_file.write({"step": step, "lr": lr} | measures)
                note = " ".join(f"{name} {value:.3g}" for name, value in measures.items())
            progress.advance(note=note)
            # All ranks stop and save at the same step.
            stop_signal, is_due = ranks.largest(
                [stop.signal, state is not None and state.is_due(step + 1)]
            )
            if state is not None and not is_last and (stop_signal or is_due):
                watch.check()
                state.save(
                    step + 1, training_step, optimizer, stream.position, measures_file.num_bytes
                )
                _draw(log_path, title)
            if stop_signal and not is_last:
                if stop_signal == signal.SIGINT:
                    raise KeyboardInterrupt
                raise SystemExit(128 + stop_signal)
    _draw(log_path, title)
    training_step.eval()


def _draw(log_path: Path, title: str) -> None:
    if world().is_first:
        write_curves(log_path, log_path.with_suffix(".html"), title)


def _mean(outputs: Sequence[StepOutput]) -> StepOutput:
    """Join what the batches of one optimizer step gave."""
    if len(outputs) == 1:
        return outputs[0]
    return StepOutput(
        total=torch.stack([output.total.detach() for output in outputs]).mean(),
        measures={
            name: sum(output.measures[name] for output in outputs) / len(outputs)
            for name in outputs[0].measures
        },
        entries=tuple(entry for output in outputs for entry in output.entries),
    )


class _FiniteWatch:
    """Sees whether losses are finite without waiting for the device at every step."""

    def __init__(self, device: torch.device) -> None:
        self._is_finite = torch.ones((), dtype=torch.bool, device=device)
        self._seen: list[tuple[int, StepOutput, tuple[str, ...]]] = []

    def see(self, step: int, output: StepOutput, keys: tuple[str, ...]) -> None:
        seen = StepOutput(output.total.detach(), output.measures)
        self._is_finite = self._is_finite & torch.isfinite(seen.total)
        self._seen.append((step, seen, keys))

    def check(self) -> None:
        """Raise FloatingPointError for the first loss since the last check that is not finite."""
        if not self._is_finite:
            for step, output, keys in self._seen:
                if not torch.isfinite(output.total):
                    measures = {name: float(value) for name, value in output.measures.items()}
                    raise FloatingPointError(
                        f"step {step}: the loss is not finite: {measures}; samples: "
                        f"{', '.join(keys)}"
                    )
        self._seen.clear()


class _StopSignals:
    """Remembers SIGINT and SIGTERM until the step is done; a second one acts at once."""

    signal: int = 0

    def __enter__(self) -> "_StopSignals":
        self._before: dict[int, Any] = {}
        # Python hands signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
