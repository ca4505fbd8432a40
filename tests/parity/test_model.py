"""Captioning loss, matching, features and position-embedding resize of the official code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from openblip.captions import clean_caption
from openblip.convert import from_official, official_names, to_official
from openblip.convert_weights import tied_names
from openblip.losses import lm_loss
from openblip.models.blip import Blip
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


def test_every_gradient_of_captioning(reference: Path, official_blip) -> None:
    facts = json.loads((reference / "decoder.json").read_text())
    tensors = load_file(reference / "decoder_io.safetensors")
    blip = official_blip(frozenset({"decode"}))
    token_ids, text_mask = (
        tensors["train.input_ids_from_tokenizer"],
        tensors["train.attention_mask"],
    )
    context = blip.project_context(blip.encode_image(tensors["images"]))
    logits = blip.decode(token_ids, text_mask, context)
    lm_loss(logits, token_ids, text_mask, prompt_length=facts["prompt_length"]).backward()
    gradients = to_official(
        {name: p.grad for name, p in blip.named_parameters()}, official_names(blip.config)
    )
    # The original's decoder has no tensor of its own that is not trained.
    assert facts["train"]["grad_norms"].keys() == gradients.keys()
    for name, norm in facts["train"]["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name


def test_captioning_predicts_what_the_original_predicts(reference: Path) -> None:
    facts = json.loads((reference / "decoder.json").read_text())
    tensors = load_file(reference / "decoder_io.safetensors")
    token_ids, text_mask = (
        tensors["train.input_ids_from_tokenizer"],
        tensors["train.attention_mask"],
    )
    loss = lm_loss(
        tensors["train.logits"], token_ids, text_mask, prompt_length=facts["prompt_length"]
    )
    targets = tensors["train.decoder_targets"]
    given = torch.arange(targets.shape[1]) < facts["prompt_length"]
    assert ((targets == -100) == (given | (text_mask == 0))).all()
    assert loss.item() == pytest.approx(facts["train"]["loss_lm"], rel=1e-5)


@torch.no_grad()
def test_match_probability(reference: Path, official_blip) -> None:
    facts = json.loads((reference / "itm.json").read_text())
    tensors = load_file(reference / "itm_io.safetensors")
    blip = official_blip(frozenset({"text", "pair"}))
    context = blip.project_context(blip.encode_image(tensors["images"]))
    pair_states = blip.encode_pair(tensors["input_ids"], tensors["attention_mask"], context)
    probability = blip.match_logits(pair_states).softmax(dim=1)[:, 1]
    assert probability.tolist() == pytest.approx(facts["itm_prob_enc"], abs=1e-5)


@torch.no_grad()
def test_the_released_weights_at_another_image_size(reference: Path, official_config) -> None:
    facts = json.loads((reference / "interp.json").read_text())
    tensors = load_file(reference / "interp_io.safetensors")
    start = load_file(reference / "pretrain_init.safetensors")
    size_px = facts["load_into_retrieval_with_larger_image_and_queue"]["image_size"]
    config = replace(official_config, vision=replace(official_config.vision, image_size_px=size_px))
    blip = Blip(config.with_roles(frozenset({"text", "pair"}))).eval()
    num_patches = config.vision.num_patches
    for suffix in ("", "_m"):
        resized = resize_position_embedding(start[f"visual_encoder{suffix}.pos_embed"], num_patches)
        assert_close(resized, tensors[f"load.pos_embed{suffix}"], atol=1e-5, rtol=1e-5)
    start["visual_encoder.pos_embed"] = tensors["load.pos_embed"]
    blip.load_state_dict(from_official(start, official_names(blip.config)))
    image_states = blip.encode_image(tensors["load.images"])
    assert_close(image_states, tensors["load.visual_encoder_out"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "roles"), [("Decoder", {"decode"}), ("ITM", {"text", "pair"})])
def test_a_part_takes_the_tensors_that_the_original_takes(
    reference: Path, official_config, model: str, roles: set
) -> None:
    report = json.loads((reference / "interp.json").read_text())[
        f"pretrain_checkpoint_into_BLIP_{model}"
    ]
    everything = load_file(reference / "pretrain_init.safetensors")
    config = official_config.with_roles(frozenset(roles))
    taken = {part for parts in official_names(config).values() for part in parts}
    # ITM keeps no temperature, ours compares with one; repeats and the positions are no weights.
    taken -= {"temp"}
    repeats = {name for name in tied_names(config) if name.split(".")[0] == "text_decoder"}
    used = {name for name in everything if name in taken | repeats}
    buffers = {"Decoder": "text_decoder.bert", "ITM": "text_encoder"}[model]
    used |= {name for name in everything if name == f"{buffers}.embeddings.position_ids"}
    assert len(everything) - len(used) == report["unexpected_key_count"]
    assert report["missing_keys"] == []


def test_prompted_captions_of_the_original_data_set(reference: Path) -> None:
    facts = json.loads((reference / "datasets.json").read_text())["coco_karpathy_train"]
    for row, item in zip(facts["annotation"], facts["items_(image_size,caption,idx)"], strict=True):
        assert facts["prompt"] + clean_caption(row["caption"], 30) == item[1]
