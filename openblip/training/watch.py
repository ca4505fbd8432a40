"""What a training watches for as it goes: losses and weights that are not finite, and signals."""

import signal
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openblip.training.distributed import local_part
from openblip.training.state import TrainingState


class FiniteWatch:
    """Sees whether losses are finite without waiting for the device at every step.

    state   whose last good one an error names
    advice  told with an error, in a few words
    """

    def __init__(self, device: torch.device, state: TrainingState | None, advice: str = "") -> None:
        self._is_finite = torch.ones((), dtype=torch.bool, device=device)
        self._seen: list[tuple[int, Tensor, Mapping[str, Tensor | float], tuple[str, ...]]] = []
        self._state, self._advice = state, advice
        self._step = 0
        self._keys: tuple[str, ...] = ()

    def see(
        self,
        step: int,
        total: Tensor,
        measures: Mapping[str, Tensor | float],
        keys: tuple[str, ...],
    ) -> None:
        """Note the loss `total` of a batch of the samples `keys`."""
        total = total.detach()
        self._is_finite = self._is_finite & torch.isfinite(total)
        self._seen.append((step, total, measures, keys))
        self._step, self._keys = step, keys

    def check(self) -> None:
        """Raise FloatingPointError for the first loss since the last check that is not finite."""
        if not self._is_finite:
            for step, total, measures, keys in self._seen:
                if not torch.isfinite(total):
                    told = {name: float(value) for name, value in measures.items()}
                    raise self._error(step, f"the loss is not finite: {told}", keys)
        self._seen.clear()

    def check_weights(self, module: nn.Module) -> None:
        """Raise FloatingPointError for a weight that is not finite, before it is saved.

        A loss can be finite, and its gradient not.
        """
        weights = {name: local_part(p.detach()) for name, p in module.named_parameters()}
        are_finite = torch.stack([torch.isfinite(weight).all() for weight in weights.values()])
        if not are_finite.all():
            name = [*weights][int(are_finite.logical_not().nonzero()[0])]
            raise self._error(self._step, f"the weight {name} is not finite", self._keys)

    def check_scale(self, scale: float) -> None:
        """Raise FloatingPointError if gradients overflowed that were not made larger."""
        if scale < 1.0:
            raise self._error(
                self._step, "gradients are not finite at a loss scale of 1", self._keys
            )

    def _error(self, step: int, what: str, keys: tuple[str, ...]) -> FloatingPointError:
        kept = None if self._state is None else self._state.last()
        parts = [f"step {step}: {what}"]
        if self._advice:
            parts.append(self._advice)
        if kept is not None:
            parts.append(f"the last good state is kept: {kept}")
        return FloatingPointError("; ".join([*parts, f"samples: {', '.join(keys)}"]))


class StopSignals:
    """Remembers SIGINT and SIGTERM until the step is done; a second one acts at once."""

    signal: int = 0

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        # Python hands signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
