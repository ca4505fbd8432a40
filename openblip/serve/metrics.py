"""Figures of a running server, as Prometheus reads them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server; a process may hold several servers, as tests do."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "openblip_requests", "Requests that were answered", ["route", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "openblip_request_seconds", "From a request's head to the end of its answer",
            ["route"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._batches = Histogram(
            "openblip_batch_size", "Requests that a model worked on together",
            ["model", "kind"], buckets=_SIZES, registry=self.registry,
        )  # fmt: skip
        self._work = Counter(
            "openblip_work_seconds", "Seconds that a model worked", ["model", "kind"],
            registry=self.registry,
        )  # fmt: skip
        self._waiting = Gauge(
            "openblip_waiting_jobs", "Jobs that wait for a model", ["model"],
            registry=self.registry,
        )  # fmt: skip

    def note_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is over; its status is 499 if the client left."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def note_batch(self, model: str, kind: str, size: int, seconds: float) -> None:
        """Count a batch of a model."""
        self._batches.labels(model, kind).observe(size)
        self._work.labels(model, kind).inc(seconds)

    def watch_queue(self, model: str, length: Callable[[], int]) -> None:
        """Show the number of jobs that wait for a model."""
        self._waiting.labels(model).set_function(length)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
