"""Texts without padding are encoded as texts with it."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from openblip.models.blip import Blip, BlipConfig
from openblip.models.packed import PackedTexts, encode_first
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig

TOKENS = SpecialTokens(0, 1, 2, 38, 39)
LENGTHS = [5, 2, 9, 5, 7, 2, 9]
OWNERS = [2, 0, 0, 1, 2, 2, 0]


@pytest.fixture(scope="module")
def blip() -> Blip:
    torch.manual_seed(0)
    vision = VisionConfig(
        image_size_px=16, patch_size_px=8, width=16, num_layers=2, num_heads=2, init_std=0.3
    )
    text = MedConfig(
        vocab_size=40, width=24, num_layers=3, num_heads=3, ffn_width=40, max_positions=12,
        context_width=16, init_std=0.3,
    )  # fmt: skip
    return Blip(BlipConfig(vision, text, TOKENS, 8)).eval()


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(LENGTHS) + 2) < torch.tensor(LENGTHS)[:, None]).long()
    return torch.randint(3, 38, mask.shape, generator=generator) * mask, mask


@pytest.mark.parametrize("owners", [None, OWNERS, [1] * 7])
@torch.no_grad()
def test_first_states_are_those_of_padded_texts(
    blip: Blip, texts: tuple[Tensor, Tensor], owners: list[int] | None
) -> None:
    ids, mask = texts
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    context = blip.project_context(blip.encode_image(images))
    first = TOKENS.cls if owners is None else TOKENS.enc
    packed = PackedTexts.of(ids, mask, first, owners)
    assert len(packed.token_ids) == sum(LENGTHS)
    found = encode_first(blip.text, packed, None if owners is None else context)
    for row, length in enumerate(LENGTHS):
        one, seen = ids[row : row + 1, :length], mask[row : row + 1, :length]
        if owners is None:
            expected = blip.encode_text(one, seen)
        else:
            expected = blip.encode_pair(one, seen, context.select(torch.tensor([owners[row]])))
        assert_close(found[row], expected[0, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_s_own_state_alone(blip: Blip) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    alone = blip.vision.class_state(images)
    assert alone.shape == (3, 1, 16)
    assert_close(alone, blip.encode_image(images)[:, :1], atol=1e-5, rtol=1e-5)
