import pytest
import torch
from torch import Tensor

from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.training.alignment import Alignment, AlignmentConfig

PAIRS = 4


def align(config: AlignmentConfig, image_ids: Tensor) -> tuple[list[Tensor], int]:
    """Return the mining weights drawn from (of images, of texts), and how many rows had none."""
    torch.manual_seed(0)
    blip = Blip(
        BlipConfig(
            VisionConfig(
                image_size_px=16, patch_size_px=8, width=32, num_layers=1, num_heads=2, init_std=0.2
            ),
            MedConfig(
                vocab_size=20, width=32, num_layers=1, num_heads=2, ffn_width=32, max_positions=8,
                context_width=32, dropout=0.0, init_std=0.2, roles=frozenset({"text", "pair"}),
            ),
            SpecialTokens(pad=0, cls=1, sep=2, dec=3, enc=4),
            embedding_width=16,
        )
    )  # fmt: skip
    alignment = Alignment(blip, config)
    images = torch.randn(PAIRS, 3, 16, 16)
    token_ids = torch.randint(5, 20, (PAIRS, 6))
    seen: list[Tensor] = []

    def draw(weights: Tensor) -> Tensor:
        seen.append(weights)
        return weights.argmax(dim=1)

    image_states = blip.encode_image(images)
    output = alignment(
        blip, images, image_states, blip.project_context(image_states), token_ids,
        torch.ones_like(token_ids), image_ids, torch.arange(PAIRS), 0.4, draw,
    )  # fmt: skip
    return seen, output.num_without_negative


@pytest.mark.parametrize("mining", ["momentum", "online", "uniform"])
def test_a_positive_is_never_a_negative(mining: str) -> None:
    config = AlignmentConfig(positives="image", mining=mining, queue_size=8)
    seen, num_left_out = align(config, torch.tensor([7, 7, 8, 9]))
    assert num_left_out == 0
    for weights in seen:
        assert (weights[0, :2] == 0).all()
        assert (weights[1, :2] == 0).all()
        assert (weights.sum(dim=1) > 0).all()


def test_uniform_mining_prefers_none_and_hard_mining_does() -> None:
    ids = torch.arange(PAIRS)
    for weights in align(AlignmentConfig(mining="uniform", queue_size=8), ids)[0]:
        positive = weights[weights > 0]
        assert positive.numel() == PAIRS * (PAIRS - 1)
        assert torch.equal(positive, positive[:1].expand_as(positive))
    for weights in align(AlignmentConfig(mining="online", queue_size=8), ids)[0]:
        assert weights[weights > 0].unique().numel() > 1


def test_rows_without_a_negative_are_left_out_and_counted() -> None:
    config = AlignmentConfig(positives="image", mining="online", queue_size=8)
    seen, num_left_out = align(config, torch.full((PAIRS,), 7))
    assert num_left_out == 2 * PAIRS
    assert all(weights.shape[0] == 0 for weights in seen)
