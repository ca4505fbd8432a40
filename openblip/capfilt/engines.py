"""Where CapFilt's units are worked on: this process, a pool of them, a task of a Slurm array."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from openblip.capfilt.models import Models
from openblip.capfilt.units import Unit
from openblip.capfilt.work import MOST_DEATHS, POLL_S, Job, Queue, RunProgress, attempt

EXIT_TERMINATED = 143


def run_here(queue: Queue, progress: RunProgress, models: Models | None = None) -> None:
    """Work on all units in this process, with models that are loaded already or are of the job."""
    models = models or queue.job.load()
    queue.open(models.captioner_ids, models.filter_ids)
    while not queue.is_finished:
        unit = queue.take()
        if unit is None:
            time.sleep(POLL_S)
        else:
            queue.report(unit, attempt(unit, models, queue.job, progress.advance))


def run_pool(queue: Queue, progress: RunProgress, num_workers: int) -> None:
    """Work on all units in several processes; one that dies is replaced."""
    pool = _Pool(queue, progress)
    try:
        for _ in range(num_workers):
            pool.start()
        while not queue.is_finished or not pool.is_open:
            pool.turn()
    finally:
        pool.stop()


@dataclass
class _Worker:
    process: Any
    connection: Connection
    unit: Unit | None = None
    is_ready: bool = False


class _Pool:
    def __init__(self, queue: Queue, progress: RunProgress) -> None:
        self._queue, self._progress = queue, progress
        # A forked process would inherit torch's threads in whatever state they are.
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._num_started = self._num_still_born = 0
        self.is_open = False

    def start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._queue.job, self._num_started), daemon=True
        )
        process.start()
        theirs.close()
        self._num_started += 1
        self._workers.append(_Worker(process, ours))

    def turn(self) -> None:
        """Hear what the workers say, and give work to those that have none."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=POLL_S):
            assert isinstance(connection, Connection)
            worker = by_connection[connection]
            try:
                self._hear(worker, *connection.recv())
            except (EOFError, ConnectionResetError):
                self._bury(worker)
        for worker in list(self._workers):
            if worker.is_ready and worker.unit is None and (unit := self._queue.take()):
                worker.unit = unit
                try:
                    worker.connection.send(unit)
                except OSError:
                    self._bury(worker)

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def _hear(self, worker: _Worker, kind: str, *told: Any) -> None:
        match kind:
            case "ready":
                if not self.is_open:
                    self._queue.open(*told)
                    self.is_open = True
                worker.is_ready = True
            case "progress":
                self._progress.advance(*told)
            case "finished":
                assert worker.unit is not None
                self._queue.report(worker.unit, told[0])
                worker.unit = None
            case _:
                raise told[0]

    def _bury(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join()
        if worker.unit is not None:
            self._queue.report_death(worker.unit)
        self._num_still_born = 0 if worker.is_ready else self._num_still_born + 1
        if self._num_still_born < MOST_DEATHS:
            self.start()
        elif not self._workers:  # else the others go on without it
            raise ValueError(
                f"workers die while they load the models (exit code {worker.process.exitcode}): "
                "is there memory for so many? See --workers"
            )


def _serve(connection: Connection, job: Job, number: int) -> None:
    """Be a worker of a pool, until the pool's process says so or is gone."""
    # Ctrl-C reaches all processes of a terminal: the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # An exception, so that what is half written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    with suppress(BrokenPipeError, EOFError, ConnectionResetError):
        try:
            models = job.load(number)
            connection.send(("ready", models.captioner_ids, models.filter_ids))
            while True:
                unit = connection.recv()
                reason = attempt(
                    unit, models, job, lambda *told: connection.send(("progress", *told))
                )
                connection.send(("finished", reason))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except Exception as error:  # handed over whole, and raised by the pool's process
            connection.send(("raised", error))
    # From here on the process ends by itself; an exception would be told as one of its clean-up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def slurm_share(units: Sequence[Unit], num_tasks: int) -> list[Unit]:
    """Return the units of this task of a Slurm array, whose tasks count from 0: every n-th one.

    num_tasks  of the whole array, though some of them alone may have been submitted again
    Raises ValueError outside of an array, and for a task beyond its end.
    """
    name = "SLURM_ARRAY_TASK_ID"
    advice = "--engine slurm is for the array that the script of `openblip capfilt plan` starts"
    if name not in os.environ:
        raise ValueError(f"{name} is not set: {advice}")
    number = int(os.environ[name])
    if not 0 <= number < num_tasks:
        raise ValueError(f"{name} is {number}, and --tasks {num_tasks}: {advice}")
    return list(units[number::num_tasks])
