"""Prepared linear layers give what plain ones give, within what their precision can."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from openblip import kernels
from openblip.kernels import FEW_ROWS, Int8Linear, PackedLinear, PreparedLmHead, is_x86, prepare
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig

needs_x86 = pytest.mark.skipif(not is_x86(), reason="weights are laid out on x86 processors alone")


def blip(width: int = 256) -> Blip:
    torch.manual_seed(0)
    vision = VisionConfig(image_size_px=16, patch_size_px=8, width=width, num_layers=1, num_heads=2)
    text = MedConfig(
        vocab_size=300, width=width, num_layers=1, num_heads=2, ffn_width=2 * width,
        max_positions=20, context_width=width,
    )  # fmt: skip
    return Blip(BlipConfig(vision, text, SpecialTokens(0, 1, 2, 298, 299), 256)).eval()


@needs_x86
@pytest.mark.parametrize("shape", [(1, 300), (FEW_ROWS.start, 300), (2, 30, 300), (700, 300)])
@pytest.mark.parametrize("is_slow", [False, True])
def test_a_laid_out_layer_is_the_layer(
    shape: tuple[int, ...], is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "is_default_library_slow", lambda: is_slow)
    torch.manual_seed(1)
    linear = nn.Linear(300, 260)
    states = torch.randn(shape)
    with torch.no_grad():
        packed = PackedLinear(linear.weight, linear.bias)
        assert_close(packed(states), linear(states), atol=1e-5, rtol=1e-5)
        half = PackedLinear(linear.weight.bfloat16(), linear.bias.bfloat16())
        assert_close(half(states.bfloat16()).float(), linear(states), atol=3e-2, rtol=3e-2)


@needs_x86
def test_int8_errs_by_no_more_than_rounding() -> None:
    """Each factor is off by half a step at most: the bound on the sum of the products is exact."""
    torch.manual_seed(2)
    linear, states = nn.Linear(300, 260), torch.randn(40, 300) * torch.rand(40, 1)
    with torch.no_grad():
        expected, found = linear(states), Int8Linear(linear.weight, linear.bias)(states)
        weight_step = linear.weight.abs().amax(dim=1) / 127 / 2
        state_step = states.abs().amax(dim=1, keepdim=True) / 127 / 2
        bound = states.abs().sum(dim=1, keepdim=True) * weight_step
        bound += state_step * (linear.weight.abs() + weight_step[:, None]).sum(dim=1)
        assert ((found - expected).abs() <= bound + 1e-5).all()
        assert (found - expected).abs().mean() > 1e-5  # it is int8


@needs_x86
def test_no_row_of_int8_changes_another() -> None:
    torch.manual_seed(3)
    layer = Int8Linear(torch.randn(64, 96), None)
    rows = torch.randn(5, 96)
    together = layer(torch.cat([rows, 1000 * torch.randn(3, 96)]))[:5]
    assert torch.equal(together, torch.cat([layer(row[None]) for row in rows]))
    assert torch.equal(layer(torch.zeros(2, 96)), torch.zeros(2, 64))


@needs_x86
def test_what_is_prepared_shares_weights_and_leaves_the_model() -> None:
    model = blip()
    prepared = prepare(model, "float32")
    assert isinstance(prepared.vision.layers[0].qkv, PackedLinear)
    assert isinstance(prepared.text.lm_head, PreparedLmHead)
    assert isinstance(prepared.match_head, nn.Linear)
    assert isinstance(model.vision.layers[0].qkv, nn.Linear)
    assert (
        prepared.vision.layers[0].qkv.weight.data_ptr()
        == model.vision.layers[0].qkv.weight.data_ptr()
    )
    half = prepare(model, "bfloat16")
    assert half.vision.class_token.dtype == torch.bfloat16
    assert model.vision.class_token.dtype == torch.float32
    assert prepare(model, "float32", prepack=False) is model
    small = prepare(blip(32), "float32")
    assert isinstance(small.vision.layers[0].qkv, nn.Linear)
    assert isinstance(prepare(blip(32), "int8").vision.layers[0].qkv, Int8Linear)


def test_a_precision_that_a_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="float16 is for GPUs"):
        prepare(blip(32), "float16")
    monkeypatch.setattr(kernels, "is_x86", lambda: False)
    with pytest.raises(ValueError, match="int8 needs an x86 processor"):
        prepare(blip(32), "int8")
    assert kernels.best_precision(torch.device("cpu")) == "float32"
    prepared = prepare(blip(), "float32")
    states = torch.randn(3, 256)
    layer = prepared.vision.layers[0].qkv
    assert_close(layer(states), F.linear(states, layer.weight, layer.bias))


@needs_x86
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_plain_module_has_the_weights_that_run_and_gradients(precision: str) -> None:
    model = blip()
    layer = prepare(model, precision).text.layers[0]  # type: ignore[arg-type]
    before = set(map(type, layer.modules()))
    plain = kernels.plain(layer)
    assert before == set(map(type, layer.modules())) != set(map(type, plain.modules()))
    own = plain.up.weight
    assert (own.dtype, plain.training) == (torch.float32, False)
    original = model.text.layers[0].up
    if precision == "float32":
        assert own.data_ptr() == original.weight.data_ptr()
    assert_close(own, original.weight, atol=2e-3, rtol=0)
    states = torch.randn(3, 5, 256, requires_grad=True)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with torch.no_grad():
        expected = layer.up(states.to(dtype)).float()
    found = plain.up(states)
    assert_close(found, expected, atol={"float32": 1e-5}.get(precision, 0.02), rtol=0.02)
    plain.feed_forward(states).sum().backward()
    assert states.grad is not None
