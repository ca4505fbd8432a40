"""VQA of the original code: loss, gradients, ranking, generation, data, and its start from BLIP."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from openblip.answering import Candidates, rank_answers
from openblip.convert import from_official, to_official
from openblip.convert_weights import vqa_names
from openblip.generation import Decoding, generate
from openblip.losses import text_losses, vqa_loss
from openblip.models.blip import BlipConfig
from openblip.models.context import Context
from openblip.models.vqa import Vqa, VqaConfig, vqa_from_blip
from openblip.tokenizer import TokenBatch, Tokenizer


@pytest.fixture(scope="module")
def facts(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "vqa.json").read_text())


@pytest.fixture(scope="module")
def tensors(reference: Path) -> dict[str, Tensor]:
    return load_file(reference / "vqa_io.safetensors")


@pytest.fixture
def vqa(reference: Path, official_config: BlipConfig) -> Vqa:
    config = VqaConfig.from_text(
        official_config.vision, official_config.text, official_config.tokens
    )
    model = Vqa(config)
    official = load_file(reference / "vqa_init.safetensors")
    model.load_state_dict(from_official(official, vqa_names(config)))
    return model.eval()


def question_states(vqa: Vqa, tensors: dict[str, Tensor]) -> Tensor:
    context = vqa.project_image(vqa.encode_image(tensors["images"]))
    token_ids, text_mask = (
        tensors["train.question_input_ids_fed"],
        tensors["train.question_attention_mask"],
    )
    return vqa.encode_question(token_ids, text_mask, context)


def question_context(vqa: Vqa, tensors: dict[str, Tensor]) -> Context:
    mask = tensors["train.question_attention_mask"]
    assert (mask == 0).any()
    return vqa.project_question(question_states(vqa, tensors), mask)


def test_loss_and_every_gradient(vqa: Vqa, tensors, facts) -> None:
    real = tensors["train.question_attention_mask"].bool()
    states = question_states(vqa, tensors)
    assert_close(states[real], tensors["train.question_hidden"][real], atol=1e-5, rtol=1e-5)
    num_answers = torch.tensor(facts["n"])
    owners = torch.arange(len(facts["n"])).repeat_interleave(num_answers)
    token_ids, text_mask = (
        tensors["train.answer_input_ids_fed"],
        tensors["train.answer_attention_mask"],
    )
    logits = vqa.decode(token_ids, text_mask, question_context(vqa, tensors).select(owners))
    losses = text_losses(logits, token_ids, text_mask, label_smoothing=0.1)
    assert_close(losses, tensors["train.per_answer_loss"], atol=1e-5, rtol=1e-5)
    loss = vqa_loss(losses, tensors["weights"], len(facts["n"]))
    assert loss.item() == pytest.approx(facts["train"]["loss"], rel=1e-5)
    loss.backward()
    gradients = to_official(
        {name: p.grad for name, p in vqa.named_parameters()}, vqa_names(vqa.config)
    )
    assert gradients.keys() == facts["train"]["grad_norms"].keys()
    for name, norm in facts["train"]["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name


@torch.no_grad()
def test_beams_attend_to_padding_as_the_originals_do(vqa: Vqa, tensors, facts, reference) -> None:
    tokens = vqa.config.tokens
    # "3 beams, max_length 10, min_length 1", of the original's `forward`; and no mask.
    decoding = Decoding(num_beams=3, min_tokens=1, max_tokens=10, scoring="transformers-4.15")
    states = question_states(vqa, tensors)
    context = vqa.project_question(states, torch.ones_like(states[..., 0]))
    rows = generate(
        vqa, context, prompt_ids=[], tokens=tokens, decoding=decoding, seeds=[0] * len(states)
    )
    tokenizer = Tokenizer.from_vocabulary((reference / "vocab.txt").read_text().split())
    for [answer], ids, text in zip(
        rows, facts["generate"]["output_ids"], facts["generate"]["answers"], strict=True
    ):
        end = [tokens.sep] if answer.is_finished else []
        assert [tokens.dec, *answer.token_ids, *end] == [i for i in ids if i != tokens.pad]
        assert tokenizer.decode(answer.token_ids) == text


def test_the_start_from_a_blip_draws_what_the_original_lacks(
    reference: Path, official_blip
) -> None:
    blip = official_blip()
    start = vqa_from_blip(blip)
    names = vqa_names(start.model.config)
    report = json.loads((reference / "interp.json").read_text())
    missing = report["pretrain_checkpoint_into_BLIP_VQA"]["missing_keys"]
    assert sorted(part for name in start.drawn for part in names[name]) == sorted(missing)
    ours, theirs = start.model.state_dict(), blip.state_dict()
    for name in ours.keys() - set(start.drawn):
        source = name.replace("question.", "text.").replace("answer.", "text.")
        assert torch.equal(ours[name], theirs[source]), name
    assert set(start.left_out) == {
        name for name in theirs if not name.startswith(("vision.", "text."))
    }


@torch.no_grad()
def test_ranking_by_the_originals_loss_and_by_log_probability(vqa: Vqa, tensors, facts) -> None:
    listed = facts["rank"]["answer_list"]
    ids, mask = tensors["rank.answer_input_ids"], tensors["rank.answer_attention_mask"]
    candidates = Candidates(tuple(listed), TokenBatch(ids, mask, 0))
    context = question_context(vqa, tensors)
    num_questions = len(facts["questions"])
    for run in facts["rank"]["runs"]:
        shortlist = run["k_test"]
        chosen = rank_answers(vqa, context, candidates, shortlist=shortlist, label_smoothing=0.1)
        assert [one.text for one in chosen] == run["answers"]
        assert [listed.index(one.text) for one in chosen] == run["max_ids"]
        sums = tensors[f"rank.k{shortlist}.log_probs_sum"].max(dim=1).values.tolist()
        assert [one.log_probability for one in chosen] == pytest.approx(sums, rel=1e-5)
        # Ours: every answer's log-probability, among those whose first tokens are the likeliest.
        rows = torch.arange(num_questions).repeat_interleave(len(listed))
        logits = vqa.decode(
            ids.repeat(num_questions, 1), mask.repeat(num_questions, 1), context.select(rows)
        ).log_softmax(dim=-1)[:, :-1]
        targets = ids.repeat(num_questions, 1)[:, 1:]
        gained = logits.gather(2, targets[..., None]).squeeze(2)
        own = (gained * mask.repeat(num_questions, 1)[:, 1:]).sum(dim=1).view(num_questions, -1)
        places = tensors[f"rank.k{shortlist}.topk_ids"]
        best = own.gather(1, places).max(dim=1)
        plain = rank_answers(vqa, context, candidates, shortlist=shortlist)
        expected = places.gather(1, best.indices[:, None]).squeeze(1)
        assert [listed.index(one.text) for one in plain] == expected.tolist()
        given = [one.log_probability for one in plain]
        assert given == pytest.approx(best.values.tolist(), rel=1e-5)
