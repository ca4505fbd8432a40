"""NLVR2 of the original code: states, loss, gradients, predictions, and its start from BLIP."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from openblip.checkpoint import initialise_from
from openblip.convert import from_official, to_official
from openblip.convert_weights import nlvr_names
from openblip.models.nlvr import Nlvr, NlvrConfig, nlvr_from_blip


@pytest.fixture(scope="module")
def facts(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "nlvr.json").read_text())


@pytest.fixture
def nlvr(reference: Path, official_nlvr_config: NlvrConfig) -> Nlvr:
    model = Nlvr(official_nlvr_config)
    tensors = load_file(reference / "nlvr_init.safetensors")
    model.load_state_dict(from_official(tensors, nlvr_names(official_nlvr_config)))
    return model.eval()


def test_states_loss_predictions_and_every_gradient(reference: Path, nlvr: Nlvr, facts) -> None:
    tensors = load_file(reference / "nlvr_io.safetensors")
    context = nlvr.project_context(nlvr.encode_image(tensors["images_image0_then_image1"]))
    token_ids, text_mask = tensors["input_ids_fed"], tensors["attention_mask"]
    states = nlvr.encode_pair(token_ids, text_mask, context)
    real = text_mask.bool()
    assert_close(states[real], tensors["text_last_hidden_state"][real], atol=1e-5, rtol=1e-5)
    assert_close(states[:, 0], tensors["hidden_state_cls"], atol=1e-5, rtol=1e-5)
    logits = nlvr.truth_logits(states)
    assert_close(logits, tensors["prediction"], atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(logits, tensors["targets"])
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    loss.backward()
    gradients = to_official(
        {name: p.grad for name, p in nlvr.named_parameters()}, nlvr_names(nlvr.config)
    )
    assert gradients.keys() == facts["grad_norms"].keys()
    assert not facts["params_without_grad"]
    for name, norm in facts["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name


def test_layers_that_merge_are_the_originals(nlvr: Nlvr, facts) -> None:
    merging = [
        number for number, layer in enumerate(nlvr.text.layers) if layer.cross.merge is not None
    ]
    assert merging == facts["layers_with_merge_layer"]


@torch.no_grad()
def test_a_context_can_be_chosen_from_and_shared_by_sentences(reference: Path, nlvr: Nlvr) -> None:
    tensors = load_file(reference / "nlvr_io.safetensors")
    context = nlvr.project_context(nlvr.encode_image(tensors["images_image0_then_image1"]))
    token_ids, text_mask = tensors["input_ids_fed"], tensors["attention_mask"]
    states = nlvr.encode_pair(token_ids, text_mask, context)
    last = context.num_images - 1
    chosen = nlvr.encode_pair(
        torch.cat([token_ids, token_ids[last:]]),
        torch.cat([text_mask, text_mask[last:]]),
        context.select(torch.tensor([*range(last + 1), last])),
    )
    assert_close(chosen[last + 1], states[last], atol=1e-5, rtol=1e-5)
    doubled = nlvr.encode_pair(
        token_ids.repeat_interleave(2, 0), text_mask.repeat_interleave(2, 0), context
    )
    assert_close(doubled[::2], states, atol=1e-5, rtol=1e-5)
    assert_close(doubled[1::2], states, atol=1e-5, rtol=1e-5)


def test_the_start_from_blip_is_the_original_conversion(
    reference: Path, official_blip, facts
) -> None:
    conversion = facts["convert"]
    expected = load_file(reference / "nlvr_convert_expected.safetensors")
    source = load_file(reference / conversion["source"])
    blip = official_blip()
    num_positions = expected["visual_encoder.pos_embed"].shape[1]
    side = int((num_positions - 1) ** 0.5) * blip.config.vision.patch_size_px
    start = nlvr_from_blip(initialise_from(blip, frozenset({"pair"}), side).blip)
    official = to_official(start.model.state_dict(), nlvr_names(start.model.config))
    for target, key in conversion["target_key_to_source_key"].items():
        if target.endswith("position_ids"):
            continue
        value = expected[target] if key is None else source[key]
        if key is None:
            assert_close(official[target], value, atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(official[target], value), target
    drawn = to_official(
        {name: start.model.state_dict()[name] for name in start.drawn},
        {name: nlvr_names(start.model.config)[name] for name in start.drawn},
    )
    assert sorted(drawn) == sorted(conversion["missing_keys"])
    assert len(official) == len(set(conversion["target_key_to_source_key"]) | set(drawn)) - 1
    assert start.left_out == ("match_head.bias", "match_head.weight")


@torch.no_grad()
def test_a_pair_of_equal_images_starts_as_blip_judges_one(reference: Path, official_blip) -> None:
    blip = official_blip(frozenset({"pair"}))
    tensors = load_file(reference / "itm_io.safetensors")
    token_ids, text_mask = tensors["input_ids"], tensors["attention_mask"]
    image_states = blip.encode_image(tensors["images"])
    expected = blip.encode_pair(token_ids, text_mask, blip.project_context(image_states))
    nlvr = nlvr_from_blip(blip).model.eval()
    context = nlvr.project_context(torch.cat([image_states, image_states]))
    states = nlvr.encode_pair(token_ids, text_mask, context)
    assert_close(states, expected, atol=1e-5, rtol=1e-5)
