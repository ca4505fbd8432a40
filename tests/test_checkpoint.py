from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openblip.checkpoint import load_checkpoint, model_id, save_checkpoint, with_roles
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer


@pytest.fixture
def parts() -> tuple[Blip, Tokenizer]:
    tokenizer = Tokenizer.train(["a red cat", "a blue dog"], vocab_size=60, min_frequency=1)
    config = BlipConfig(
        vision=VisionConfig(image_size_px=16, patch_size_px=8, width=8, num_layers=1, num_heads=2),
        text=MedConfig(
            vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=2, ffn_width=16,
            max_positions=10, context_width=8,
        ),
        tokens=tokenizer.special,
        embedding_width=4,
    )  # fmt: skip
    return Blip(config), tokenizer


def test_a_checkpoint_comes_back_bit_equal(parts: tuple[Blip, Tokenizer], tmp_path: Path) -> None:
    blip, tokenizer = parts
    save_checkpoint(tmp_path / "model", blip, tokenizer, "# A card\n")
    loaded, words = load_checkpoint(tmp_path / "model")
    assert loaded.config == blip.config
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), blip.parameters(), strict=True)
    )
    assert words.encode("a red dog") == tokenizer.encode("a red dog")
    assert model_id(loaded) == model_id(blip)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match="exists"):
        save_checkpoint(tmp_path / "model", blip, tokenizer, "")


def test_loading_lists_what_does_not_fit(parts: tuple[Blip, Tokenizer], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", *parts, "")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["stranger"] = tensors.pop("match_head.bias")
    tensors["vision.norm.bias"] = torch.zeros(3)
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"match_head\.bias") as caught:
        load_checkpoint(tmp_path / "model")
    assert "extra stranger" in str(caught.value)
    assert "vision.norm.bias is (3,), expected (8,)" in str(caught.value)
    with pytest.raises(ValueError, match=r"lacks config\.json"):
        load_checkpoint(tmp_path)


def test_a_part_shares_no_memory_and_has_its_own_id(parts: tuple[Blip, Tokenizer]) -> None:
    blip, _ = parts
    captioner = with_roles(blip, frozenset({"decode"}))
    assert model_id(captioner) != model_id(blip)
    before = captioner.text.word_embedding.weight.clone()
    with torch.no_grad():
        blip.text.word_embedding.weight.zero_()
    assert torch.equal(captioner.text.word_embedding.weight, before)
    with pytest.raises(ValueError, match="the model has decode"):
        with_roles(captioner, frozenset({"pair"}))
