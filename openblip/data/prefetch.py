"""Work done ahead of its use, in threads, in its order."""

import contextlib
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

JOBS_PER_WORKER = 2
MOST_WORKERS = 8
"""Threads that read beside one model: more would only hold more images."""
ITEMS_PER_JOB = 8
"""A small image is decoded faster than a thread is woken."""


def prefetch(items: Generator[Item], size: int) -> Generator[Item]:
    """Run the generator in a thread, `size` items ahead; its errors are raised here.

    Decoding and reading leave Python's lock, so they run beside the training step. Closing this
    generator closes the other.
    """
    ready: queue.Queue[Item | BaseException | None] = queue.Queue(size)
    is_closed = threading.Event()

    def put(item: Item | BaseException | None) -> bool:
        while not is_closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        with contextlib.closing(items):
            try:
                for item in items:
                    if not put(item):
                        return
                put(None)
            except BaseException as error:  # handed over whole, and raised by the consumer
                put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_closed.set()
        with contextlib.suppress(queue.Empty):  # wakes a thread that waits to put
            while True:
                ready.get_nowait()
        thread.join()


def map_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], pool: ThreadPoolExecutor, num_jobs: int
) -> Iterator[Result]:
    """Yield the results in the order of the items; the pool has `num_jobs` jobs to choose from."""

    def work_on(chunk: list[Item]) -> list[Result]:
        return [work(item) for item in chunk]

    jobs: deque[Future[list[Result]]] = deque()
    rest = iter(items)
    while chunk := list(itertools.islice(rest, ITEMS_PER_JOB)):
        jobs.append(pool.submit(work_on, chunk))
        if len(jobs) >= num_jobs:
            yield from jobs.popleft().result()
    while jobs:
        yield from jobs.popleft().result()


def map_beside(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results in the order of the items, from threads that work ahead of their use."""
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        yield from map_in_order(work, items, pool, JOBS_PER_WORKER * workers)
