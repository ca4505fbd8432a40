"""Captioning loss, matching, features and position-embedding resize of the official code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from openblip.losses import lm_loss
from openblip.models.vision import resize_position_embedding


def test_captioning_loss_logits_and_gradient_norms(reference: Path, official_blip) -> None:
    facts = json.loads((reference / "decoder.json").read_text())
    tensors = load_file(reference / "decoder_io.safetensors")
    blip = official_blip(frozenset({"decode"}))
    token_ids, text_mask = (
        tensors["train.input_ids_from_tokenizer"],
        tensors["train.attention_mask"],
    )
    image_states = blip.encode_image(tensors["images"])
    assert_close(image_states, tensors["train.image_embeds"], atol=1e-5, rtol=1e-5)
    logits = blip.decode(token_ids, text_mask, blip.project_context(image_states))
    real = text_mask.bool()
    # Rounding is amplified here as in the pre-training logits.
    assert_close(logits[real], tensors["train.logits"][real], atol=5e-5, rtol=1e-5)
    loss = lm_loss(logits, token_ids, text_mask, prompt_length=facts["prompt_length"])
    assert loss.item() == pytest.approx(facts["train"]["loss_lm"], rel=1e-5)
    loss.backward()
    norms = facts["train"]["grad_norms"]
    expected = norms["visual_encoder.patch_embed.proj.weight"]
    assert blip.vision.patch_weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)
    expected = norms["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert blip.text.word_embedding.weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_prompt_logits(reference: Path, official_blip) -> None:
    tensors = load_file(reference / "decoder_io.safetensors")
    blip = official_blip(frozenset({"decode"}))
    context = blip.project_context(blip.encode_image(tensors["images"]))
    token_ids = tensors["prompt.input_ids"]
    logits = blip.decode(token_ids, torch.ones_like(token_ids), context)
    assert_close(logits, tensors["prompt.logits_all_positions"], atol=5e-5, rtol=1e-5)
    last = blip.decode_step(token_ids, blip.new_decoder_cache(), context)
    assert_close(last, logits[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_matching_and_similarity(reference: Path, official_blip) -> None:
    tensors = load_file(reference / "itm_io.safetensors")
    blip = official_blip(frozenset({"text", "pair"}))
    token_ids, text_mask = tensors["input_ids"], tensors["attention_mask"]
    image_states = blip.encode_image(tensors["images"])
    context = blip.project_context(image_states)
    logits = blip.match_logits(blip.encode_pair(token_ids, text_mask, context))
    assert_close(logits, tensors["itm_logits_with_enc_token"], atol=1e-5, rtol=1e-5)
    # The original's demo leaves [CLS] in place; the MED itself does not set first tokens.
    logits = blip.match_logits(blip.text.encode_pair(token_ids, text_mask, context))
    assert_close(logits, tensors["itm_logits_official_cls_token"], atol=1e-5, rtol=1e-5)
    similarity = (
        blip.embed_image(image_states) @ blip.embed_text(blip.encode_text(token_ids, text_mask)).T
    )
    assert_close(similarity, tensors["itc_similarity"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features(reference: Path, official_blip) -> None:
    tensors = load_file(reference / "base_io.safetensors")
    blip = official_blip(frozenset({"text", "pair"}))
    token_ids = tensors["input_ids"]
    mask = torch.ones_like(token_ids)
    image_states = blip.encode_image(tensors["images"])
    assert_close(image_states, tensors["mode_image"], atol=1e-5, rtol=1e-5)
    assert_close(blip.encode_text(token_ids, mask), tensors["mode_text"], atol=1e-5, rtol=1e-5)
    pair_states = blip.encode_pair(token_ids, mask, blip.project_context(image_states))
    assert_close(pair_states, tensors["mode_multimodal"], atol=1e-5, rtol=1e-5)


def test_position_embedding_resize(reference: Path) -> None:
    tensors = load_file(reference / "interp_io.safetensors")
    cases = sorted({name.split(".")[0] for name in tensors if name.startswith("case")})
    assert cases
    for case in cases:
        expected = tensors[f"{case}.pos_embed_out"]
        resized = resize_position_embedding(tensors[f"{case}.pos_embed_in"], expected.shape[1] - 1)
        assert_close(resized, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="not square"):
        resize_position_embedding(torch.zeros(1, 8, 4), 16)
