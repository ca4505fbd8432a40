"""Properties of the MED's roles on a tiny random model."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig

CONFIG = BlipConfig(
    vision=VisionConfig(
        image_size_px=16, patch_size_px=8, width=16, num_layers=2, num_heads=2, init_std=0.3
    ),
    text=MedConfig(
        vocab_size=30, width=12, num_layers=2, num_heads=2, ffn_width=24, max_positions=12,
        context_width=16, init_std=0.3,
    ),
    tokens=SpecialTokens(pad=0, cls=1, sep=2, dec=28, enc=29),
    embedding_width=8,
)  # fmt: skip


@pytest.fixture
def blip() -> Blip:
    torch.manual_seed(0)
    return Blip(CONFIG).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


TOKENS = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 3, 2]])
MASK = (TOKENS != 0).long()


@torch.no_grad()
def test_padding_never_changes_a_result(blip: Blip, images: torch.Tensor) -> None:
    context = blip.project_context(blip.encode_image(images))
    first = context.select(torch.tensor([0]))
    short, short_mask = TOKENS[:1, :4], MASK[:1, :4]
    assert_close(blip.encode_text(TOKENS, MASK)[:1, :4], blip.encode_text(short, short_mask))
    padded = blip.encode_pair(TOKENS, MASK, context)[:1, :4]
    assert_close(padded, blip.encode_pair(short, short_mask, first))
    padded = blip.decode(TOKENS, MASK, context)[:1, :4]
    assert_close(padded, blip.decode(short, short_mask, first))


@torch.no_grad()
def test_a_causal_position_ignores_the_future(blip: Blip, images: torch.Tensor) -> None:
    context = blip.project_context(blip.encode_image(images))
    changed = TOKENS.clone()
    changed[1, 4] = 11
    before, after = (blip.decode(ids, MASK, context) for ids in (TOKENS, changed))
    assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[1, 4], after[1, 4])


@torch.no_grad()
def test_cached_decoding_equals_uncached(blip: Blip, images: torch.Tensor) -> None:
    context = blip.project_context(blip.encode_image(images))
    ids = TOKENS[:, :4].clone()
    ids[:, 0] = CONFIG.tokens.dec
    whole = blip.decode(ids, torch.ones_like(ids), context)
    cache = blip.new_decoder_cache()
    assert_close(blip.decode_step(ids[:, :2], cache, context), whole[:, 1])
    assert_close(blip.decode_step(ids[:, 2:3], cache, context), whole[:, 2])
    cache.reorder(torch.tensor([1, 0]))
    swapped = context.select(torch.tensor([1, 0]))
    assert_close(blip.decode_step(ids[:, 3:].flip(0), cache, swapped), whole[:, 3].flip(0))


@torch.no_grad()
def test_rows_grouped_by_image_equal_repeated_images(blip: Blip, images: torch.Tensor) -> None:
    context = blip.project_context(blip.encode_image(images))
    ids, mask = TOKENS.repeat(2, 1), MASK.repeat(2, 1)
    repeated = context.select(torch.tensor([0, 0, 1, 1]))
    assert_close(blip.encode_pair(ids, mask, context), blip.encode_pair(ids, mask, repeated))


def test_an_absent_role_raises(images: torch.Tensor) -> None:
    captioner = Blip(CONFIG.with_roles(frozenset({"decode"})))
    with pytest.raises(ValueError, match="no role 'text'"):
        captioner.encode_text(TOKENS, MASK)
    with pytest.raises(ValueError, match="no role 'text'"):
        captioner.embed_image(captioner.encode_image(images))
    assert not any("bidirectional" in name for name, _ in captioner.named_parameters())


def test_a_config_survives_json_and_names_unknown_keys() -> None:
    assert BlipConfig.from_json(CONFIG.to_json()) == CONFIG
    with pytest.raises(ValueError, match="colour"):
        BlipConfig.from_json(CONFIG.to_json() | {"colour": 1})
    with pytest.raises(ValueError, match="context_width"):
        replace(CONFIG, text=replace(CONFIG.text, context_width=99))
