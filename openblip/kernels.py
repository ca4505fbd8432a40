"""Linear layers for inference: weights laid out beforehand for the processor, bfloat16, int8.

The ways to multiply are chosen by fixed rules, not by a stopwatch: with one, the last bits of
results would depend on what else the machine did. `openblip bench` measures whether the rules fit a
machine.

Letters: M rows, K inputs, N outputs.
"""

import copy
import functools
import platform
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.models.text import LmHead

M = TypeVar("M", bound=nn.Module)

Precision = Literal["float32", "bfloat16", "float16", "int8"]

SMALLEST_WIDTH = 256
"""Below this, laying out weights gains less than the calls cost."""
SMALLEST_INT8_WIDTH = 32
"""The same of int8, which is only taken on request."""
KEPT_EXACT = {"image_projection", "text_projection", "match_head"}
"""Layers that stay as they are: they are small, and each decides a result alone."""
FEW_ROWS = range(4, 257)
"""Rows at which laid-out float32 weights pay even where the default library is fast: on an Intel
Xeon with AVX-512 1.3 to 1.8 times for wide layers; at fewer they are slower, at more as fast."""
LARGEST_INT8 = 127
INT8_ZERO = 128


@functools.cache
def is_x86() -> bool:
    """Say whether this is a processor for whose products oneDNN lays out weights."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@functools.cache
def is_default_library_slow() -> bool:
    """Say whether plain float32 products go through a library that is slow on this processor.

    MKL takes AMD's processors for old ones: a third of oneDNN's rate was measured on an EPYC.
    """
    if platform.system() != "Linux":
        return False
    return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()


class PackedLinear(nn.Module):
    """A linear layer whose weight is laid out for oneDNN; M decides which copy is used."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self.is_always_packed = weight.dtype != torch.float32 or is_default_library_slow()

    def forward(self, states: Tensor) -> Tensor:
        if self.is_always_packed or states.numel() // states.shape[-1] in FEW_ROWS:
            output: Tensor = torch.ops.mkldnn._linear_pointwise(
                states, self.packed, self.bias, "none", [], ""
            )
            return output
        return F.linear(states, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer in int8: weights by output, states by row, so that no row changes another's.

    Rounding moves a weight by at most 1/254 of its output's largest, a state by 1/254 of its row's.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        self.num_inputs = weight.shape[1]
        self.bias = None if bias is None else bias.detach().float()
        self.scales = weight.abs().amax(dim=1).clamp_min(1e-12) / LARGEST_INT8
        quantised = (weight / self.scales[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(quantised, None)
        self.zeros = torch.zeros(len(self.scales), dtype=torch.long)

    def forward(self, states: Tensor) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        scales = rows.abs().amax(dim=1, keepdim=True).clamp_min_(1e-12) / LARGEST_INT8
        quantised = (rows / scales).round_().add_(INT8_ZERO).to(torch.uint8)
        products = torch.ops.onednn.qlinear_pointwise(
            quantised, 1.0, INT8_ZERO, self.packed, self.scales, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        products.mul_(scales)
        if self.bias is not None:
            products.add_(self.bias)
        output: Tensor = products.view(*states.shape[:-1], -1)
        return output


class PreparedLmHead(nn.Module):
    """`LmHead` with a prepared copy of the word embedding."""

    def __init__(self, head: LmHead, vocabulary: nn.Module) -> None:
        super().__init__()
        self.linear, self.norm, self.vocabulary = head.linear, head.norm, vocabulary

    def forward(self, states: Tensor, word_embedding: Tensor) -> Tensor:
        logits: Tensor = self.vocabulary(self.norm(F.gelu(self.linear(states))))
        return logits


def best_precision(device: torch.device) -> Precision:
    """Return what `auto` means on a device: the fastest precision without a loss worth speaking of.

    float16 is for GPUs that lack bfloat16. Processors of Intel without AMX take float32: bfloat16
    was measured at half of its rate there (docs/performance.md).
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if device.type == "cpu" and is_x86():
        if torch.cpu._is_amx_tile_supported():
            return "bfloat16"
        if is_default_library_slow() and torch.cpu._is_avx512_bf16_supported():
            return "bfloat16"
    return "float32"


def prepare(model: M, precision: Precision, *, prepack: bool = True) -> M:
    """Return a copy of a model for inference in a precision; what can be is shared with the model.

    prepack  lay out the weights, which takes their memory once more. Without it a model in float32
             comes back as it is
    Raises ValueError for a precision that the model's device does not have.
    """
    if precision == "float32" and not prepack:
        return model
    device = next(model.parameters()).device
    if precision == "int8" and (device.type != "cpu" or not is_x86()):
        raise ValueError(f"int8 needs an x86 processor, the model is on {device}: take bfloat16")
    if precision == "float16" and device.type == "cpu":
        raise ValueError("float16 is for GPUs; on a processor take bfloat16 or float32")
    if precision in {"bfloat16", "float16"}:
        prepared = copy.deepcopy(model).eval().to(getattr(torch, precision))
    else:
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        prepared = copy.deepcopy(model, shared).eval()
    is_int8 = precision == "int8"
    if is_int8 or (prepack and device.type == "cpu" and is_x86()):
        _replace(prepared, Int8Linear if is_int8 else PackedLinear)
    return prepared


def plain(module: M) -> M:
    """Return a module for gradients, in float32: the reverse of `prepare`, as far as it goes.

    Weights that are float32 are shared. What bfloat16 or int8 has rounded stays as it runs.
    """
    if isinstance(module, PackedLinear):
        return cast(M, _linear(module.weight, module.bias))
    if isinstance(module, Int8Linear):
        # Rows with a single 1 are exact in int8: what comes out is the weight, as it is used.
        bias = module.bias
        rows = module(torch.eye(module.num_inputs))
        return cast(M, _linear((rows if bias is None else rows - bias).T.contiguous(), bias))
    copied = copy.copy(module)
    copied._modules = {n: c if c is None else plain(c) for n, c in module._modules.items()}
    copied._parameters = {
        name: value
        if value is None or value.dtype == torch.float32
        else nn.Parameter(value.detach().float(), requires_grad=False)
        for name, value in module._parameters.items()
    }
    copied.training = False
    return copied


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear


def _replace(module: nn.Module, kind: type[PackedLinear] | type[Int8Linear]) -> None:
    smallest = SMALLEST_INT8_WIDTH if kind is Int8Linear else SMALLEST_WIDTH
    for name, child in list(module.named_children()):
        if name in KEPT_EXACT:
            continue
        if isinstance(child, nn.Linear) and min(child.weight.shape) >= smallest:
            setattr(module, name, kind(child.weight, child.bias))
        else:
            _replace(child, kind)
    head, embedding = getattr(module, "lm_head", None), getattr(module, "word_embedding", None)
    if not isinstance(head, LmHead) or not isinstance(embedding, nn.Embedding):
        return
    if embedding.embedding_dim >= smallest:
        module.lm_head = PreparedLmHead(head, kind(embedding.weight, head.bias))
