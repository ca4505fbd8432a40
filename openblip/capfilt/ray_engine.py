"""CapFilt's units on the actors of a Ray cluster."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from openblip.capfilt.units import Unit
from openblip.capfilt.work import MOST_DEATHS, POLL_S, Failure, Job, Queue, RunProgress, attempt


def run_ray(
    queue: Queue,
    progress: RunProgress,
    num_workers: int,
    *,
    address: str | None = None,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
) -> None:
    """Work on all units on the actors of a Ray cluster; one that is lost is replaced.

    num_workers  most actors; those that the cluster has no room for yet wait until it has grown;
                 0 takes as many as it has room for now
    address      of a cluster; None starts one on this machine
    Raises ValueError if Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'openblip[ray]'") from error
    try:
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False,
                 logging_level=logging.WARNING)  # fmt: skip
    except ConnectionError as error:
        raise ValueError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        options = {
            "num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker,
            # The second thread says how far the first one is.
            "max_concurrency": 2,
        }  # fmt: skip
        cluster: Any = ray  # it has no types
        if not num_workers:
            num_workers = room_for(cluster.cluster_resources(), cpus_per_worker, gpus_per_worker)
        actor = ray.remote(RayWorker).options(**options)
        _RayPool(queue, progress, ray, lambda: actor.remote(queue.job)).run(num_workers)
    finally:
        ray.shutdown()


def room_for(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Return how many workers of so many CPUs and GPUs a cluster holds, 1 at least."""
    wanted = {"CPU": cpus, "GPU": gpus}
    shares = [resources.get(name, 0.0) / each for name, each in wanted.items() if each]
    return max(1, int(min(shares, default=1)))


class RayWorker:
    """An actor that holds the models."""

    def __init__(self, job: Job) -> None:
        self._job, self._models = job, job.load()
        self._told: list[tuple[int, float, float]] = []

    def ready(self) -> tuple[str, str]:
        return self._models.captioner_ids, self._models.filter_ids

    def work(self, unit: Unit) -> Failure | Exception | None:
        """Return what `attempt` does, or what it raises."""
        try:
            return attempt(unit, self._models, self._job, lambda *told: self._told.append(told))
        except Exception as error:  # handed over whole, and raised by the driver
            return error

    def progress(self) -> list[tuple[int, float, float]]:
        """Return what was not told yet."""
        told, self._told = self._told, []
        return told


class _RayPool:
    def __init__(
        self, queue: Queue, progress: RunProgress, ray: Any, start: Callable[[], Any]
    ) -> None:
        self._queue, self._progress, self._ray, self._start = queue, progress, ray, start
        self._running: dict[Any, tuple[Any, Unit | None]] = {}
        self._idle: list[Any] = []
        self._is_open = False
        self._num_still_born = 0

    def run(self, num_workers: int) -> None:
        for _ in range(num_workers):
            self._add()
        while not self._queue.is_finished or not self._is_open:
            if not self._running:  # what is left is to be tried again later
                time.sleep(POLL_S)
            waiting = list(self._running)
            finished = self._ray.wait(waiting, num_returns=1, timeout=POLL_S)[0] if waiting else []
            for reference in finished:
                self._finish(reference, *self._running.pop(reference))
            self._ask_for_progress()
            while self._is_open and self._idle and (unit := self._queue.take()):
                actor = self._idle.pop()
                self._running[actor.work.remote(unit)] = (actor, unit)
        self._ask_for_progress()

    def _add(self) -> None:
        actor = self._start()
        self._running[actor.ready.remote()] = (actor, None)

    def _finish(self, reference: Any, actor: Any, unit: Unit | None) -> None:
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._num_still_born = 0 if unit is not None else self._num_still_born + 1
            if unit is not None:
                self._queue.report_death(unit)
            if self._num_still_born < MOST_DEATHS:
                self._add()
            elif not self._running and not self._idle:  # else the others go on without it
                raise ValueError(f"actors die while they load the models: {error}") from error
            return
        if isinstance(answer, Exception):
            raise answer
        self._tell(actor)
        if unit is not None:
            self._queue.report(unit, answer)
        else:
            self._num_still_born = 0
            if not self._is_open:
                self._queue.open(*answer)
                self._is_open = True
        self._idle.append(actor)

    def _ask_for_progress(self) -> None:
        for actor, unit in list(self._running.values()):
            if unit is not None:
                self._tell(actor)

    def _tell(self, actor: Any) -> None:
        # A dead actor is found where its unit is waited for.
        with suppress(self._ray.exceptions.RayActorError):
            for told in self._ray.get(actor.progress.remote()):
                self._progress.advance(*told)
