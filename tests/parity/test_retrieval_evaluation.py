"""The official evaluation: ITC similarities, ITM scores of the shortlists, recalls."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from openblip.evaluation.metrics import RetrievalRecalls, retrieval_recalls
from openblip.evaluation.retrieval import NOT_JUDGED, RetrievalScores, score_retrieval
from openblip.inference import Engine
from openblip.tokenizer import TokenBatch

CUTS = (1, 5, 10)


@pytest.fixture(scope="module")
def facts(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "retrieval.json").read_text())["eval"]


@pytest.fixture(scope="module")
def inputs(reference: Path) -> tuple[Tensor, TokenBatch]:
    tensors = load_file(reference / "retrieval_io.safetensors")
    tokens = TokenBatch(tensors["eval.input_ids"], tensors["eval.attention_mask"], 0)
    return tensors["eval.images"], tokens


@pytest.fixture(scope="module")
def expected(reference: Path) -> dict[str, Tensor]:
    return load_file(reference / "retrieval_expected.safetensors")


@pytest.fixture
def scores(official_blip, inputs: tuple[Tensor, TokenBatch], facts) -> RetrievalScores:
    images, tokens = inputs
    return score_retrieval(
        engine_of(official_blip, 4), list(images), tokens, shortlist=facts["k_test"]
    )


def engine_of(official_blip, batch_size: int = 2) -> Engine:
    blip = official_blip(frozenset({"text", "pair"}))
    return Engine(blip, tokenizer=None, dtype="float32", batch_size=batch_size)


def owners(facts: dict[str, Any]) -> Tensor:
    return torch.tensor([facts["txt2img"][str(text)] for text in range(len(facts["txt2img"]))])


def named(recalls: RetrievalRecalls) -> Iterator[tuple[str, float]]:
    for official, ours in (("txt", "tr"), ("img", "ir")):
        for k in CUTS:
            yield f"{official}_r{k}", getattr(recalls, f"{ours}_at_{k}")


def test_embeddings(official_blip, inputs, expected) -> None:
    images, tokens = inputs
    engine = engine_of(official_blip)
    assert_close(
        engine.embed_images(list(images)), expected["eval.image_embeds"], atol=1e-5, rtol=1e-5
    )
    assert_close(engine.embed_texts(tokens), expected["eval.text_embeds"], atol=1e-5, rtol=1e-5)


def test_score_matrices(scores: RetrievalScores, expected) -> None:
    for ours, name in (
        (scores.similarity, "sims_matrix_i2t"),
        (scores.image_to_text, "score_matrix_i2t"),
        (scores.text_to_image, "score_matrix_t2i"),
    ):
        assert_close(ours, expected[f"eval.{name}"], atol=1e-5, rtol=1e-5)


def test_a_shortlist_is_judged_and_nothing_else(scores: RetrievalScores, facts) -> None:
    num_images, num_texts = scores.similarity.shape
    k = facts["k_test"]
    assert ((scores.image_to_text != NOT_JUDGED).sum(dim=1) == min(k, num_texts)).all()
    assert ((scores.text_to_image != NOT_JUDGED).sum(dim=1) == min(k, num_images)).all()


def test_recalls_of_similarities(scores: RetrievalScores, facts) -> None:
    recalls = retrieval_recalls(scores.similarity, scores.similarity.T, owners(facts))
    official = facts["itm_eval_on_raw_itc"]
    for name, value in named(recalls):
        assert value == pytest.approx(official[name], abs=1e-9), name
    for ours, name in (("tr_mean", "txt_r_mean"), ("ir_mean", "img_r_mean"), ("mean", "r_mean")):
        assert getattr(recalls, ours) == pytest.approx(official[name], abs=1e-9)


def test_re_ranked_recalls_where_no_tie_decides(scores: RetrievalScores, facts) -> None:
    """Compare cut by cut; pairs outside the shortlist share one score.

    Their order is our mean over all orders, and whatever numpy's unstable sort gives in the
    original. A recall that is the same with every match first and with every match last among
    the tied has no tie in it: those must be equal, the others must lie between.
    """
    text_image, official = owners(facts), facts["itm_eval_on_reranked_scores"]
    is_match = text_image == torch.arange(len(scores.similarity)).unsqueeze(1)

    def shifted(by: float) -> dict[str, float]:
        image_to_text, text_to_image = (
            matrix + by * (matches & (matrix == NOT_JUDGED))
            for matrix, matches in (
                (scores.image_to_text, is_match),
                (scores.text_to_image, is_match.T),
            )
        )
        return dict(named(retrieval_recalls(image_to_text, text_to_image, text_image)))

    ours, lowest, highest = shifted(0.0), shifted(-1.0), shifted(1.0)
    num_compared = 0
    for name, value in ours.items():
        assert lowest[name] - 1e-9 <= official[name] <= highest[name] + 1e-9, name
        if lowest[name] == highest[name]:
            assert value == pytest.approx(official[name], abs=1e-9), name
            num_compared += 1
    assert num_compared >= 2  # at least both recalls at 1, which are within the shortlist


def test_the_batch_of_images_and_the_padding_change_nothing(
    official_blip, inputs, scores: RetrievalScores, facts
) -> None:
    images, tokens = inputs
    longest = int(tokens.text_mask.sum(dim=1).max())
    cut = TokenBatch(tokens.token_ids[:, :longest], tokens.text_mask[:, :longest], 0)
    engine = engine_of(official_blip, batch_size=1)
    again = score_retrieval(engine, list(images), cut, shortlist=facts["k_test"])
    assert_close(again.image_to_text, scores.image_to_text, atol=1e-5, rtol=1e-5)
    assert_close(again.text_to_image, scores.text_to_image, atol=1e-5, rtol=1e-5)


def test_a_shortlist_beyond_the_set_judges_every_pair(official_blip, inputs) -> None:
    images, tokens = inputs
    whole = score_retrieval(engine_of(official_blip), list(images), tokens, shortlist=10_000)
    assert (whole.image_to_text != NOT_JUDGED).all()
    assert torch.equal(whole.image_to_text, whole.text_to_image.T)


def test_images_that_can_be_read_only_once_are_refused(official_blip, inputs) -> None:
    images, tokens = inputs
    with pytest.raises(ValueError, match="second time"):
        score_retrieval(engine_of(official_blip), iter(images), tokens, shortlist=2)
