"""The work of a run: what a worker must know, which units are left, and what became of them.

All engines call `process_shard`, which names and writes its files in the same way wherever it runs,
so that what comes out does not depend on the engine, the number of workers, their order, or who
died. A unit that fails is tried again; one that keeps failing is told of, and the others go on.
What makes all further work pointless (a full disk, other settings, a diverged filter) is raised.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from openblip.capfilt.calibration import read_temperature
from openblip.capfilt.captioner import Captioner
from openblip.capfilt.filter import Filter
from openblip.capfilt.manifest import remove_unit
from openblip.capfilt.models import Models
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.shard import OnProgress, OtherRunError, done_manifest, process_shard
from openblip.capfilt.units import Unit
from openblip.checkpoint import CALIBRATION, model_id
from openblip.data.remote import RemoteAbsentError, RemoteError
from openblip.data.sinks import is_out_of_room
from openblip.hub import load, resolve
from openblip.models.blip import Blip
from openblip.training.log import ProgressLine

MOST_ATTEMPTS = 3
MOST_DEATHS = 5
"""Of workers over one unit: it may be what kills them, as an image that takes all memory."""
RETRY_DELAY_S = 20.0
"""Before a unit that failed is tried again: a server may need a minute."""
POLL_S = 1.0


@dataclass(frozen=True)
class Job:
    """What a worker must know, in any process and on any machine.

    captioners, filters  checkpoint folders or names of the Hub
    output               folder that all workers see
    num_threads          of a worker; 0 takes all cores. It may change the last digits of results
    device               `cpu`, or `cuda`: workers then take the machine's GPUs in turn
    """

    captioners: tuple[str, ...]
    filters: tuple[str, ...]
    recipe: CapfiltRecipe
    output: Path
    num_threads: int = 0
    device: str = "cpu"

    def load(self, number: int = 0) -> Models:
        """Load the models of the worker of this number. Raises ValueError as `hub.load` does."""
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        device = torch.device(self.device)
        if self.device == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    "there is no GPU here for --device cuda; with Ray an actor sees one if "
                    "--gpus-per-worker is above 0"
                )
            device = torch.device("cuda", number % torch.cuda.device_count())
        recipe = self.recipe
        loaded = {name: load(name) for name in {*self.captioners, *self.filters}}
        for blip, _ in loaded.values():
            blip.to(device)
        return Models(
            tuple(
                Captioner(
                    *loaded[name],
                    recipe.decoding,
                    recipe.prompts,
                    recipe.captions_per_image,
                    recipe.seed,
                    recipe.dtype,
                )
                for name in self.captioners
            ),
            tuple(
                Filter(
                    *loaded[name],
                    recipe.dtype,
                    _temperature(name, loaded[name][0]),
                )
                for name in self.filters
            ),
        )


def _temperature(name: str, judge: Blip) -> float:
    # All weights are hashed to see that a temperature is theirs; few filters have one.
    folder = resolve(name)
    has_one = (folder / CALIBRATION).exists()
    return read_temperature(folder, model_id(judge)) if has_one else 1.0


@dataclass(frozen=True)
class Failure:
    """Why a unit failed, and whether another attempt would fail in the same way."""

    reason: str
    is_final: bool


@dataclass
class Queue:
    """The units of a run, and what became of them.

    units      all of them
    is_forced  do units anew that were done with other settings
    failed     names of units that were given up, with the reason
    """

    units: Sequence[Unit]
    job: Job
    is_forced: bool = False
    num_done_before: int = 0
    num_done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    _waiting: deque[tuple[float, Unit]] = field(default_factory=deque)
    _attempts: Counter[str] = field(default_factory=Counter)
    _deaths: Counter[str] = field(default_factory=Counter)
    _num_running: int = 0

    def open(self, captioner_ids: str, filter_ids: str) -> None:
        """Find out what is left to do. Raises OtherRunError for what other settings did."""
        for unit in self.units:
            try:
                done = done_manifest(
                    unit, self.job.output, captioner_ids, filter_ids, self.job.recipe
                )
            except OtherRunError as error:
                if not self.is_forced:
                    raise
                remove_unit(error.manifest)
                done = None
            if done is None:
                self._waiting.append((0.0, unit))
            else:
                self.num_done_before += 1

    @property
    def is_finished(self) -> bool:
        return not self._waiting and not self._num_running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def take(self) -> Unit | None:
        """Return a unit to work on; None if none is due."""
        for _ in range(len(self._waiting)):
            due, unit = self._waiting.popleft()
            if due <= time.monotonic():
                self._num_running += 1
                return unit
            self._waiting.append((due, unit))
        return None

    def report(self, unit: Unit, failure: Failure | None) -> None:
        """Say what became of a unit that was taken: None is success."""
        self._num_running -= 1
        if failure is None:
            self.num_done += 1
            return
        self._attempts[unit.name] += 1
        if failure.is_final or self._attempts[unit.name] >= MOST_ATTEMPTS:
            self.failed[unit.name] = failure.reason
        else:
            self._waiting.append((time.monotonic() + RETRY_DELAY_S, unit))

    def report_death(self, unit: Unit) -> None:
        """Say that the worker of a unit that was taken has died."""
        self._num_running -= 1
        self._deaths[unit.name] += 1
        if self._deaths[unit.name] >= MOST_DEATHS:
            self.failed[unit.name] = f"its worker died {MOST_DEATHS} times"
        else:
            self._waiting.append((0.0, unit))


class RunProgress:
    """Images per second, and the share of the workers' time that they waited for images."""

    def __init__(self, line: ProgressLine, queue: Queue) -> None:
        self._line, self._queue = line, queue
        self._waited = self._worked = 0.0

    def advance(self, images: int, waited: float, worked: float) -> None:
        self._waited += waited
        self._worked += worked
        share = self._waited / max(1e-9, self._waited + self._worked)
        units = self._queue.num_done_before + self._queue.num_done
        self._line.advance(
            images,
            note=f"{units} of {len(self._queue.units)} units, {share:.0%} waiting for images",
        )


def attempt(unit: Unit, models: Models, job: Job, on_progress: OnProgress) -> Failure | None:
    """Work on a unit; return None, or why it failed.

    Raises what makes all further work pointless.
    """
    try:
        process_shard(unit, job.output, models, job.recipe, on_progress=on_progress)
    except OtherRunError:
        raise
    except RemoteError as error:
        return Failure(str(error), isinstance(error, RemoteAbsentError))
    except ValueError as error:
        return Failure(str(error), is_final=True)
    except OSError as error:
        if is_out_of_room(error):
            raise
        return Failure(f"{error.filename or unit}: {error.strerror}", is_final=False)
    return None
