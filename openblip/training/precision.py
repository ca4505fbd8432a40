"""Mixed precision: autocast, and for float16 the loss scale that keeps small gradients alive.

Micikevicius et al. 2018: the loss is multiplied before the backward pass and the gradients are
divided after it. A step whose gradients overflow is left out and halves the scale, which is
ordinary at the start; 2000 steps without one double it.
"""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16", "float16"]


class MixedPrecision:
    """Runs forward, backward and optimizer step in a precision; weights stay float32.

    num_skipped  optimizer steps left out so far because gradients overflowed; float16 alone
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._device = device
        self._dtype = {
            "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16,
        }[precision]  # fmt: skip
        self.is_scaled = precision == "float16"
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.is_scaled)
        self.num_skipped = 0

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of a forward."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def backward(self, total: Tensor) -> None:
        """Add the gradients of a loss, times the scale."""
        self._scaler.scale(total).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide all gradients by the scale, once per optimizer step."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer move, unless a gradient overflowed; then count it."""
        if not self.is_scaled:
            optimizer.step()
            return
        before = self.scale
        self._scaler.step(optimizer)
        self._scaler.update()
        self.num_skipped += self.scale < before

    @property
    def scale(self) -> float:
        """The loss scale of the next step; 1 but for float16."""
        return float(self._scaler.get_scale())

    def measures(self) -> dict[str, float]:
        """Return what is worth a place in the log."""
        if not self.is_scaled:
            return {}
        return {"loss_scale": self.scale, "skipped_steps": float(self.num_skipped)}

    def to_json(self) -> dict[str, Any]:
        """Return what a training goes on with."""
        return {"scaler": self._scaler.state_dict(), "num_skipped": self.num_skipped}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on with what `to_json` returned."""
        if self.is_scaled:
            self._scaler.load_state_dict(dict(values["scaler"]))
        self.num_skipped = values["num_skipped"]
