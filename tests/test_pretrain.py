"""The pre-training step with and without text-guided reconstruction."""

from typing import Any

import pytest
import torch
from torch import Tensor

from openblip.data.batches import ImageTextBatch
from openblip.pretrain import (
    ModelRecipe,
    ObjectiveRecipe,
    PretrainRecipe,
    PretrainStep,
    pretraining,
)
from openblip.tokenizer import Tokenizer
from openblip.training.alignment import AlignmentConfig
from openblip.training.loop import StepOutput

MODEL = ModelRecipe(
    image_size_px=16, patch_size_px=8, vision_width=16, vision_layers=1, vision_heads=2,
    text_width=16, text_layers=1, text_heads=2, ffn_width=32, max_positions=12, embedding_width=8,
    dropout=0.0, init_std=0.2,
)  # fmt: skip
TOKENIZER = Tokenizer.train(["red circle blue cross left of"], vocab_size=60, min_frequency=1)


def build(weight: float) -> PretrainStep:
    recipe = PretrainRecipe(
        model=MODEL,
        objective=ObjectiveRecipe(
            reconstruction_weight=weight, alignment=AlignmentConfig(queue_size=8, momentum=0.9)
        ),
    )
    step = pretraining(recipe, [], TOKENIZER).step
    assert isinstance(step, PretrainStep)
    return step.train()


def batch() -> ImageTextBatch:
    tokens = TOKENIZER.encode_batch(
        ["red circle", "blue cross", "cross left of circle"], max_tokens=8
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    return ImageTextBatch(
        images, tokens.token_ids, tokens.text_mask, torch.arange(3), torch.arange(3)
    )


def forward(step: PretrainStep, seed: int = 5) -> StepOutput:
    torch.manual_seed(seed)
    output = step(batch(), 0)
    output.total.backward()
    return output


def values(output: StepOutput) -> dict[str, float]:
    return {name: float(value) for name, value in output.measures.items()}


def test_weight_0_has_no_head_no_measure_and_draws_nothing() -> None:
    step = build(0.0)
    assert not any("reconstruction" in name for name, _ in step.named_parameters())
    output = forward(step)
    assert list(output.measures) == ["loss", "itc", "itm", "lm"]
    # ITM alone draws, after the seed: one column for each text and for each image.
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    for _ in range(2):
        torch.multinomial(torch.ones(3, 3), 1)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_weight_changes_no_other_loss_to_the_bit() -> None:
    plain, joined = build(0.0), build(2.0)
    own = plain.state_dict()
    shared = {name: value for name, value in joined.state_dict().items() if name in own}
    assert shared.keys() == own.keys()
    joined.load_state_dict(joined.state_dict() | own)
    before, after = values(forward(plain)), values(forward(joined))
    assert {name: after[name] for name in ("itc", "itm", "lm")} == {
        name: before[name] for name in ("itc", "itm", "lm")
    }
    assert after["reconstruction"] > 0
    assert after["loss"] == pytest.approx(before["loss"] + 2 * after["reconstruction"], rel=1e-6)


def test_the_random_state_fixes_what_is_hidden() -> None:
    step = build(1.0)
    first, again, other = (values(forward(step, seed)) for seed in (5, 5, 6))
    assert first == again
    assert first["reconstruction"] != other["reconstruction"]


def test_forward_writes_nothing_and_the_twin_takes_no_gradient() -> None:
    step = build(1.0)
    before: dict[str, Any] = {name: value.clone() for name, value in step.state_dict().items()}
    output = forward(step)
    assert all(torch.equal(before[name], value) for name, value in step.state_dict().items())
    assert all(p.grad is None for p in step.alignment.twin.parameters())
    step.after_optimizer_step(output)
    assert step.alignment.queue.pointer.item() == 3


def test_every_trained_tensor_gets_a_gradient() -> None:
    """DDP waits for the gradient of each; a tensor without one would be an error there."""
    step = build(1.0)
    forward(step)
    missing = [n for n, p in step.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_the_target_is_what_the_twin_sees() -> None:
    """Other twins, other losses: the online encoder of the whole image is not the target."""
    step = build(1.0)
    first = values(forward(step))

    def shift(weight: Tensor) -> None:
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))

    shift(step.alignment.twin.vision.patch_weight)
    second = values(forward(step))
    assert second["reconstruction"] != first["reconstruction"]
    assert second["lm"] == first["lm"]
