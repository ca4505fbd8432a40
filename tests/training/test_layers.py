"""What is done to the layers of a training step changes no number, and is undone at the end."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from openblip.data.batches import ImageTextBatch
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, MedLayer, SpecialTokens
from openblip.models.vision import VisionConfig, VisionLayer
from openblip.pretrain import ObjectiveRecipe, PretrainStep
from openblip.training.alignment import AlignmentConfig
from openblip.training.layers import compiled, recomputed, transformer_layers
from openblip.training.optim import OptimizerRecipe, build_optimizer


def new_step(dropout: float = 0.3) -> PretrainStep:
    torch.manual_seed(3)
    config = BlipConfig(
        VisionConfig(16, 8, 16, 2, 2, drop_path=dropout, init_std=0.2),
        MedConfig(30, 16, 2, 2, 32, 16, 16, dropout=dropout, init_std=0.2),
        SpecialTokens(0, 2, 3, 5, 6),
        embedding_width=8,
    )
    objective = ObjectiveRecipe(alignment=AlignmentConfig(queue_size=6, momentum=0.9))
    return PretrainStep(Blip(config), objective).train()


def batch(seed: int) -> ImageTextBatch:
    torch.manual_seed(seed)
    token_ids = torch.randint(7, 30, (4, 7))
    text_mask = torch.ones_like(token_ids)
    text_mask[1, 5:] = 0
    ids = torch.arange(4)
    return ImageTextBatch(torch.randn(4, 3, 16, 16), token_ids, text_mask, ids, ids)


@dataclass(frozen=True)
class Seen:
    losses: list[float]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def train(step: PretrainStep, dtype: torch.dtype | None = None, num_batches: int = 2) -> Seen:
    """Take two optimizer steps of several batches each."""
    optimizer = build_optimizer(step, OptimizerRecipe(lr=0.01))
    losses, gradients = [], {}
    for number in range(2):
        optimizer.zero_grad()
        outputs = []
        for part in range(num_batches):
            inputs = batch(10 * number + part)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                outputs.append(step(inputs, number))
            outputs[-1].total.backward()
        losses += [output.total.item() for output in outputs]
        gradients |= {
            f"{number} {name}": parameter.grad.clone()
            for name, parameter in step.named_parameters()
            if parameter.grad is not None
        }
        optimizer.step()
        for output in outputs:
            step.after_optimizer_step(output)
    return Seen(losses, gradients, {k: v.clone() for k, v in step.state_dict().items()})


def check_equal(one: Seen, other: Seen) -> None:
    assert one.losses == other.losses
    for first, second in ((one.gradients, other.gradients), (one.state, other.state)):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_recomputed_layers_give_the_same_numbers_with_dropout(dtype: torch.dtype | None) -> None:
    """Losses, gradients, weights, twin and queue, bit by bit, under accumulation."""
    plain = train(new_step(), dtype)
    step = new_step()
    with recomputed(step):
        other = train(step, dtype)
    assert any(name.startswith("alignment.twin") for name in plain.state)
    check_equal(plain, other)
    # Dropout was at work: without it the numbers are others.
    assert train(new_step(0.0), dtype).losses != plain.losses


def saved_bytes(step: PretrainStep) -> int:
    """Return the bytes of what a forward keeps for its backward pass, weights left out."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in step.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = step(batch(0), 0)
    output.total.backward()
    return sum(kept.values())


def test_recomputed_layers_keep_less() -> None:
    plain = saved_bytes(new_step())
    step = new_step()
    with recomputed(step):
        assert saved_bytes(step) < plain / 2


def test_trained_layers_alone_are_recomputed() -> None:
    step = new_step()
    calls: list[nn.Module] = []
    forward: Callable = VisionLayer.forward

    def counted(self: VisionLayer, states: Tensor) -> Tensor:
        calls.append(self)
        return forward(self, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionLayer, "forward", counted)
        with recomputed(step):
            step(batch(0), 0).total.backward()
    for layer in step.blip.vision.layers:
        assert calls.count(layer) == 2
    for layer in step.alignment.twin.vision.layers:
        assert calls.count(layer) == 1


def test_the_layers_are_as_before_at_the_end() -> None:
    step = new_step()
    layers = list(transformer_layers(step))
    assert {type(layer) for layer, _ in layers} == {VisionLayer, MedLayer}
    before = [dict(vars(layer)) for layer, _ in layers]
    with recomputed(step):
        assert [dict(vars(layer)) for layer, _ in layers] != before
    assert [dict(vars(layer)) for layer, _ in layers] == before


def check_close(one: Seen, other: Seen, tolerance: float) -> None:
    assert one.losses == pytest.approx(other.losses, abs=tolerance)
    assert one.gradients.keys() == other.gradients.keys()
    first = [name for name in one.gradients if name.startswith("0 ")]
    for name in first:
        assert_close(one.gradients[name], other.gradients[name], atol=tolerance, rtol=1e-4)
    # What resumes and is saved has the same names.
    assert one.state.keys() == other.state.keys()


def test_every_call_of_every_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_calls: list[str] = []

    def noted(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(*arguments: Tensor) -> Tensor:
            compiled_calls.append(call.__name__)
            return call(*arguments)

        return noting

    monkeypatch.setattr(torch, "compile", noted)
    step = new_step()
    with compiled(step):
        step(batch(0), 0)
    # Two layers each, and the twin's.
    assert {name: compiled_calls.count(name) for name in set(compiled_calls)} == {
        "forward": 4, "encode": 4, "encode_pair": 2, "decode": 2, "project_context": 2,
    }  # fmt: skip


@pytest.mark.slow
def test_compiled_layers_are_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the last stage of torch.compile, which needs a compiler and minutes."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    plain = train(new_step(0.0))
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    step = new_step(0.0)
    with compiled(step), recomputed(step):
        check_close(train(step), plain, 1e-6)


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    plain = train(new_step(0.0))
    step = new_step(0.0)
    with compiled(step):
        check_close(train(step), plain, 1e-5)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openblip.training.layers.shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile: there is no C\+\+ compiler"):
        compiled(new_step()).__enter__()
