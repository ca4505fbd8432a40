"""A head for a model that is there: what is trained, and what is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openblip.checkpoint import load_checkpoint, save_checkpoint
from openblip.data.batches import ImageTextBatch
from openblip.data.world import WorldConfig, draw_world
from openblip.finetune.reconstruction import (
    ReconstructionRun,
    ReconstructionStep,
    run_reconstruction,
    with_reconstruction,
)
from openblip.models.blip import Blip
from openblip.models.reconstruction import ReconstructionConfig
from openblip.pretrain import ModelRecipe
from openblip.tokenizer import Tokenizer

MODEL = ModelRecipe(
    image_size_px=32, patch_size_px=16, vision_width=16, vision_layers=2, vision_heads=2,
    drop_path=0.3, text_width=16, text_layers=1, text_heads=2, ffn_width=32, max_positions=40,
    embedding_width=8, dropout=0.5, init_std=0.2,
)  # fmt: skip
CONFIG = ReconstructionConfig(num_layers=1)
TOKENIZER = Tokenizer.train(["red circle blue cross left of"], vocab_size=80, min_frequency=1)


@pytest.fixture
def blip() -> Blip:
    torch.manual_seed(0)
    return Blip(MODEL.build_config(TOKENIZER))


def test_the_head_alone_is_trained_and_nothing_is_dropped_out(blip: Blip) -> None:
    step = ReconstructionStep(with_reconstruction(blip, CONFIG), CONFIG)
    step.train()
    tokens = TOKENIZER.encode_batch(["red circle", "blue cross"], max_tokens=8)
    ids = torch.arange(2)
    batch = ImageTextBatch(torch.randn(2, 3, 32, 32), tokens.token_ids, tokens.text_mask, ids, ids)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        output = step(batch, 0)
        losses.append(output.total.item())
    assert losses[0] == losses[1]
    # Dropout would take random numbers: what hides patches takes these alone.
    drawn = torch.get_rng_state()
    torch.manual_seed(3)
    torch.rand(2, 4)
    assert torch.equal(torch.get_rng_state(), drawn)
    output.total.backward()
    for name, parameter in step.named_parameters():
        is_head = name.startswith("blip.reconstruction_head.")
        assert (parameter.grad is not None) == parameter.requires_grad == is_head, name


def test_another_head_takes_the_place_of_the_one_that_is_there(blip: Blip) -> None:
    first = with_reconstruction(blip, ReconstructionConfig(num_layers=1))
    second = with_reconstruction(first, ReconstructionConfig(num_layers=3))
    assert second.config.reconstruction == ReconstructionConfig(num_layers=3)
    assert len(second.reconstruction_head.layers) == 3
    for name, value in blip.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_a_model_without_text_encoder_is_refused(blip: Blip) -> None:
    captioner = Blip(blip.config.with_roles(frozenset({"decode"})))
    with pytest.raises(ValueError, match="needs the role 'text'; the model has decode"):
        with_reconstruction(captioner, ReconstructionConfig())


def test_a_run_leaves_a_checkpoint_with_a_head_and_all_else_as_it_was(
    blip: Blip, tmp_path: Path
) -> None:
    draw_world(WorldConfig(num_web=1, num_human=8, num_test=2), tmp_path)
    save_checkpoint(tmp_path / "base", blip, TOKENIZER, "# base\n")
    run = ReconstructionRun(
        data=(str(tmp_path / "human"),), init=str(tmp_path / "base"), num_steps=11, batch_size=4
    )
    result = run_reconstruction(run, tmp_path / "new")
    model, _ = load_checkpoint(tmp_path / "new")
    assert model.config == replace(blip.config, reconstruction=run.reconstruction)
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in blip.state_dict().items())
    lines = (tmp_path / "new.log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10]
    assert result["last_step"]["reconstruction"] > 0
    assert "unchanged" in result["notes"][0]
    plain = json.loads((tmp_path / "base" / "config.json").read_text())
    assert "reconstruction" not in plain
    with pytest.raises(ValueError, match="exists"):
        run_reconstruction(run, tmp_path / "new")
