import json
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openblip.evaluation.metrics import median_rank, retrieval_recalls, roc_auc


def recalls_of_one_query(scores: list[float], matches: set[int]) -> dict[int, float]:
    """Mean over every order of the candidates that the scores allow, counted one by one."""
    hits = {1: 0, 5: 0, 10: 0}
    orders = [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))  # best first
    ]
    for order in orders:
        for k in hits:
            hits[k] += bool(matches & set(order[:k]))
    return {k: 100 * count / len(orders) for k, count in hits.items()}


def test_hand_made_matrix():
    # Image 0 owns texts 0 and 1, image 1 owns text 2.
    image_to_text = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6]])
    text_to_image = torch.tensor([[0.3, 0.4], [0.9, 0.1], [0.2, 0.8]])
    recalls = retrieval_recalls(image_to_text, text_to_image, torch.tensor([0, 0, 1]))
    assert recalls.tr_at_1 == pytest.approx(50)
    assert recalls.ir_at_1 == pytest.approx(200 / 3)
    assert recalls.tr_at_5 == recalls.tr_at_10 == recalls.ir_at_5 == recalls.ir_at_10 == 100
    assert recalls.tr_mean == pytest.approx(250 / 3)
    assert recalls.ir_mean == pytest.approx((200 / 3 + 200) / 3)
    assert recalls.mean == pytest.approx((recalls.tr_mean + recalls.ir_mean) / 2)
    assert set(recalls.to_json()) >= {"tr_at_1", "ir_at_10", "mean"}


def test_ties_are_the_mean_over_all_orders():
    generator = torch.Generator().manual_seed(0)
    text_image = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    for _ in range(5):
        image_to_text = torch.randint(3, (3, 7), generator=generator).float()
        text_to_image = torch.randint(2, (7, 3), generator=generator).float()
        recalls = retrieval_recalls(image_to_text, text_to_image, text_image).to_json()
        tr = [
            recalls_of_one_query(row.tolist(), set((text_image == i).nonzero().flatten().tolist()))
            for i, row in enumerate(image_to_text)
        ]
        ir = [
            recalls_of_one_query(row.tolist(), {int(i)})
            for row, i in zip(text_to_image, text_image, strict=True)
        ]
        for k in (1, 5, 10):
            assert recalls[f"tr_at_{k}"] == pytest.approx(sum(q[k] for q in tr) / len(tr))
            assert recalls[f"ir_at_{k}"] == pytest.approx(sum(q[k] for q in ir) / len(ir))


def test_one_score_for_all_is_chance():
    size = 40
    recalls = retrieval_recalls(
        torch.zeros(size, size), torch.zeros(size, size), torch.arange(size)
    )
    assert recalls.tr_at_1 == recalls.ir_at_1 == pytest.approx(100 / size)
    assert recalls.tr_at_10 == recalls.ir_at_10 == pytest.approx(1000 / size)


def test_recalls_equal_the_reference_where_no_scores_are_tied(reference: Path):
    expected = json.loads((reference / "retrieval.json").read_text())["eval"]
    tensors = load_file(reference / "retrieval_expected.safetensors")
    owner = expected["txt2img"]
    text_image = torch.tensor([owner[str(text)] for text in range(len(owner))])
    similarity = tensors["eval.sims_matrix_i2t"]
    recalls = retrieval_recalls(similarity, similarity.T, text_image)
    official = expected["itm_eval_on_raw_itc"]
    for direction, name in (("txt", "tr"), ("img", "ir")):
        for k in (1, 5, 10):
            ours = getattr(recalls, f"{name}_at_{k}")
            assert ours == pytest.approx(official[f"{direction}_r{k}"], abs=1e-9)
    assert recalls.mean == pytest.approx(official["r_mean"], abs=1e-9)


def test_re_ranked_recalls_lie_where_the_order_of_unfilled_scores_allows(reference: Path):
    # Candidates outside the shortlist share one score; the original leaves their order to the sort.
    expected = json.loads((reference / "retrieval.json").read_text())["eval"]
    tensors = load_file(reference / "retrieval_expected.safetensors")
    owner = expected["txt2img"]
    text_image = torch.tensor([owner[str(text)] for text in range(len(owner))])
    image_to_text = tensors["eval.score_matrix_i2t"]
    text_to_image = tensors["eval.score_matrix_t2i"]
    is_match = text_image == torch.arange(len(image_to_text)).unsqueeze(1)
    official = expected["itm_eval_on_reranked_scores"]

    def shifted(by: float):
        return retrieval_recalls(
            image_to_text + by * is_match, text_to_image + by * is_match.T, text_image
        )

    ours, lowest, highest = shifted(0.0), shifted(-1e-4), shifted(1e-4)
    for direction, name in (("txt", "tr"), ("img", "ir")):
        for k in (1, 5, 10):
            low, middle, high = (
                getattr(recalls, f"{name}_at_{k}") for recalls in (lowest, ours, highest)
            )
            assert low - 1e-9 <= middle <= high + 1e-9
            assert low - 1e-9 <= official[f"{direction}_r{k}"] <= high + 1e-9
            if k <= expected["k_test"]:
                assert middle == pytest.approx(official[f"{direction}_r{k}"], abs=1e-9)


@pytest.mark.parametrize(
    ("image_to_text", "text_to_image", "text_image", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1, 1]), "text_to_image must be"),
        (torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 2]), "text 1 belongs to image 2"),
        (torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 0]), "image 1 has no text"),
        (torch.full((1, 1), torch.nan), torch.zeros(1, 1), torch.tensor([0]), "NaN"),
    ],
)
def test_impossible_input_is_refused(image_to_text, text_to_image, text_image, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recalls(image_to_text, text_to_image, text_image)


def test_roc_auc_by_hand():
    assert roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert roc_auc([1.0, 2.0], [1, 0]) == 0.0
    assert roc_auc([1.0, 1.0, 1.0], [1, 0, 1]) == 0.5
    assert roc_auc([2.0, 1.0, 1.0], [True, False, True]) == 0.75


def test_roc_auc_counts_pairs():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(20, (200,), generator=generator).float()
    labels = torch.randint(2, (200,), generator=generator)
    above = scores[labels == 1].unsqueeze(1) - scores[labels == 0]
    expected = ((above > 0).double() + 0.5 * (above == 0).double()).mean()
    assert roc_auc(scores, labels) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1], "one length"),
        ([1.0, 2.0], [1, 1], "both classes"),
        ([1.0, 2.0], [1, 3], "0 or 1"),
        ([1.0, float("nan")], [1, 0], "NaN"),
    ],
)
def test_roc_auc_refuses(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        roc_auc(scores, labels)


def test_the_median_rank_by_hand() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    is_match = torch.eye(3, dtype=torch.bool)
    # Ranks 1, 2, and 2 on average among three equal scores.
    assert median_rank(scores, is_match) == 2.0
    assert median_rank(scores[:2], is_match[:2]) == 1.5
    # With two matches among three equal ones, the first of them stands at 4 / 3 on average.
    both = torch.tensor([[True, True, False]])
    assert median_rank(scores[2:], both) == pytest.approx(4 / 3)
