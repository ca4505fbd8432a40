"""A CapFilt run: a data set into a folder, on an engine; what is done already is not done again."""

import os
import shlex
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openblip.capfilt.engines import run_here, run_pool, slurm_share
from openblip.capfilt.images import is_left_out
from openblip.capfilt.keep import EMPTY, least_of_share
from openblip.capfilt.manifest import (
    Manifest,
    OutputPaths,
    judged_by,
    manifests,
    read_failed,
    remove_unit,
    some_manifests,
)
from openblip.capfilt.ray_engine import run_ray
from openblip.capfilt.recipe import recipe_of
from openblip.capfilt.shard import OtherRunError, retry_shard
from openblip.capfilt.units import Unit, list_units
from openblip.capfilt.work import Job, Queue, RunProgress
from openblip.data.samples import CaptionSource
from openblip.data.shards import Shard
from openblip.data.sinks import is_temporary, write_bytes_atomically
from openblip.data.sources import Address
from openblip.training.log import ProgressLine

EngineName = Literal["local", "pool", "ray", "slurm"]


@dataclass(frozen=True)
class EngineChoice:
    """Where the units are worked on.

    num_workers      processes or actors; 0 takes one per GPU, or one per core
    num_tasks        of a Slurm array
    address          of a Ray cluster; None starts one on this machine
    cpus_per_worker  that Ray reserves for an actor
    gpus_per_worker  that Ray reserves for an actor; 0.5 lets two share one
    """

    name: EngineName = "local"
    num_workers: int = 0
    num_tasks: int = 0
    address: str | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a run did: units in all, done by earlier runs, and given up, by name with the reason."""

    num_units: int
    num_done_before: int
    failed: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "num_units": self.num_units,
            "num_done_before": self.num_done_before,
            "failed_units": self.failed,
        }


def run_capfilt(
    source: Address, job: Job, engine: EngineChoice, *, is_forced: bool = False
) -> Outcome:
    """Caption and filter a data set.

    is_forced  do units anew that were done with other settings, models or input
    Raises ValueError for data that are none, for an output folder that holds the input or units
    that were cut in another way; OtherRunError for what was done otherwise.
    """
    units = units_of(source, job)
    check_output(units, job.output)
    check_cut(job.output, units, is_forced=is_forced)
    own = slurm_share(units, engine.num_tasks) if engine.name == "slurm" else units
    queue = Queue(own, job, is_forced)
    with ProgressLine("CapFilt", None, unit="images") as line:
        progress = RunProgress(line, queue)
        match engine.name:
            case "pool":
                run_pool(queue, progress, num_workers(engine, job))
            case "ray":
                run_ray(
                    queue, progress, engine.num_workers, address=engine.address,
                    cpus_per_worker=engine.cpus_per_worker, gpus_per_worker=engine.gpus_per_worker,
                )  # fmt: skip
            case _:
                run_here(queue, progress)
    if engine.name != "slurm":  # whose other tasks may be writing
        remove_leftovers(job.output)
    return Outcome(len(own), queue.num_done_before, queue.failed)


def units_of(source: Address, job: Job) -> list[Unit]:
    """Return the units of a run. Raises ValueError as `list_units` does."""
    recipe = job.recipe
    return list_units(source, most_samples=recipe.unit_samples, most_bytes=recipe.unit_bytes)


def num_workers(engine: EngineChoice, job: Job) -> int:
    """Return the number of processes of a pool."""
    if engine.num_workers:
        return engine.num_workers
    if job.device != "cpu":
        import torch

        return max(1, torch.cuda.device_count())
    return os.cpu_count() or 1


def with_threads(job: Job, engine: EngineChoice) -> Job:
    """Return the job with threads for each of several workers, unless it names them.

    Those of a pool divide the cores; one of Ray's has the CPUs that are reserved for it.
    """
    if job.num_threads or engine.name not in ("pool", "ray"):
        return job
    if engine.name == "ray":
        return replace(job, num_threads=max(1, int(engine.cpus_per_worker)))
    return replace(job, num_threads=max(1, (os.cpu_count() or 1) // num_workers(engine, job)))


def check_output(units: Sequence[Unit], output: Path) -> None:
    """Raise ValueError if the output would lie among the input."""
    for path in {unit.shard.path: None for unit in units if not unit.shard.is_remote}:
        home = path.resolve() if path.is_dir() else path.resolve().parent
        if output.resolve() == home or (path.is_dir() and output.resolve().is_relative_to(home)):
            raise ValueError(f"{output} holds the input, {path}: choose another folder")


def check_cut(output: Path, units: Sequence[Unit], *, is_forced: bool) -> None:
    """See that what is done of the shards was done in the same units; else samples come twice.

    Raises OtherRunError for another cut; if forced, what came of it is removed.
    """
    names = {unit.name for unit in units}
    shards = {str(unit.shard.absolute()) for unit in units}
    for path in manifests(output):
        if path.stem in names:
            continue
        done = Manifest.read(path)
        if str(Shard.at(done.shard)) not in shards:
            continue
        if not is_forced:
            raise OtherRunError(
                path, [f"{done.shard} was cut into {done.num_parts} units, and now is not"]
            )
        remove_unit(path)


def remove_leftovers(output: Path) -> None:
    """Remove what killed writers left; nobody may be writing."""
    for path in output.glob(".*.tmp"):
        if is_temporary(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def threshold_of_share(
    done: Sequence[Path], sources: Sequence[CaptionSource], share: float
) -> float:
    """Return the threshold that this share of all judged captions of some units reaches.

    Raises ValueError for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share is {share}; it must be above 0 and at most 1")
    probabilities = array("d")
    for image in judged_by(done):
        probabilities.extend(
            caption.match_probability
            for caption in image.captions
            if caption.match_probability is not None
            and caption.source in sources
            and caption.drop_reason != EMPTY
        )
    return least_of_share(probabilities, share)


def retry_capfilt(
    output: Path,
    captioners: Sequence[str],
    filters: Sequence[str],
    num_threads: int = 0,
    device: str = "cpu",
) -> int:
    """Caption and judge what failed in all units of a folder; return how many images succeeded.

    num_threads, device  as of `Job`
    Raises ValueError if nothing was done there, and for other models.
    """
    done = some_manifests(output)
    num_before = num_after = 0
    models, loaded_for = None, None
    for path in done:
        manifest = Manifest.read(path)
        failed = read_failed(OutputPaths.of(path.stem, output, manifest.output).failed)
        if all(is_left_out(bad.reason) for bad in failed):
            continue
        recipe = recipe_of(manifest)
        if models is None or recipe != loaded_for:  # several runs may have left units here
            job = Job(tuple(captioners), tuple(filters), recipe, output, num_threads, device)
            models, loaded_for = job.load(), recipe
        num_before += manifest.num_images
        num_after += retry_shard(path, models).num_images
    return num_after - num_before


def write_plan(output: Path, num_tasks: int, command: Sequence[str], cpus_per_task: int) -> Path:
    """Write a script for Slurm that does a run as an array of tasks; return its path.

    command  of the run, which every task calls
    """
    path = output / "capfilt.sbatch"
    output.mkdir(parents=True, exist_ok=True)
    (output / "logs").mkdir(exist_ok=True)
    folder = shlex.quote(str(output.absolute()))
    text = f"""#!/bin/bash
# Submit: sbatch {path}
# A task that was stopped goes on where it was: submit the script again, or let Slurm requeue it.
# When all have ended: openblip capfilt report {shlex.quote(str(output))}
#SBATCH --job-name=capfilt
#SBATCH --array=0-{num_tasks - 1}
#SBATCH --cpus-per-task={cpus_per_task}
#SBATCH --requeue
#SBATCH --output="{output.absolute()}/logs/%A_%a.log"
set -euo pipefail
cd {shlex.quote(os.getcwd())}
mkdir -p {folder}
srun {shlex.join(command)}
"""
    write_bytes_atomically(path, text.encode())
    path.chmod(0o755)
    return path
