from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from openblip.models.blip import Blip, BlipConfig
from openblip.models.reconstruction import (
    MAX_WAYS_TO_HIDE,
    ReconstructionConfig,
    ReconstructionHead,
    draw_visible,
    is_hidden,
    ways_to_see,
)
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig

VISION = VisionConfig(
    image_size_px=32, patch_size_px=8, width=32, num_layers=2, num_heads=2, init_std=0.3
)
CONFIG = BlipConfig(
    vision=VISION,
    text=MedConfig(
        vocab_size=30, width=24, num_layers=2, num_heads=2, ffn_width=32, max_positions=12,
        context_width=32, init_std=0.3,
    ),
    tokens=SpecialTokens(pad=0, cls=1, sep=2, dec=28, enc=29),
    embedding_width=8,
    reconstruction=ReconstructionConfig(num_layers=2, hidden_share=0.75),
)  # fmt: skip
CPU = torch.device("cpu")
TOKENS = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 8, 9, 2]])
MASK = (TOKENS != 0).long()
VISIBLE = torch.tensor([[0, 3, 7, 9], [1, 2, 4, 15]])


@pytest.fixture
def blip() -> Blip:
    torch.manual_seed(0)
    return Blip(CONFIG).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def reconstruct(blip: Blip, images: Tensor, tokens: Tensor = TOKENS, mask: Tensor = MASK) -> Tensor:
    return blip.reconstruct(images, VISIBLE, blip.encode_text(tokens, mask), mask)


@torch.no_grad()
def test_every_place_is_predicted(blip: Blip, images: Tensor) -> None:
    assert reconstruct(blip, images).shape == (2, 17, 32)


@torch.no_grad()
def test_what_is_hidden_changes_nothing(blip: Blip, images: Tensor) -> None:
    other = images.clone()
    other[0, :, 0:8, 8:16] += 1.0  # patch 1
    other[1, :, 0:8, 0:8] += 1.0  # patch 0
    assert torch.equal(reconstruct(blip, images), reconstruct(blip, other))
    other[0, :, 0:8, 24:32] += 1.0  # patch 3, which is visible
    change = (reconstruct(blip, images) - reconstruct(blip, other)).abs().amax(dim=(1, 2))
    assert change[0] > 1e-3
    assert change[1] == 0


@torch.no_grad()
def test_the_text_is_read_and_its_padding_is_not(blip: Blip, images: Tensor) -> None:
    before = reconstruct(blip, images)
    changed = TOKENS.clone()
    changed[0, 1] = 11
    assert (reconstruct(blip, images, changed) - before)[0].abs().max() > 1e-3
    padded, mask = (torch.nn.functional.pad(rows, (0, 3)) for rows in (TOKENS, MASK))
    padded[:, 5:] = 13
    assert_close(reconstruct(blip, images, padded, mask), before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_visible_patches_alone_are_what_an_image_of_them_would_be(
    blip: Blip, images: Tensor
) -> None:
    everything = torch.arange(16).expand(2, -1)
    assert torch.equal(blip.vision.encode_visible(images, everything), blip.encode_image(images))
    # The order of the patches is no information: their places are.
    turned = blip.vision.encode_visible(images, VISIBLE.flip(1))
    straight = blip.vision.encode_visible(images, VISIBLE)
    assert_close(turned[:, 0], straight[:, 0], atol=1e-5, rtol=0)
    assert_close(turned[:, 1:].flip(1), straight[:, 1:], atol=1e-5, rtol=0)


def test_gradients_reach_head_image_and_text_encoder(blip: Blip, images: Tensor) -> None:
    reconstruct(blip, images).square().sum().backward()
    reached = {name for name, p in blip.named_parameters() if p.grad is not None and p.grad.any()}
    head = {name for name, _ in blip.named_parameters() if name.startswith("reconstruction_head")}
    assert head <= reached
    assert any(name.startswith("vision.layers.0") for name in reached)
    assert any(name.startswith("text.layers.0") for name in reached)


@pytest.mark.parametrize(
    ("share", "patches", "visible"), [(0.75, 16, 4), (0.5, 4, 2), (0.01, 4, 3), (0.99, 4, 1)]
)
def test_the_share_says_how_many_stay_visible(share: float, patches: int, visible: int) -> None:
    assert ReconstructionConfig(hidden_share=share).num_visible(patches) == visible


def test_the_draw_is_fair_and_comes_from_the_random_state() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    drawn = draw_visible(4000, 8, 2, CPU)
    assert drawn.shape == (4000, 2)
    assert (drawn[:, 0] < drawn[:, 1]).all()
    share = torch.bincount(drawn.flatten(), minlength=8) / 4000
    assert_close(share, torch.full((8,), 0.25), atol=0.03, rtol=0)
    assert not torch.equal(draw_visible(4000, 8, 2, CPU), drawn)
    torch.set_rng_state(state)
    assert torch.equal(draw_visible(4000, 8, 2, CPU), drawn)


def test_cls_is_always_hidden() -> None:
    hidden = is_hidden(VISIBLE, 16)
    assert hidden[:, 0].all()
    assert hidden.sum(dim=1).tolist() == [13, 13]
    assert not hidden[0, [1, 4, 8, 10]].any()


def test_the_head_is_said_in_the_configuration_and_nowhere_else() -> None:
    assert BlipConfig.from_json(CONFIG.to_json()) == CONFIG
    plain = replace(CONFIG, reconstruction=None)
    assert "reconstruction" not in plain.to_json()
    assert BlipConfig.from_json(plain.to_json()) == plain
    names = {name for name, _ in Blip(CONFIG).named_parameters()}
    assert {n for n in names if n.startswith("reconstruction_head")} == names - {
        name for name, _ in Blip(plain).named_parameters()
    }
    values = CONFIG.to_json()
    values["reconstruction"]["depth"] = 3
    with pytest.raises(ValueError, match=r"reconstruction: .*unknown keys \['depth'\]"):
        BlipConfig.from_json(values)


def test_a_model_without_a_head_says_so(images: Tensor) -> None:
    blip = Blip(replace(CONFIG, reconstruction=None))
    with pytest.raises(ValueError, match="no reconstruction head"):
        reconstruct(blip, images)
    with pytest.raises(ValueError, match="no reconstruction head"):
        blip.refine_image(images, TOKENS, MASK)


@pytest.mark.parametrize(
    "values", [{"hidden_share": 0.0}, {"hidden_share": 1.0}, {"num_layers": 0}]
)
def test_sizes_that_cannot_be_are_named(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        ReconstructionConfig(**values)


def test_an_image_of_one_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="one patch"):
        ReconstructionHead(ReconstructionConfig(), replace(VISION, patch_size_px=32), 24)


@torch.no_grad()
def test_refined_embeddings_follow_image_and_text_and_no_other_row(
    blip: Blip, images: Tensor
) -> None:
    refined = blip.refine_image(images, TOKENS, MASK)
    assert refined.shape == (2, 8)
    assert_close(refined.norm(dim=1), torch.ones(2))
    assert_close(blip.refine_image(images[1:], TOKENS[1:], MASK[1:]), refined[1:])
    changed = TOKENS.clone()
    changed[0, 1] = 11
    other = blip.refine_image(images, changed, MASK)
    assert not torch.allclose(other[0], refined[0], atol=1e-3)
    assert_close(other[1], refined[1])
    assert not torch.allclose(blip.refine_image(images.flip(0), TOKENS, MASK), refined, atol=1e-3)


def test_all_ways_to_hide_are_tried_or_always_the_same() -> None:
    assert ways_to_see(4, 2).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    many = ways_to_see(196, 49)
    assert many.shape == (MAX_WAYS_TO_HIDE, 49)
    assert (many.diff(dim=1) > 0).all()
    torch.rand(3)
    assert torch.equal(ways_to_see(196, 49), many)
