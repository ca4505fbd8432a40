import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from openblip.losses import (
    itc_loss,
    itm_loss,
    lm_loss,
    reconstruction_errors,
    reconstruction_loss,
    sample_hard_negatives,
    soft_targets,
)

ONE = torch.tensor(1.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_itc_by_hand() -> None:
    similarity = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    loss = itc_loss(similarity, torch.eye(2), torch.tensor(0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_itc_of_a_row_that_knows_nothing_is_the_log_of_the_candidates() -> None:
    loss = itc_loss(torch.zeros(3, 8), torch.eye(3, 8), torch.tensor(0.07))
    assert loss.item() == pytest.approx(math.log(8))


def test_itc_takes_extreme_temperatures() -> None:
    similarity = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert itc_loss(similarity, torch.eye(2), torch.tensor(0.001)).item() == pytest.approx(0.0)
    flipped = itc_loss(-similarity, torch.eye(2), torch.tensor(0.001))
    assert flipped.item() == pytest.approx(2000.0)


def test_itc_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and targets \(2, 2\) differ"):
        itc_loss(torch.zeros(2, 3), torch.eye(2), ONE)


@given(st.floats(0, 1), st.floats(0.01, 1.0))
def test_soft_targets_are_distributions_between_truth_and_belief(
    weight: float, temperature: float
) -> None:
    similarity, positives = random(3, 7).tanh(), torch.eye(3, 7)
    targets = soft_targets(similarity, positives, torch.tensor(temperature), weight)
    assert_close(targets.sum(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    assert (targets >= -1e-6).all()
    assert (targets.diagonal() >= 1 - weight - 1e-6).all()


def test_soft_targets_at_their_ends() -> None:
    similarity, positives = random(2, 4), torch.eye(2, 4)
    assert torch.equal(soft_targets(similarity, positives, ONE, 0.0), positives)
    assert_close(soft_targets(similarity, positives, ONE, 1.0), similarity.softmax(dim=1))


def test_negatives_are_drawn_in_proportion_and_never_of_weight_zero() -> None:
    weights = torch.tensor([[0.0, 1.0, 3.0]]).expand(4000, 3)
    drawn = sample_hard_negatives(weights, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=3) / 4000
    assert share[0] == 0
    assert share[2].item() == pytest.approx(0.75, abs=0.03)


def test_the_generator_fixes_the_draw() -> None:
    weights = torch.rand(50, 9, generator=torch.Generator().manual_seed(1))
    first, second, other = (
        sample_hard_negatives(weights, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_itm_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    loss = itm_loss(logits, torch.tensor([True, False]))
    right = math.log(1 + math.exp(-1))
    assert loss.item() == pytest.approx((right + right + 1) / 2)


def test_lm_is_the_mean_over_the_tokens_that_are_predicted() -> None:
    logits, token_ids = random(2, 4, 6), torch.tensor([[1, 3, 4, 2], [1, 5, 2, 0]])
    mask = (token_ids != 0).long()
    logs = logits.log_softmax(dim=-1)
    wanted = [logs[0, 0, 3], logs[0, 1, 4], logs[0, 2, 2], logs[1, 0, 5], logs[1, 1, 2]]
    loss = lm_loss(logits, token_ids, mask, label_smoothing=0.0)
    assert loss.item() == pytest.approx(-sum(float(x) for x in wanted) / 5, rel=1e-5)
    given_two = lm_loss(logits, token_ids, mask, prompt_length=2, label_smoothing=0.0)
    assert given_two.item() == pytest.approx(-(wanted[1] + wanted[2] + wanted[4]).item() / 3)


def test_lm_smooths_over_the_vocabulary() -> None:
    logits, token_ids = random(1, 2, 6), torch.tensor([[1, 3]])
    logs = logits.log_softmax(dim=-1)[0, 0]
    loss = lm_loss(logits, token_ids, torch.ones(1, 2), label_smoothing=0.1)
    assert loss.item() == pytest.approx(float(-0.9 * logs[3] - 0.1 * logs.mean()), rel=1e-5)


def test_lm_ignores_what_padding_holds_and_changes_no_input() -> None:
    logits, token_ids = random(1, 4, 6), torch.tensor([[1, 3, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    before = token_ids.clone()
    loss = lm_loss(logits, token_ids, mask)
    short = lm_loss(logits[:, :3], token_ids[:, :3], mask[:, :3])
    assert_close(loss, short)
    assert torch.equal(token_ids, before)


def test_losses_are_differentiable() -> None:
    similarity = random(2, 4).requires_grad_()
    temperature = torch.tensor(0.1, requires_grad=True)
    itc_loss(similarity, torch.eye(2, 4), temperature).backward()
    assert similarity.grad is not None
    assert temperature.grad is not None
    assert similarity.grad.sum(dim=1).abs().max() < 1e-5


def test_reconstruction_by_hand() -> None:
    image_states = torch.tensor([[[3.0, 5.0], [0.0, 2.0], [7.0, 9.0]]])
    normalised = torch.tensor([[[-1.0, 1.0]] * 3])
    hidden = torch.tensor([[True, True, False]])
    assert reconstruction_loss(normalised, image_states, hidden).item() == pytest.approx(
        0, abs=1e-5
    )
    # Smooth L1 of 0.5 is 0.125, of 2 it is 1.5; what is visible does not count.
    predicted = normalised + torch.tensor([[[0.5, -0.5], [2.0, 2.0], [9.0, 9.0]]])
    loss = reconstruction_loss(predicted, image_states, hidden)
    assert loss.item() == pytest.approx((0.125 + 1.5) / 2, rel=1e-4)


def test_reconstruction_weighs_cls_as_all_hidden_patches() -> None:
    image_states, predicted = random(2, 5, 8), random(2, 5, 8, seed=1)
    only = torch.tensor([[True, True, False, False, False], [True, False, True, True, False]])
    errors = reconstruction_errors(predicted, image_states, only)
    assert errors.shape == (2,)
    targets = torch.nn.functional.layer_norm(image_states, (8,))
    each = torch.nn.functional.smooth_l1_loss(predicted, targets, reduction="none").mean(dim=2)
    assert_close(errors[0], (each[0, 0] + each[0, 1]) / 2)
    assert_close(errors[1], each[1, 0] / 2 + (each[1, 2] + each[1, 3]) / 4)
    assert_close(reconstruction_loss(predicted, image_states, only), errors.mean())


def test_reconstruction_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"hidden \(2, 4\) differ"):
        reconstruction_loss(random(2, 5, 8), random(2, 5, 8), torch.ones(2, 4, dtype=torch.bool))
