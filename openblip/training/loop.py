"""The only training loop: forward, backward, optimizer, log."""

import contextlib
import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from openblip.data.batches import Batch
from openblip.data.position import Position
from openblip.training.best import BestSoFar, Evaluation
from openblip.training.curves import write_curves
from openblip.training.distributed import world
from openblip.training.layers import compiled, recomputed
from openblip.training.log import MeasureFile, ProgressLine
from openblip.training.momentum import QueueEntries
from openblip.training.optim import (
    OptimizerRecipe,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)
from openblip.training.parallel import Parallel, replica_of
from openblip.training.precision import MixedPrecision, Precision
from openblip.training.state import TrainingState
from openblip.training.tracking import TrackerName, trackers
from openblip.training.watch import FiniteWatch, StopSignals

LOG_EVERY_STEPS = 10

FLOAT16_ADVICE = (
    "float16 ends at 65,504, which no loss scale changes: bfloat16 and float32 reach further"
)

_log = logging.getLogger(__name__)

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
    parallel: Parallel = "ddp",
    is_compiled: bool = False,
    is_recomputed: bool = False,
    state: TrainingState | None = None,
    evaluation: Evaluation | None = None,
    tracking: Sequence[TrackerName] = (),
) -> None:
    """Train for `num_steps` optimizer steps, logging every tenth and the last to a JSONL file.

    A page with the curves stands beside the log, drawn whenever a state is saved and at the end.

    accumulation_steps  batches whose gradients are averaged for one optimizer step
    parallel            on several ranks: a whole copy on each, or one split over all
    is_compiled         the transformer layers go through torch.compile
    is_recomputed       the transformer layers keep no activations for the backward pass
    state               where the training is saved as it goes; one that was saved goes on, and
                        ends with the weights, the queue and the log of one that never stopped
    evaluation          what the model is measured by as it goes, and at the end
    tracking            where else what is logged goes
    Raises FloatingPointError if a loss or, when a state is to be saved, a weight is not finite,
    naming step, losses, samples and the last good state. A loss is looked at when the next step is
    logged or the next state saved. SIGINT and SIGTERM end the step, save the state, and raise
    KeyboardInterrupt or SystemExit(143).
    """
    ranks = world()
    replica = replica_of(training_step, parallel)
    with (
        compiled(replica.trained) if is_compiled else contextlib.nullcontext(),
        recomputed(replica.trained) if is_recomputed else contextlib.nullcontext(),
    ):
        replica.spread()
        trained = replica.trained.train()
        optimizer = build_optimizer(trained, recipe)
        resumed = state.load(trained, optimizer) if state is not None else None
        first_step = 0
        if resumed is not None:
            first_step, stream.position = resumed.num_steps, resumed.position
            _log.info("%s: goes on after step %d", title, first_step)
        elif ranks.rank:
            torch.manual_seed(torch.initial_seed() + ranks.rank)
        batches = iter(stream)
        device = ranks.device
        mixed = MixedPrecision(precision, device)
        if resumed is not None:
            mixed.restore(resumed.extra["precision"])
        best = BestSoFar(evaluation) if evaluation is not None else None
        if best is not None and resumed is not None and resumed.extra["best"] is not None:
            best.restore(resumed.extra["best"])
        watch = FiniteWatch(device, state, FLOAT16_ADVICE if mixed.is_scaled else "")
        with (
            state or contextlib.nullcontext(),
            ProgressLine(
                title, num_steps, done=first_step, is_silent=not ranks.is_first
            ) as progress,
            MeasureFile(
                log_path if ranks.is_first else None,
                resumed.log_bytes if resumed is not None else 0,
            ) as measures_file,
            trackers(
                tracking if ranks.is_first else (), log_path, title, first_step
            ) as all_trackers,
            StopSignals() as stop,
            contextlib.closing(batches),
        ):

            def evaluate(num_steps: int) -> None:
                assert best is not None
                with replica.whole():
                    scores = best.evaluate(training_step, num_steps)
                measures_file.write({"step": num_steps - 1, "evaluation": scores})
                for tracker in all_trackers:
                    named = {f"evaluation/{name}": value for name, value in scores.items()}
                    tracker.write(num_steps - 1, named)

            note = ""
            for step in range(first_step, num_steps):
                # A state is saved before its model is evaluated: one that goes on begins with that.
                if best is not None and best.is_due(step):
                    evaluate(step)
                lr = learning_rate(recipe, step, num_steps)
                set_learning_rate(optimizer, lr)
                optimizer.zero_grad(set_to_none=True)
                outputs: list[StepOutput] = []
                for number in range(accumulation_steps):
                    batch = next(batches)
                    with replica.averaging(number == accumulation_steps - 1):
                        with mixed.autocast():
                            output: StepOutput = replica(batch.to(device), step)
                        mixed.backward(output.total / accumulation_steps)
                    watch.see(step, output.total, output.measures, batch.keys)
                    outputs.append(output)
                replica.finish_gradients()
                mixed.unscale(optimizer)
                if recipe.max_gradient_norm:
                    replica.clip(recipe.max_gradient_norm)
                mixed.step(optimizer)
                watch.check_scale(mixed.scale)
                output = _mean(outputs)
                trained.after_optimizer_step(output)
                is_last = step == num_steps - 1
                if step % LOG_EVERY_STEPS == 0 or is_last:
                    watch.check()
                    measures = ranks.mean({name: float(v) for name, v in output.measures.items()})
                    measures |= mixed.measures()
                    measures_file.write({"step": step, "lr": lr} | measures)
                    for tracker in all_trackers:
                        tracker.write(step, {"lr": lr} | measures)
                    note = " ".join(f"{name} {value:.3g}" for name, value in measures.items())
                progress.advance(note=note)
                # All ranks stop and save at the same step.
                stop_signal, is_due = ranks.largest(
                    [stop.signal, state is not None and state.is_due(step + 1)]
                )
                if state is not None and not is_last and (stop_signal or is_due):
                    watch.check()
                    watch.check_weights(trained)
                    state.save(
                        step + 1,
                        trained,
                        optimizer,
                        stream.position,
                        measures_file.num_bytes,
                        {
                            "precision": mixed.to_json(),
                            "best": None if best is None else best.to_json(),
                        },
                    )
                    _draw(log_path, title)
                if stop_signal and not is_last:
                    if stop_signal == signal.SIGINT:
                        raise KeyboardInterrupt
                    raise SystemExit(128 + stop_signal)
            if best is not None:
                evaluate(num_steps)
    replica.finish()
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
