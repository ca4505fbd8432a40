"""Work of many requests on one model, in batches: a thread that takes what fits together."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from openblip.inference import Engine

_log = logging.getLogger(__name__)


class Work(Protocol):
    """A kind of work with its settings. Jobs whose work is equal are done together."""

    @property
    def kind(self) -> str: ...
    def __hash__(self) -> int: ...
    def __call__(self, engine: Engine, items: Sequence[Any]) -> Sequence[Any]:
        """Return the result of every item, in their order."""
        ...


class StoppedError(RuntimeError):
    """The server stops, and takes no new work."""


@dataclass
class _Job:
    work: Work
    item: Any
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """Does work on one engine, which is used by its thread alone.

    batch_size  jobs that are done together
    wait_s      that is waited for more of a kind, when there are fewer
    on_batch    called with the kind, the number of jobs and the seconds of each batch
    Jobs that nobody waits for any more, because their future was cancelled, are passed over.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_size: int,
        wait_s: float,
        on_batch: Callable[[str, int, float], None],
        name: str,
    ) -> None:
        self._engine, self._batch_size, self._wait_s = engine, batch_size, wait_s
        self._on_batch = on_batch
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name=f"model {name}", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return len(self._waiting)

    def submit(self, work: Work, item: Any) -> Future[Any]:
        """Queue a job; its future has the result, or what its work raised.

        Raises StoppedError once the worker was told to stop.
        """
        job = _Job(work, item)
        with self._changed:
            if self._is_stopped:
                raise StoppedError("the server is stopping")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def stop(self) -> None:
        """Do what waits, and end."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            running = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if running:
                self._do(running)

    def _next(self) -> list[_Job] | None:
        """Wait for jobs and return those of one work; None at the end."""
        with self._changed:
            while not self._waiting:
                if self._is_stopped:
                    return None
                self._changed.wait()
            deadline = time.monotonic() + self._wait_s
            while True:
                first = self._waiting[0].work
                own = [job for job in self._waiting if job.work == first][: self._batch_size]
                left = deadline - time.monotonic()
                # Who waits behind for other work should not wait for more of this one.
                if len(own) == self._batch_size or len(own) < len(self._waiting) or left <= 0:
                    break
                if self._is_stopped:
                    break
                self._changed.wait(left)
            taken = set(map(id, own))
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
            return own

    def _do(self, jobs: list[_Job]) -> None:
        start = time.monotonic()
        try:
            results = jobs[0].work(self._engine, [job.item for job in jobs])
            assert len(results) == len(jobs)
        except BaseException as error:
            if len(jobs) > 1:
                # One bad item must not cost the others their answers.
                _log.info("%d jobs of %s are done one by one", len(jobs), jobs[0].work.kind)
                for job in jobs:
                    self._do([job])
                return
            jobs[0].future.set_exception(error)
        else:
            for job, result in zip(jobs, results, strict=True):
                job.future.set_result(result)
        self._on_batch(jobs[0].work.kind, len(jobs), time.monotonic() - start)
