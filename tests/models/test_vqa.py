"""Properties of the VQA model on a tiny random one."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.models.vqa import Vqa, VqaConfig, vqa_from_blip

VISION = VisionConfig(
    image_size_px=16, patch_size_px=8, width=16, num_layers=1, num_heads=2, init_std=0.3
)
TEXT = MedConfig(
    vocab_size=30, width=12, num_layers=2, num_heads=2, ffn_width=24, max_positions=12,
    context_width=16, init_std=0.3,
)  # fmt: skip
SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, dec=28, enc=29)
CONFIG = VqaConfig.from_text(VISION, TEXT, SPECIAL)
QUESTIONS = torch.tensor([[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 3, 2]])
MASK = (QUESTIONS != 0).long()
ANSWERS = torch.tensor([[1, 10, 2, 0], [1, 11, 12, 2]])
ANSWER_MASK = (ANSWERS != 0).long()


@pytest.fixture
def vqa() -> Vqa:
    torch.manual_seed(0)
    return Vqa(CONFIG).eval()


def context_of(vqa: Vqa, rows: slice = slice(None), length: int = 6):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))[rows]
    image_context = vqa.project_image(vqa.encode_image(images))
    ids, mask = QUESTIONS[rows, :length], MASK[rows, :length]
    return vqa.project_question(vqa.encode_question(ids, mask, image_context), mask)


@torch.no_grad()
def test_padding_of_a_question_never_changes_an_answer(vqa: Vqa) -> None:
    both = vqa.decode(ANSWERS, ANSWER_MASK, context_of(vqa))
    alone = vqa.decode(ANSWERS[:1], ANSWER_MASK[:1], context_of(vqa, slice(0, 1), 4))
    assert_close(both[:1, :3], alone[:, :3])
    seen = replace(context_of(vqa), mask=None)
    assert not torch.allclose(vqa.decode(ANSWERS, ANSWER_MASK, seen)[:1, :3], alone[:, :3])


@torch.no_grad()
def test_cached_decoding_of_a_masked_context_equals_uncached(vqa: Vqa) -> None:
    context = context_of(vqa).select(torch.tensor([1, 0, 0]))
    ids = torch.tensor([[28, 11, 12], [28, 10, 13], [28, 5, 6]])
    whole = vqa.decode(ids, torch.ones_like(ids), context)
    cache = vqa.new_decoder_cache()
    for place in range(ids.shape[1]):
        step = vqa.decode_step(ids[:, place : place + 1], cache, context)
        assert_close(step, whole[:, place])


@torch.no_grad()
def test_answers_of_one_question_share_its_context(vqa: Vqa) -> None:
    context = context_of(vqa)
    grouped = vqa.decode(
        ANSWERS.repeat_interleave(2, 0), ANSWER_MASK.repeat_interleave(2, 0), context
    )
    assert_close(grouped[::2], vqa.decode(ANSWERS, ANSWER_MASK, context))
    assert_close(grouped[1::2], vqa.decode(ANSWERS, ANSWER_MASK, context))


def test_the_configuration_comes_back_and_says_what_does_not_fit() -> None:
    values = CONFIG.to_json()
    assert values.pop("task") == "vqa"
    assert VqaConfig.from_json(values) == CONFIG
    with pytest.raises(ValueError, match=r"answer.context_width 16 must be question.width 12"):
        replace(CONFIG, answer=replace(CONFIG.answer, context_width=16))
    with pytest.raises(ValueError, match=r"question.roles \['decode'\] must be \['pair'\]"):
        replace(CONFIG, question=replace(CONFIG.question, roles=frozenset({"decode"})))
    with pytest.raises(ValueError, match=r"vocab_size 30 and answer\.vocab_size 31"):
        replace(CONFIG, answer=replace(CONFIG.answer, vocab_size=31))


@pytest.mark.parametrize("width", [12, 16])
def test_both_parts_start_from_a_blip(width: int) -> None:
    vision = replace(VISION, width=width)
    blip = Blip(BlipConfig(vision, replace(TEXT, context_width=width), SPECIAL, 8))
    start = vqa_from_blip(blip)
    cross = [f"answer.layers.{layer}.cross.key_value.weight" for layer in range(2)]
    assert list(start.drawn) == ([] if width == TEXT.width else cross)
    assert "match_head.weight" in start.left_out
    assert torch.equal(start.model.answer.word_embedding.weight, blip.text.word_embedding.weight)
    assert torch.equal(start.model.question.word_embedding.weight, blip.text.word_embedding.weight)
    assert (
        start.model.answer.word_embedding.weight is not start.model.question.word_embedding.weight
    )
    with pytest.raises(ValueError, match="'pair' and 'decode'"):
        vqa_from_blip(Blip(blip.config.with_roles(frozenset({"text", "pair"}))))
