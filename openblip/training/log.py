"""What long work tells: a progress line with rate and time left, and a JSONL file of measures."""

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 15.0


class ProgressLine:
    """Progress of `total` units on stderr: a rich bar on a terminal, plain lines elsewhere.

    total      None where it is not known
    done       of them by an earlier run, which the rate leaves out
    is_silent  nothing is told
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        unit: str = "steps",
        done: int = 0,
        *,
        is_silent: bool = False,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.is_silent = is_silent
        self.done = self._done_before = done
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "ProgressLine":
        if sys.stderr.isatty() and not self.is_silent:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                # Answers on stdout are the command's, not the bar's to redraw.
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self.done, rate="", note=""
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print("")

    def advance(self, num: int = 1, note: str = "") -> None:
        """Count `num` more units as done; `note` says what is worth watching."""
        self.done += num
        if self._bar is not None:
            rate = f"{self._rate():.1f} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, rate=rate, note=note)
        elif time.monotonic() - self._last >= PLAIN_INTERVAL_S:
            self._print(note)
            self._last = time.monotonic()

    def _rate(self) -> float:
        return (self.done - self._done_before) / max(1e-9, time.monotonic() - self._start)

    def _print(self, note: str) -> None:
        if self.is_silent:
            return
        rate = self._rate()
        if self.total is None:
            line = f"{self.title}: {self.done} {self.unit}, {rate:.1f}/s {note}"
        else:
            left = f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
            line = f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s{left} {note}"
        print(line.rstrip(), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Logged:
    """What the log of a training holds, in the order of steps.

    losses       a line per logged step
    evaluations  a line per evaluation, of the scores alone with their step
    """

    losses: Sequence[Mapping[str, float]]
    evaluations: Sequence[Mapping[str, float]]


def read_log(path: Path) -> Logged:
    """Read a file that `MeasureFile` wrote, and may still write."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return Logged(
        [line for line in lines if "evaluation" not in line],
        [{"step": line["step"]} | line["evaluation"] for line in lines if "evaluation" in line],
    )


class MeasureFile:
    """A JSONL file with one object per logged step, and one with `evaluation` per evaluation.

    path            None writes nothing
    num_kept_bytes  of what an earlier run wrote; the rest is cut off
    """

    def __init__(self, path: Path | None, num_kept_bytes: int = 0) -> None:
        self._path, self._num_kept_bytes = path, num_kept_bytes

    def __enter__(self) -> "MeasureFile":
        self._file: IO[bytes]
        if self._path is None:
            self._file = io.BytesIO()
            return self
        self._file = self._path.open("r+b" if self._num_kept_bytes else "wb")
        self._file.truncate(self._num_kept_bytes)
        self._file.seek(self._num_kept_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, by earlier runs too."""
        return self._file.tell()

    def write(self, measures: Mapping[str, object]) -> None:
        if self._path is None:
            return
        self._file.write(json.dumps(measures).encode() + b"\n")
        self._file.flush()
