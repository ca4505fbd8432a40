"""What a training would cost, from a few steps of it: nothing is kept, nothing is written."""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openblip.data.batches import Batch
from openblip.data.stream import SampleStream
from openblip.training.distributed import world
from openblip.training.loop import Precision, TrainingStep, fit
from openblip.training.optim import OptimizerRecipe

B = TypeVar("B", bound=Batch)

WARM_STEPS, MEASURED_STEPS = 2, 10
COUNTED_SAMPLES = 20_000


@dataclass(frozen=True)
class DryRun:
    """What a training would cost on this machine.

    num_parameters, num_trained  of the model with its momentum twin, and without it
    flops_per_step               of forward and backward, on this rank
    state_bytes                  of weights, queue, gradients and AdamW's moments
    peak_bytes                   of device memory in the measured steps; on CPU of the process
    pairs_per_epoch              or questions, over all ranks
    is_estimate                  from the first samples of the epoch
    steps_per_epoch              of the optimizer
    seconds_per_step             median of the measured steps
    seconds                      of all steps
    """

    num_parameters: int
    num_trained: int
    flops_per_step: int
    state_bytes: int
    peak_bytes: int
    pairs_per_epoch: int
    is_estimate: bool
    steps_per_epoch: float
    seconds_per_step: float
    num_steps: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Timed(Generic[B]):
    """A stream that notes when it is asked for the next batch."""

    def __init__(self, stream: SampleStream[Any, B]) -> None:
        self._stream = stream
        self.position = stream.position
        self.times: list[float] = []

    def __iter__(self) -> Generator[B]:
        for batch in self._stream:
            self.times.append(time.perf_counter())
            yield batch


def dry_run(
    step: TrainingStep[B],
    stream: SampleStream[Any, B],
    optimizer: OptimizerRecipe,
    *,
    num_steps: int,
    precision: Precision,
    accumulation_steps: int,
) -> DryRun:
    """Take some steps of a training, and say what all of it would cost."""
    timed = _Timed(stream)

    def take(num: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(
                step,
                timed,
                optimizer,
                num_steps=num,
                title="dry run",
                log_path=Path(folder, "log.jsonl"),
                precision=precision,
                accumulation_steps=accumulation_steps,
            )

    # Fused attention is not counted on every device; as plain products it is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        take(1)
    timed.times.clear()
    take(WARM_STEPS + MEASURED_STEPS)
    starts = timed.times[WARM_STEPS * accumulation_steps :: accumulation_steps]
    seconds = statistics.median(later - earlier for earlier, later in pairwise(starts))
    trained = [p for p in step.parameters() if p.requires_grad]
    tensors = [*step.parameters(), *step.buffers()]
    state = sum(t.nbytes for t in tensors) + 3 * sum(p.nbytes for p in trained)
    num_pairs, is_estimate = stream.count_pairs(COUNTED_SAMPLES)
    return DryRun(
        num_parameters=sum(p.numel() for p in step.parameters()),
        num_trained=sum(p.numel() for p in trained),
        flops_per_step=counter.get_total_flops(),
        state_bytes=state,
        peak_bytes=_peak_bytes(),
        pairs_per_epoch=num_pairs,
        is_estimate=is_estimate,
        steps_per_epoch=num_pairs / (stream.batch_size * accumulation_steps * world().size),
        seconds_per_step=seconds,
        num_steps=num_steps,
        seconds=seconds * num_steps,
    )


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
