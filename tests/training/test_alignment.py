import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.training.alignment import Alignment, AlignmentConfig, AlignmentOutput, WrongTexts

PAIRS = 4
TOKEN_IDS = torch.tensor([[1, 5 + i, 9 + i, 12, 6 + 2 * i, 2] for i in range(PAIRS)])


def align(
    config: AlignmentConfig, image_ids: Tensor, wrong_texts: WrongTexts | None = None
) -> tuple[list[Tensor], AlignmentOutput]:
    """Return the mining weights drawn from (of images, of texts), and what came out."""
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
    token_ids = TOKEN_IDS
    seen: list[Tensor] = []

    def draw(weights: Tensor) -> Tensor:
        seen.append(weights)
        return weights.argmax(dim=1)

    image_states = blip.encode_image(images)
    output = alignment(
        blip, images, image_states, blip.project_context(image_states), token_ids,
        torch.ones_like(token_ids), image_ids, torch.arange(PAIRS), 0.4, draw, wrong_texts,
    )  # fmt: skip
    return seen, output


@pytest.mark.parametrize("mining", ["momentum", "online", "uniform"])
def test_a_positive_is_never_a_negative(mining: str) -> None:
    config = AlignmentConfig(positives="image", mining=mining, queue_size=8)
    seen, output = align(config, torch.tensor([7, 7, 8, 9]))
    assert output.num_without_negative == 0
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
    seen, output = align(config, torch.full((PAIRS,), 7))
    assert output.num_without_negative == 2 * PAIRS
    assert all(weights.shape[0] == 0 for weights in seen)


def test_a_wrong_text_takes_the_place_of_the_drawn_one_however_it_is_padded() -> None:
    config, ids = AlignmentConfig(mining="online", queue_size=8), torch.arange(PAIRS)
    seen, drawn = align(config, ids)
    text_of = seen[1].argmax(dim=1)
    rows = torch.tensor([1, 3])
    padded = F.pad(TOKEN_IDS[text_of[rows]], (0, 2))
    same = WrongTexts(rows, padded, (torch.arange(8) < 6).long().expand(2, 8))
    torch.testing.assert_close(align(config, ids, same)[1].match_logits, drawn.match_logits)
    other = WrongTexts(rows, torch.tensor([[1, 19, 2]]).expand(2, 3), torch.ones(2, 3).long())
    logits = align(config, ids, other)[1].match_logits
    changed = (logits - drawn.match_logits).abs().amax(dim=1) > 1e-4
    assert changed.nonzero().flatten().tolist() == (2 * PAIRS + rows).tolist()


def test_a_wrong_text_serves_an_image_that_has_no_negative() -> None:
    config, ids = (
        AlignmentConfig(positives="image", mining="online", queue_size=8),
        torch.ones(PAIRS),
    )
    wrong = WrongTexts(torch.tensor([2]), torch.tensor([[1, 19, 2]]), torch.ones(1, 3).long())
    output = align(config, ids.long(), wrong)[1]
    assert output.match_logits.shape[0] == PAIRS + 1
    assert output.num_without_negative == 2 * PAIRS - 1
