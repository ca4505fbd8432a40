from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from openblip.models.blip import MAX_TEMPERATURE, MIN_TEMPERATURE, Blip, BlipConfig
from openblip.models.text import ALL_ROLES, MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig

CONFIG = BlipConfig(
    vision=VisionConfig(
        image_size_px=16, patch_size_px=8, width=32, num_layers=1, num_heads=2, init_std=0.3
    ),
    text=MedConfig(
        vocab_size=30, width=24, num_layers=2, num_heads=2, ffn_width=32, max_positions=12,
        context_width=32, init_std=0.3,
    ),
    tokens=SpecialTokens(pad=0, cls=1, sep=2, dec=28, enc=29),
    embedding_width=8,
)  # fmt: skip
TOKENS = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 8, 9, 2]])
MASK = (TOKENS != 0).long()


@pytest.fixture
def blip() -> Blip:
    torch.manual_seed(0)
    return Blip(CONFIG).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_embeddings_have_unit_norm(blip: Blip, images: Tensor) -> None:
    image_embedding = blip.embed_image(blip.encode_image(images))
    text_embedding = blip.embed_text(blip.encode_text(TOKENS, MASK))
    assert image_embedding.shape == text_embedding.shape == (2, 8)
    assert_close(image_embedding.norm(dim=1), torch.ones(2))
    assert_close(text_embedding.norm(dim=1), torch.ones(2))


@torch.no_grad()
def test_each_verb_sets_its_first_token_and_leaves_the_ids_alone(
    blip: Blip, images: Tensor
) -> None:
    context = blip.project_context(blip.encode_image(images))
    other = TOKENS.clone()
    other[:, 0] = 17
    before = other.clone()
    assert_close(blip.encode_text(other, MASK), blip.encode_text(TOKENS, MASK))
    assert_close(blip.encode_pair(other, MASK, context), blip.encode_pair(TOKENS, MASK, context))
    assert_close(blip.decode(other, MASK, context), blip.decode(TOKENS, MASK, context))
    assert torch.equal(other, before)
    tokens = CONFIG.tokens
    for verb, first in (("encode_text", tokens.cls), ("encode_pair", tokens.enc)):
        given = TOKENS.clone()
        given[:, 0] = first
        arguments = (given, MASK) if verb == "encode_text" else (given, MASK, context)
        assert_close(getattr(blip.text, verb)(*arguments), getattr(blip, verb)(*arguments))


@torch.no_grad()
def test_a_pair_is_judged_by_its_image(blip: Blip, images: Tensor) -> None:
    context = blip.project_context(blip.encode_image(images))
    swapped = context.select(torch.tensor([1, 0]))
    logits = blip.match_logits(blip.encode_pair(TOKENS, MASK, context))
    assert logits.shape == (2, 2)
    assert not torch.allclose(
        logits, blip.match_logits(blip.encode_pair(TOKENS, MASK, swapped)), atol=1e-4
    )


def test_the_lm_matrix_is_the_word_embedding(blip: Blip, images: Tensor) -> None:
    context = blip.project_context(blip.encode_image(images))
    logits = blip.decode(TOKENS, MASK, context)
    assert logits.shape == (2, 5, 30)
    logits[0, 0, 20].backward()
    assert blip.text.word_embedding.weight.grad[20].abs().sum() > 0
    shapes = [tuple(p.shape) for p in blip.parameters()]
    assert shapes.count((30, 24)) == 1


def test_roles_share_all_but_their_self_attentions(blip: Blip) -> None:
    names = {name for name, _ in blip.named_parameters() if name.startswith("text.layers.0.")}
    kinds = {name.split(".")[3] for name in names}
    assert kinds == {"bidirectional", "causal", "cross", "up", "down"}


@pytest.mark.parametrize(
    ("roles", "absent"),
    [
        ({"decode"}, ("temperature", "match_head", "image_projection", "bidirectional")),
        ({"text"}, ("match_head", "cross", "causal", "lm_head")),
        ({"text", "pair"}, ("causal", "lm_head")),
    ],
)
def test_a_model_carries_its_roles_alone(roles: set, absent: tuple[str, ...]) -> None:
    part = Blip(CONFIG.with_roles(frozenset(roles)))
    names = " ".join(name for name, _ in part.named_parameters())
    assert not any(word in names for word in absent)
    assert set(part.state_dict()) < set(Blip(CONFIG).state_dict())


def test_what_a_model_cannot_do_is_named(images: Tensor) -> None:
    text_only = Blip(CONFIG.with_roles(frozenset({"text"})))
    image_states = text_only.encode_image(images)
    with pytest.raises(ValueError, match="neither the role 'pair' nor 'decode'"):
        text_only.project_context(image_states)
    with pytest.raises(ValueError, match="no role 'pair'; it has: text"):
        text_only.match_logits(torch.zeros(1, 1, 24))
    judge = Blip(CONFIG.with_roles(frozenset({"text", "pair"})))
    context = judge.project_context(image_states)
    with pytest.raises(ValueError, match="no role 'decode'"):
        judge.decode(TOKENS, MASK, context)
    with pytest.raises(ValueError, match="no role 'decode'"):
        judge.decode_step(TOKENS, judge.new_decoder_cache(), context)


def test_rows_and_lengths_that_do_not_fit_are_named(blip: Blip, images: Tensor) -> None:
    context = blip.project_context(blip.encode_image(images))
    three = TOKENS[[0, 1, 0]]
    with pytest.raises(ValueError, match="3 rows of text are not a multiple of 2 images"):
        blip.encode_pair(three, torch.ones_like(three), context)
    long = torch.ones(2, 13, dtype=torch.long)
    with pytest.raises(ValueError, match="13 tokens, the model has 12 positions"):
        blip.encode_text(long, long)


@pytest.mark.parametrize(
    ("value", "clamped"), [(0.9, MAX_TEMPERATURE), (0.0, MIN_TEMPERATURE), (0.07, 0.07)]
)
def test_the_temperature_is_clamped(blip: Blip, value: float, clamped: float) -> None:
    with torch.no_grad():
        blip.temperature.fill_(value)
    blip.clamp_temperature()
    assert blip.temperature.item() == pytest.approx(clamped)


def test_configurations_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"context_width 8 must be vision\.width 32"):
        replace(CONFIG, text=replace(CONFIG.text, context_width=8))
    with pytest.raises(ValueError, match=r"roles \[\]"):
        CONFIG.with_roles(frozenset())
    values = CONFIG.to_json()
    del values["vision"]["width"]
    with pytest.raises(ValueError, match=r"vision: missing keys \['width'\]"):
        BlipConfig.from_json(values)
    assert CONFIG.with_roles(ALL_ROLES) == CONFIG
