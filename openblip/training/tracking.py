"""The measures of a training, as its log has them, to tensorboard or wandb beside the log."""

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """Takes the measures of a step, by name."""

    def write(self, step: int, measures: Mapping[str, float]) -> None: ...


class _Tensorboard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, step: int, measures: Mapping[str, float]) -> None:
        for name, value in measures.items():
            self._writer.add_scalar(name, value, step)


class _Wandb:
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, step: int, measures: Mapping[str, float]) -> None:
        # A step's losses and scores come in turn; wandb's own counter takes each step once.
        self._run.log({**measures, "step": step})


@contextlib.contextmanager
def trackers(
    names: Sequence[TrackerName], log_path: Path, title: str, first_step: int
) -> Iterator[list[Tracker]]:
    """Open the trackers for a training, and close them at the end.

    log_path    of the training; tensorboard's files and wandb's id of the run go beside it
    first_step  from which the training goes on; what was written of later steps is taken back
                where the tracker can
    Raises ValueError naming the extra for a library that is not installed.
    """
    with contextlib.ExitStack() as stack:
        yield [_open(name, log_path, title, first_step, stack) for name in names]


def _open(
    name: TrackerName, log_path: Path, title: str, first_step: int, stack: contextlib.ExitStack
) -> Tracker:
    try:
        match name:
            case "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                folder = log_path.with_suffix(".tensorboard")
                writer: Any = SummaryWriter(str(folder), purge_step=first_step or None)
                stack.callback(writer.close)
                return _Tensorboard(writer)
            case "wandb":
                import wandb

                # A training that goes on is the same run, and one that starts anew is another.
                known = log_path.with_suffix(".wandb_id")
                if not first_step or not known.exists():
                    known.write_text(uuid.uuid4().hex, encoding="utf-8")
                run: Any = wandb.init(
                    project="openblip",
                    name=f"{log_path.name.partition('.')[0]} ({title})",
                    id=known.read_text("utf-8"),
                    resume="allow",
                    dir=str(log_path.parent),
                )
                run.define_metric("*", step_metric="step")
                stack.callback(run.finish)
                return _Wandb(run)
    except ImportError as error:
        raise ValueError(
            f"tracking: {name} is not installed; pip install 'openblip[{name}]'"
        ) from error
