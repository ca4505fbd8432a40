"""The thread of a model: what it takes together, what fails alone, how it ends."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import pytest

from openblip.results import Word
from openblip.serve.worker import StoppedError, Worker
from openblip.serve.works import WordFollower


@dataclass(frozen=True)
class Doubling:
    """Doubles numbers; negative ones are an error. Remembers what came together."""

    name: str = "a"
    batches: list[list[int]] = field(default_factory=list, compare=False)
    gate: threading.Event | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        return self.name

    def __call__(self, engine: object, items: Sequence[int]) -> list[int]:
        if self.gate is not None:
            self.gate.wait(10)
        self.batches.append(list(items))
        if any(item < 0 for item in items):
            raise ValueError(f"{min(items)} is negative")
        return [2 * item for item in items]


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(
        None,
        batch_size=4,
        wait_s=0.05,
        on_batch=lambda *_: None,
        name="test",  # type: ignore[arg-type]
    )
    yield worker
    worker.stop()


def held(worker: Worker) -> threading.Event:
    """Let the worker wait, so that jobs come together; return what lets it go."""
    gate = threading.Event()
    worker.submit(Doubling("gate", gate=gate), 0)
    return gate


def test_jobs_of_one_work_are_done_together_in_their_order(worker) -> None:
    work, other = Doubling("a"), Doubling("b")
    gate = held(worker)
    futures = [worker.submit(other if n % 3 == 2 else work, n) for n in range(9)]
    gate.set()
    assert [future.result(10) for future in futures] == [2 * n for n in range(9)]
    assert work.batches == [[0, 1, 3, 4], [6, 7]]
    assert other.batches == [[2, 5, 8]]


def test_a_bad_job_fails_alone(worker) -> None:
    work = Doubling()
    gate = held(worker)
    futures = [worker.submit(work, n) for n in (1, -2, 3)]
    gate.set()
    assert futures[0].result(10) == 2
    assert futures[2].result(10) == 6
    with pytest.raises(ValueError, match="-2 is negative"):
        futures[1].result(10)
    assert work.batches == [[1, -2, 3], [1], [-2], [3]]


def test_what_nobody_waits_for_is_not_done(worker) -> None:
    work = Doubling()
    gate = held(worker)
    futures = [worker.submit(work, n) for n in range(3)]
    assert futures[1].cancel()
    gate.set()
    assert futures[2].result(10) == 4
    assert work.batches == [[0, 2]]
    with pytest.raises(CancelledError):
        futures[1].result(10)


def test_a_full_batch_waits_for_nobody() -> None:
    worker = Worker(
        None,
        batch_size=2,
        wait_s=60,
        on_batch=lambda *_: None,
        name="test",  # type: ignore[arg-type]
    )
    work = Doubling()
    futures = [worker.submit(work, n) for n in range(2)]
    assert [future.result(10) for future in futures] == [0, 2]
    worker.stop()


def test_it_ends_when_all_is_done() -> None:
    worker = Worker(
        None,
        batch_size=2,
        wait_s=60,
        on_batch=lambda *_: None,
        name="test",  # type: ignore[arg-type]
    )
    future = worker.submit(Doubling(), 4)
    worker.stop()
    assert future.result(0) == 8
    with pytest.raises(StoppedError):
        worker.submit(Doubling(), 1)


def test_a_caption_begun_anew_tells_no_word_twice() -> None:
    told: list[str] = []
    follower = WordFollower(lambda word: told.append(word.text))
    words = [Word(text, 1.0) for text in ("a", "red", "circle")]
    follower.begin()
    assert follower.follow(words[0])
    assert follower.follow(words[1])
    follower.begin()
    for word in words:
        assert follower.follow(word)
    assert told == ["a", "red", "circle"]
    follower.leave()
    assert not follower.follow(Word("more", 1.0))
    assert told == ["a", "red", "circle"]
