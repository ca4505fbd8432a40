"""What is done to the transformer layers of a training step: recomputed, compiled.

The layers of the image encoder and of the MED are by far most of the work and of the memory, and
their calls are all that these change: parameters keep their names, so states and checkpoints are
those of a training without.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from openblip.models.text import MedLayer
from openblip.models.vision import VisionLayer

Call = Callable[..., Any]


def transformer_layers(module: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Return every layer with the names of its methods that training calls."""
    for part in module.modules():
        if isinstance(part, VisionLayer):
            yield part, ("forward",)
        elif isinstance(part, MedLayer):
            yield part, ("project_context", "encode", "encode_pair", "decode")


@contextlib.contextmanager
def recomputed(module: nn.Module) -> Iterator[None]:
    """Keep no activations within the layers; the backward pass computes them anew.

    Dropout draws the same numbers the second time. What needs no gradient, such as the momentum
    twin, is left alone.
    """
    with _replaced(module, _recompute):
        yield


def _recompute(call: Call) -> Call:
    def recomputing(*arguments: Any) -> Any:
        return checkpoint(call, *arguments, use_reentrant=False)

    return recomputing


@contextlib.contextmanager
def _replaced(module: nn.Module, replace: Callable[[Call], Call]) -> Iterator[None]:
    """Replace the calls of all layers that are trained, until the end."""
    layers = [
        (layer, names)
        for layer, names in transformer_layers(module)
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]
    before = [dict(vars(layer)) for layer, _ in layers]
    for layer, names in layers:
        for name in names:
            setattr(layer, name, replace(getattr(layer, name)))
    try:
        yield
    finally:
        for (layer, names), attributes in zip(layers, before, strict=True):
            for name in names:
                if name in attributes:
                    setattr(layer, name, attributes[name])
                else:
                    delattr(layer, name)
