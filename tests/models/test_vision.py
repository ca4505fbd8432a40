from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from openblip.models.vision import VisionConfig, VisionTransformer, resize_position_embedding

CONFIG = VisionConfig(
    image_size_px=24, patch_size_px=8, width=32, num_layers=2, num_heads=4, init_std=0.2
)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def build(config: VisionConfig = CONFIG) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config).eval()


@torch.no_grad()
def test_an_image_becomes_its_class_state_and_its_patches(images: Tensor) -> None:
    states = build()(images)
    assert states.shape == (3, 1 + CONFIG.num_patches, 32)
    assert CONFIG.num_patches == 9
    assert_close(states.mean(dim=-1), torch.zeros(3, 10), atol=1e-5, rtol=0)  # the last LayerNorm


@torch.no_grad()
def test_an_image_is_encoded_alone_as_in_a_batch(images: Tensor) -> None:
    vision = build()
    assert_close(vision(images)[1:2], vision(images[1:2]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_are_what_a_convolution_gives(images: Tensor) -> None:
    """Without layers and positions, the states are the LayerNorm of the patches, row by row."""
    vision = build(replace(CONFIG, num_layers=0))
    vision.position_embedding.zero_()
    convolved = F.conv2d(images, vision.patch_weight, vision.patch_bias, stride=8)
    expected = vision.norm(convolved.flatten(2).transpose(1, 2))
    assert_close(vision(images)[:, 1:], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_know_their_place(images: Tensor) -> None:
    vision, mirrored = build(), images.flip(-1)
    assert not torch.allclose(vision(images)[:, 0], vision(mirrored)[:, 0], atol=1e-3)


def test_another_size_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="16 x 24 px, the model takes 24 x 24"):
        build()(images[:, :, :16])


@torch.no_grad()
def test_drop_path_is_for_training_alone(images: Tensor) -> None:
    vision, plain = build(replace(CONFIG, drop_path=0.9)), build()
    assert torch.equal(vision(images), plain(images))
    assert not torch.equal(vision.train()(images), plain(images))


@torch.no_grad()
def test_drop_path_grows_with_depth_and_keeps_the_mean(images: Tensor) -> None:
    vision = build(replace(CONFIG, num_layers=3, drop_path=0.4))
    assert [layer.drop_path for layer in vision.layers] == pytest.approx([0.0, 0.2, 0.4])
    layer = vision.layers[2].train()
    states = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    branches = torch.cat([layer._drop_path(torch.ones_like(states)) for _ in range(4000)])
    assert sorted(set(branches[:, 0, 0].tolist())) == pytest.approx([0.0, 1 / 0.6])
    assert branches.mean().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size_px": 20}, "image_size_px 20 is not a multiple of patch_size_px 8"),
        ({"num_heads": 5}, "width 32 is not a multiple of num_heads 5"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_a_resize_keeps_the_class_position_and_flat_grids() -> None:
    positions = torch.ones(1, 1 + 16, 4)
    positions[:, 0] = 7.0
    for num_patches in (9, 16, 36):
        resized = resize_position_embedding(positions, num_patches)
        assert resized.shape == (1, 1 + num_patches, 4)
        assert_close(resized[:, 0], torch.full((1, 4), 7.0))
        assert_close(resized[:, 1:], torch.ones(1, num_patches, 4))


def test_a_resize_keeps_rows_and_columns_apart() -> None:
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
    positions = torch.cat([torch.zeros(1, 1, 1), rows], dim=1)
    grid = resize_position_embedding(positions, 64)[0, 1:, 0].view(8, 8)
    assert_close(grid, grid[:, :1].expand(8, 8))
    assert (grid[1:, 0] > grid[:-1, 0]).all()


@pytest.mark.parametrize(("old", "new"), [(8, 16), (16, 8)])
def test_grids_that_are_not_square_are_refused(old: int, new: int) -> None:
    with pytest.raises(ValueError, match=f"{old} positions to {new}: not square"):
        resize_position_embedding(torch.zeros(1, 1 + old, 4), new)
