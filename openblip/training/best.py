"""Evaluation as a training goes on, and the best model so far.

Evaluating leaves no trace in the training: it ends with the bits of one that was not evaluated.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import nn

from openblip.config import Recipe
from openblip.generation import Decoding
from openblip.training.distributed import world

_log = logging.getLogger(__name__)


class EvaluatingRecipe(Recipe):
    """When and on what a model is evaluated as it is trained; the last step always is.

    every_steps  optimizer steps
    data         data sets of any kind that the training reads, held in memory; every caption is
                 a reference, and a text of its own in retrieval
    shortlist    texts and images that ITM re-ranks in retrieval fine-tuning
    decoding     of captions or answers; None: with three beams, as long as the task has them
    """

    every_steps: int = Field(ge=1)
    data: tuple[str, ...] = Field(min_length=1)
    shortlist: int = Field(128, ge=1)
    decoding: Decoding | None = None


@dataclass(frozen=True)
class Scores:
    """What an evaluation gave.

    values     by name
    criterion  what the best model is chosen by, higher is better
    """

    values: Mapping[str, float]
    criterion: float

    def to_json(self) -> dict[str, float]:
        return {**self.values, "criterion": self.criterion}


@dataclass(frozen=True)
class Evaluation:
    """How a stage lets `fit` evaluate its model; on several ranks the first does it.

    every_steps  optimizer steps
    measure      scores of the model as it stands, in eval mode
    keep         saves that model, the best so far, after a number of steps
    """

    every_steps: int
    measure: Callable[[], Scores]
    keep: Callable[[int, Scores], None]


class BestSoFar:
    """Evaluates a model when it is due, and keeps the best one."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._criterion: float | None = None
        self._num_steps = 0

    def is_due(self, num_steps: int) -> bool:
        """Say whether the model after so many steps is to be evaluated."""
        return num_steps > 0 and num_steps % self._evaluation.every_steps == 0

    def evaluate(self, module: nn.Module, num_steps: int) -> dict[str, float]:
        """Evaluate on the first rank, the others waiting; return scores worth a line in the log.

        module  in train mode, and again at the end; random numbers go on as if nothing had been
        """
        ranks, scores = world(), None
        if ranks.is_first:
            devices = [ranks.device] if ranks.device.type == "cuda" else []
            module.eval()
            with torch.random.fork_rng(devices):
                scores = self._evaluation.measure()
            if self._criterion is None or scores.criterion > self._criterion:
                self._criterion, self._num_steps = scores.criterion, num_steps
                self._evaluation.keep(num_steps, scores)
            _log.info(
                "after step %d: criterion %.4g; the best was %.4g after step %d",
                num_steps, scores.criterion, self._criterion, self._num_steps,
            )  # fmt: skip
            module.train()
        ranks.wait()
        return {} if scores is None else scores.to_json()

    def to_json(self) -> dict[str, Any]:
        """Return what a training goes on with."""
        return {"criterion": self._criterion, "num_steps": self._num_steps}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on with what `to_json` returned."""
        self._criterion, self._num_steps = values["criterion"], values["num_steps"]
