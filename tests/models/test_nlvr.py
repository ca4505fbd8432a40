"""The model of two images: what it can be built from, and what each image and sentence changes."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from openblip.models.blip import Blip, BlipConfig
from openblip.models.nlvr import Nlvr, NlvrConfig, nlvr_from_blip
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig

CONFIG = NlvrConfig(
    VisionConfig(image_size_px=16, patch_size_px=8, width=8, num_layers=1, num_heads=2),
    MedConfig(
        vocab_size=20, width=12, num_layers=2, num_heads=2, ffn_width=16, max_positions=10,
        context_width=8, roles=frozenset({"pair"}),
    ),
    SpecialTokens(pad=0, cls=1, sep=2, dec=3, enc=4),
    first_merge_layer=1,
)  # fmt: skip
TOKEN_IDS = torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]])
TEXT_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture
def nlvr() -> Nlvr:
    torch.manual_seed(0)
    return Nlvr(CONFIG).eval()


@torch.no_grad()
def judge(nlvr: Nlvr, images: torch.Tensor) -> torch.Tensor:
    context = nlvr.project_context(nlvr.encode_image(images))
    return nlvr.truth_logits(nlvr.encode_pair(TOKEN_IDS, TEXT_MASK, context))


def test_a_configuration_comes_back_and_says_what_does_not_fit() -> None:
    values = CONFIG.to_json()
    assert values.pop("task") == "nlvr"
    assert NlvrConfig.from_json(values) == CONFIG
    with pytest.raises(ValueError, match=r"unknown keys \['layers'\]"):
        NlvrConfig.from_json(values | {"layers": 3})
    with pytest.raises(ValueError, match=r"must be vision\.width 8"):
        replace(CONFIG, text=replace(CONFIG.text, context_width=9))
    with pytest.raises(ValueError, match=r"must be \['pair'\]"):
        replace(CONFIG, text=replace(CONFIG.text, roles=frozenset({"text", "pair"})))


def test_each_row_sees_its_own_two_images_in_their_order(nlvr: Nlvr) -> None:
    images = torch.randn(4, 3, 16, 16)
    logits = judge(nlvr, images)
    changed = images.clone()
    changed[2] += 1.0  # the second image of the first pair
    other = judge(nlvr, changed)
    assert not torch.allclose(other[0], logits[0])
    assert_close(other[1], logits[1])
    swapped = judge(nlvr, images[[2, 1, 0, 3]])
    assert not torch.allclose(swapped[0], logits[0])
    assert_close(swapped[1], logits[1])
    with pytest.raises(ValueError, match="3 images are no pairs"):
        judge(nlvr, images[:3])


def test_padding_changes_nothing(nlvr: Nlvr) -> None:
    images = torch.randn(4, 3, 16, 16)
    context = nlvr.project_context(nlvr.encode_image(images))
    logits = nlvr.truth_logits(nlvr.encode_pair(TOKEN_IDS, TEXT_MASK, context))
    ids = TOKEN_IDS.clone()
    ids[1, 3] = 11
    padded = nlvr.truth_logits(nlvr.encode_pair(ids, TEXT_MASK, context))
    assert_close(padded, logits)


def test_it_starts_from_a_blip_that_judges_pairs_alone() -> None:
    config = BlipConfig(CONFIG.vision, CONFIG.text, CONFIG.tokens, 4)
    start = nlvr_from_blip(Blip(config), first_merge_layer=1)
    assert start.left_out == ("match_head.bias", "match_head.weight")
    assert [name for name in start.drawn if "merge" in name] == [
        "text.layers.1.cross.merge.bias", "text.layers.1.cross.merge.weight",
    ]  # fmt: skip
    assert not [name for name in nlvr_from_blip(Blip(config)).drawn if "merge" in name]
    with pytest.raises(ValueError, match="the role 'pair'"):
        nlvr_from_blip(Blip(config.with_roles(frozenset({"text"}))))
