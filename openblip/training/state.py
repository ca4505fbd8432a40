"""The state of a training on disk, from which it goes on to the bit.

    recipe.yaml                of the training that the states belong to
    step-00000100/             after 100 optimizer steps
        rank-00000.json        where this rank's stream stands, and how long the log is
        *.distcp, .metadata    weights, momentum twin, queue, optimizer, random numbers (DCP)

DCP writes `.metadata` last: a state without it was interrupted, and counts for nothing.
"""

import json
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save

from openblip.config import Recipe, dump_recipe
from openblip.data.position import Position, deal_anew
from openblip.data.sinks import write_bytes_atomically, write_json_atomically
from openblip.training.distributed import World, world

# DCP tells a single process so at every save; it is what is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unini")


@dataclass(frozen=True)
class TrainingFiles:
    """Where a training logs its losses (JSONL), saves its state and its best model as it goes."""

    log: Path
    state: Path
    best: Path

    @classmethod
    def beside(cls, folder: Path) -> "TrainingFiles":
        """Return those of a training that will leave the checkpoint `folder`; make their place."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        ends = (".log.jsonl", ".state", ".best")
        return cls(*(folder.with_name(folder.name + end) for end in ends))

    def remove_state(self) -> None:
        """Remove what an unfinished training goes on from: it is done."""
        shutil.rmtree(self.state, ignore_errors=True)


class SavingRecipe(Recipe):
    """When the state of a training is saved, and how many states stay.

    every_steps    optimizer steps; 0 goes by minutes alone
    every_minutes  0 goes by steps alone
    keep_last      older states are removed
    """

    every_steps: int = Field(0, ge=0)
    every_minutes: float = Field(10.0, ge=0)
    keep_last: int = Field(2, ge=1)


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on.

    num_steps  done so far
    position   of this rank's stream
    log_bytes  length of the log at that step
    extra      what else the loop gave to be saved, in plain values
    """

    num_steps: int
    position: Position
    log_bytes: int
    extra: Mapping[str, Any]


class TrainingState:
    """Saves what changes in a training, beside its steps, and brings it back."""

    def __init__(self, folder: Path, saving: SavingRecipe, training: Recipe) -> None:
        """Claim the folder for a training by the recipe `training`.

        Raises ValueError if it holds states of a training by another one.
        """
        self.folder, self.recipe = folder, saving
        path, text = folder / "recipe.yaml", dump_recipe(training)
        if world().is_first and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, text.encode())
        world().wait()
        if path.read_text("utf-8") != text:
            raise ValueError(
                f"{folder} holds an unfinished training by another recipe (see {path}): "
                "go on with that one, remove the folder, or choose another output"
            )
        self._last_save = time.monotonic()
        self._saving: Future[Any] | None = None

    def __enter__(self) -> "TrainingState":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def is_due(self, num_steps: int) -> bool:
        """Say whether the state after so many steps is to be saved."""
        recipe = self.recipe
        minutes = (time.monotonic() - self._last_save) / 60
        return bool(
            (recipe.every_steps and num_steps % recipe.every_steps == 0)
            or (recipe.every_minutes and minutes >= recipe.every_minutes)
        )

    def save(
        self,
        num_steps: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: Position,
        log_bytes: int,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy the state now and write it beside the next steps.

        extra  plain values that come back with it
        Raises what went wrong in writing the state before this one.
        """
        self.wait()
        ranks = world()
        folder = self.folder / f"step-{num_steps:08d}"
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        ranks.wait()
        own = {"num_steps": num_steps, "log_bytes": log_bytes, "position": position.to_json()}
        own["extra"] = dict(extra or {})
        write_json_atomically(folder / f"rank-{ranks.rank:05d}.json", own)
        # The optimizer's states are keyed by name, and survive another order of the parameters.
        weights, moments = get_state_dict(module, optimizer)
        tensors = {"module": weights, "optimizer": moments, _random_of(ranks): _random_states()}
        saving = async_save(
            tensors,
            checkpoint_id=folder,
            process_group=ranks.saving_group,
            no_dist=ranks.size == 1,
        )
        assert isinstance(saving, Future)
        self._saving = saving
        self._last_save = time.monotonic()

    def wait(self) -> None:
        """Wait until the last state is on disk, and remove those that are too old.

        Raises what went wrong in writing it.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        try:
            saving.result()
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror, str(self.folder)) from error
            raise
        if not world().is_first:
            return
        kept = self._saved()[-self.recipe.keep_last :]
        for folder in self.folder.glob("step-*"):
            if folder not in kept:  # too old, or interrupted
                shutil.rmtree(folder)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Resumed | None:
        """Bring the last state back into module, optimizer and random numbers.

        With another number of ranks than there was, what is left of the data is dealt anew.

        Returns None where nothing has been saved.
        """
        saved = self._saved()
        if not saved:
            return None
        folder, ranks = saved[-1], world()
        before = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("rank-*"))]
        weights, moments = get_state_dict(module, optimizer)
        tensors: dict[str, Any] = {"module": weights, "optimizer": moments}
        if ranks.rank < len(before):
            tensors[_random_of(ranks)] = _random_states()
        load_tensors(tensors, checkpoint_id=folder, no_dist=ranks.size == 1)
        set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=moments)
        if ranks.rank < len(before):
            _set_random_states(tensors[_random_of(ranks)])
        positions = [Position.from_json(rank["position"]) for rank in before]
        position = deal_anew(positions, ranks.size)[ranks.rank]
        return Resumed(before[0]["num_steps"], position, before[0]["log_bytes"], before[0]["extra"])

    def last(self) -> Path | None:
        """Return the last state that is complete on disk."""
        self.wait()
        saved = self._saved()
        return saved[-1] if saved else None

    def _saved(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("step-*/.metadata"))


def _random_of(ranks: World) -> str:
    return f"random-{ranks.rank}"


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
