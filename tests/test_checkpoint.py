from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openblip.checkpoint import (
    initialise_from,
    load_checkpoint,
    load_tokenizer,
    model_id,
    save_checkpoint,
    with_roles,
)
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


def test_a_start_for_larger_images_resizes_the_positions_alone(
    parts: tuple[Blip, Tokenizer],
) -> None:
    blip, _ = parts
    start = initialise_from(blip, frozenset({"decode"}), image_size_px=32)
    own, old = start.blip.state_dict(), blip.state_dict()
    assert start.blip.config.vision.image_size_px == 32
    assert start.resized == ("vision.position_embedding",)
    assert own["vision.position_embedding"].shape == (1, 17, 8)
    assert torch.equal(
        own["vision.position_embedding"][:, :1], old["vision.position_embedding"][:, :1]
    )
    assert all(torch.equal(own[n], old[n]) for n in own if n not in start.resized)
    # Every tensor of the model is in its part or named as left out.
    assert set(start.left_out) == old.keys() - own.keys()
    assert "match_head.weight" in start.left_out
    left_out, resized = start.notes()
    assert f"left out ({len(start.left_out)}): " in left_out
    assert "match_head.weight" in left_out
    assert resized == "tensors resized (1): vision.position_embedding"
    with pytest.raises(ValueError, match="33 is not a multiple"):
        initialise_from(blip, frozenset({"decode"}), image_size_px=33)


@pytest.mark.parametrize("image_size_px", [None, 16])
def test_a_start_of_the_same_size_changes_nothing(
    parts: tuple[Blip, Tokenizer], image_size_px: int | None
) -> None:
    blip, _ = parts
    start = initialise_from(blip, blip.config.text.roles, image_size_px)
    assert start.notes() == []
    assert model_id(start.blip) == model_id(blip)


def test_a_vocabulary_comes_from_any_of_three_places(
    parts: tuple[Blip, Tokenizer], reference: Path, tmp_path: Path
) -> None:
    blip, tokenizer = parts
    save_checkpoint(tmp_path / "model", blip, tokenizer, "")
    ids = tokenizer.encode("a red dog")
    for path in (tmp_path / "model", tmp_path / "model" / "tokenizer.json"):
        assert load_tokenizer(path).encode("a red dog") == ids
    words = (reference / "vocab.txt").read_text("utf-8").splitlines()
    missing = [token for token in ("[DEC]", "[ENC]") if token not in words]
    assert load_tokenizer(reference / "vocab.txt").vocab_size == len(words) + len(missing)


def test_a_broken_vocabulary_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("cat\ncat\n")
    for name, problem in (
        ("tokenizer.json", "no tokenizer"),
        ("vocab.txt", "repeats words"),
        ("absent.txt", "no vocabulary"),
        ("absent.json", "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=problem) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value)
