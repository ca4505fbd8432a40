"""What is done to the transformer layers of a training step: recomputed, compiled.

The layers of the image encoder and of the MED are by far most of the work and of the memory, and
their calls are all that these change: parameters keep their names, so states and checkpoints are
those of a training without.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from openblip.models.text import MedLayer
from openblip.models.vision import VisionLayer

Call = Callable[..., Any]

MOST_COMPILATIONS = 128
"""Of one method: shapes, with and without gradients, and rates of dropped paths."""


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
    with _replaced(module, _recompute, _is_trained):
        yield


@contextlib.contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """Compile the calls of all layers with torch.compile, until the end.

    What is around them is a few per cent of the work, and changes its shape with every batch's
    texts and draws. The numbers are those of other kernels: equal up to rounding, and other draws
    of dropout.

    Raises ValueError where nothing can be compiled.
    """
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(name and shutil.which(name) for name in names):
        raise ValueError("compile: there is no C++ compiler; install g++, or leave it off")
    # Layers share their code, and each rate of dropped paths is a compilation of its own.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, MOST_COMPILATIONS)
    try:
        with _replaced(module, torch.compile, lambda layer: True):
            yield
    finally:
        torch._dynamo.config.recompile_limit = limit


def _is_trained(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _recompute(call: Call) -> Call:
    def recomputing(*arguments: Any) -> Any:
        return checkpoint(call, *arguments, use_reentrant=False)

    return recomputing


@contextlib.contextmanager
def _replaced(
    module: nn.Module, replace: Callable[[Call], Call], is_meant: Callable[[nn.Module], bool]
) -> Iterator[None]:
    """Replace the calls of some layers, until the end."""
    layers = [(layer, names) for layer, names in transformer_layers(module) if is_meant(layer)]
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
