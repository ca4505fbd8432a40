"""A training step on several ranks: a whole copy on each (DDP), or split over all (FSDP2).

Either way a rank computes the losses of its own batches, and gradients are averaged. Split, a rank
holds its share of weights, momentum twin, gradients and optimizer moments, and gathers a layer's
weights while it computes with them (Zhao et al. 2023, "PyTorch FSDP").
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from openblip.training.distributed import local_part, whole_tensor, world
from openblip.training.layers import transformer_layers

# Keys and values of a context are views; nothing writes into them.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

Parallel = Literal["ddp", "fsdp"]

Step = TypeVar("Step", bound=nn.Module)


class Replica(Protocol[Step]):
    """A training step as this rank runs it.

    trained  what the optimizer moves and the state saves
    """

    trained: Step

    def spread(self) -> None:
        """Take the step to the device and to the other ranks."""

    def __call__(self, *arguments: Any) -> Any:
        """Run the step's forward."""

    def averaging(self, is_wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Average the gradients of what happens within, or leave them to a later batch."""

    def finish_gradients(self) -> None:
        """Average what the backward pass did not."""

    def clip(self, max_norm: float) -> None:
        """Clip all gradients together to an L2 norm."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Let the step that was given hold all weights as they are, on the device."""

    def finish(self) -> None:
        """Leave the step that was given with all weights."""


class Copied(Generic[Step]):
    """A whole copy of the step on every rank."""

    def __init__(self, step: Step) -> None:
        self.trained = step
        self._model: nn.Module = step

    def spread(self) -> None:
        self._model = world().wrap(self.trained)

    def __call__(self, *arguments: Any) -> Any:
        return self._model(*arguments)

    def averaging(self, is_wanted: bool) -> contextlib.AbstractContextManager[None]:
        return world().averaging(self._model, is_wanted)

    def finish_gradients(self) -> None:
        """Do nothing: DistributedDataParallel has."""

    def clip(self, max_norm: float) -> None:
        nn.utils.clip_grad_norm_(self.trained.parameters(), max_norm)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Do nothing: the step is the one that was given."""


class Split(Generic[Step]):
    """A copy of the step, its layers and the rest split over the ranks.

    The step that was given stays in the memory of the host, and takes the weights back for an
    evaluation and at the end: checkpoints are those of a training that was not split.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        for tensor in (*step.parameters(), *step.buffers()):
            tensor.data.copy_(world().from_first(tensor.data))
        self.trained = copy.deepcopy(step)
        # FSDP2 splits along the first dimension, and a scalar, the temperature, has none.
        self._scalars = [p for p in self.trained.parameters() if p.ndim == 0]

    def spread(self) -> None:
        device = world().device
        mesh = init_device_mesh(device.type, (world().size,))
        for scalar in self._scalars:
            scalar.data = scalar.data.to(device)
        for layer, names in transformer_layers(self.trained):
            fully_shard(layer, mesh=mesh)
            for name in names:
                if name != "forward":
                    register_fsdp_forward_method(layer, name)
        fully_shard(self.trained, mesh=mesh, ignored_params=set(self._scalars))

    def __call__(self, *arguments: Any) -> Any:
        return self.trained(*arguments)

    def averaging(self, is_wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Average every batch's gradients: summed up unaveraged, they would have to be whole."""
        return contextlib.nullcontext()

    def finish_gradients(self) -> None:
        for scalar in self._scalars:
            if scalar.grad is not None:
                distributed.all_reduce(scalar.grad)
                scalar.grad /= world().size

    @torch.no_grad()
    def clip(self, max_norm: float) -> None:
        gradients = [p.grad for p in self.trained.parameters() if p.grad is not None]
        scalars = {id(scalar.grad) for scalar in self._scalars}
        own = [local_part(gradient) for gradient in gradients if id(gradient) not in scalars]
        square = torch.stack([part.float().square().sum() for part in own]).sum()
        distributed.all_reduce(square)
        square = square + sum(
            gradient.square() for gradient in gradients if id(gradient) in scalars
        )
        factor = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local_part(gradient).mul_(factor)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        self.finish()
        if world().is_first:
            self._step.to(world().device)
        yield
        self._step.to("cpu")

    @torch.no_grad()
    def finish(self) -> None:
        given = self._step.state_dict()
        for name, value in self.trained.state_dict().items():
            given[name].copy_(whole_tensor(value))


def replica_of(step: Step, parallel: Parallel) -> Replica[Step]:
    """Return how a step runs on this rank; where there is one alone, nothing is split."""
    if parallel == "fsdp" and world().size > 1:
        return Split(step)
    return Copied(step)
