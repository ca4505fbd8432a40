import json
import re
from pathlib import Path

import pytest
import torch

from openblip.finetune.retrieval import RetrievalRecipe
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, SpecialTokens
from openblip.models.vision import VisionConfig
from openblip.pretrain import ObjectiveRecipe
from openblip.training.optim import (
    OptimizerRecipe,
    build_optimizer,
    learning_rate,
    set_learning_rate,
)

RECIPE = OptimizerRecipe(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=4)


@pytest.fixture(scope="module")
def blip() -> Blip:
    return Blip(
        BlipConfig(
            vision=VisionConfig(image_size_px=16, patch_size_px=8, width=8, num_layers=1,
                                num_heads=2),
            text=MedConfig(vocab_size=20, width=8, num_layers=1, num_heads=2, ffn_width=16,
                           max_positions=10, context_width=8),
            tokens=SpecialTokens(pad=0, cls=1, sep=2, dec=3, enc=4),
            embedding_width=4,
        )
    )  # fmt: skip


def decay_by_name(blip: Blip, recipe: OptimizerRecipe) -> dict[str, float]:
    optimizer = build_optimizer(blip, recipe)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    return {name: decay[id(p)] for name, p in blip.named_parameters() if id(p) in decay}


def test_the_warm_up_is_a_straight_line() -> None:
    rates = [learning_rate(RECIPE, step, 20) for step in range(5)]
    assert rates[0] == 1e-6
    assert rates[2] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[4] == 1e-3


def test_the_cosine_falls_to_the_floor() -> None:
    rates = [learning_rate(RECIPE, step, 20) for step in range(4, 20)]
    assert rates == sorted(rates, reverse=True)
    assert rates[8] == pytest.approx((1e-3 + 1e-5) / 2)
    assert 1e-5 < rates[-1] < 2e-5
    assert learning_rate(RECIPE, 20, 20) == pytest.approx(1e-5)


def test_a_constant_rate_stays() -> None:
    recipe = RECIPE.model_copy(update={"schedule": "constant"})
    assert {learning_rate(recipe, step, 20) for step in range(4, 20)} == {1e-3}


def test_a_warm_up_longer_than_the_run_never_arrives() -> None:
    assert learning_rate(RECIPE, 3, 3) < 1e-3
    assert learning_rate(RECIPE.model_copy(update={"warmup_steps": 0}), 0, 1) == 1e-3


def test_cosines_equal_the_reference(reference: Path) -> None:
    facts = json.loads((reference / "schedules.json").read_text())
    num_compared = 0
    for name, rates in facts.items():
        given = re.match(
            r"cosine_lr_schedule\(epoch,max_epoch=(\d+),init_lr=([\d.e-]+),min_lr=([\d.e-]+)\)",
            name,
        )
        if given:
            recipe = OptimizerRecipe(lr=float(given[2]), min_lr=float(given[3]))
            ours = [learning_rate(recipe, step, int(given[1])) for step in range(len(rates))]
            assert ours == pytest.approx(rates, rel=1e-9)
            num_compared += 1
    assert num_compared


def test_the_warm_up_equals_the_reference(reference: Path) -> None:
    facts = json.loads((reference / "schedules.json").read_text())
    [(name, rates)] = [item for item in facts.items() if item[0].startswith("warmup_lr_schedule")]
    given = re.match(
        r"warmup_lr_schedule\(step in ([\d,]+); max_step=(\d+), init ([\d.e-]+), ma\w* ([\d.e-]+)",
        name,
    )
    assert given is not None, name
    recipe = OptimizerRecipe(
        lr=float(given[4]), warmup_lr=float(given[3]), warmup_steps=int(given[2]),
        schedule="constant",
    )  # fmt: skip
    steps = [int(step) for step in given[1].split(",")]
    ours = [learning_rate(recipe, step, 100_000) for step in steps]
    assert ours == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize(
    ("run", "recipe", "ramp_epochs"),
    [("pretrain.train", ObjectiveRecipe, 2), ("train_retrieval.train", RetrievalRecipe, 1)],
)
def test_the_soft_target_weight_rises_as_in_the_reference(
    reference: Path, run: str, recipe: type, ramp_epochs: int
) -> None:
    facts = json.loads((reference / "schedules.json").read_text())
    [(name, epochs)] = [item for item in facts.items() if item[0].startswith(run)]
    given = re.search(r"(\d+) epochs of (\d+) batches; alpha (\.?[\d.]+)", name)
    assert given is not None, name
    ramp = ramp_epochs * int(given[2])
    values = recipe(soft_target_weight=float(given[3]), soft_target_ramp_steps=ramp)
    weights = [weight for epoch in epochs for weight, _ in epoch]
    ours = [values.soft_target_weight_at(step) for step in range(len(weights))]
    assert ours == pytest.approx(weights, rel=1e-9)


def test_rates_by_the_epoch_equal_the_reference(reference: Path) -> None:
    facts = json.loads((reference / "schedules.json").read_text())
    compared = set()
    for name, epochs in facts.items():
        run = name.partition(".train")[0]
        given = dict(re.findall(r"(\w+) (\.?[\d.e-]+)", name.partition("per step;")[2]))
        if run not in {"pretrain", "train_retrieval"}:
            continue
        steps_per_epoch = len(epochs[0])
        common = {"lr": float(given["init_lr"]), "min_lr": float(given["min_lr"]),
                  "steps_per_epoch": steps_per_epoch}  # fmt: skip
        if run == "pretrain":
            num_steps = 1_000_000
            recipe = OptimizerRecipe(
                schedule="exponential", decay_rate=float(given["decay"]),
                warmup_steps=int(given["warmup_steps"]), warmup_lr=float(given["warmup_lr"]),
                **common,
            )  # fmt: skip
        else:
            num_steps = int(given["max_epoch"]) * steps_per_epoch
            recipe = OptimizerRecipe(**common)
        rates = [rate for epoch in epochs for _, rate in epoch]
        ours = [learning_rate(recipe, step, num_steps) for step in range(len(rates))]
        assert ours == pytest.approx(rates, rel=1e-9)
        compared.add(run)
    assert len(compared) == 2


def test_the_exponential_needs_epochs_and_has_a_floor(reference: Path) -> None:
    with pytest.raises(ValueError, match="exponential needs steps_per_epoch"):
        OptimizerRecipe(schedule="exponential")
    facts = json.loads((reference / "schedules.json").read_text())
    [(name, rates)] = [item for item in facts.items() if item[0].startswith("step_lr_schedule")]
    given = re.search(r"init ([\d.e-]+), min ([\d.e-]+), decay ([\d.]+)", name)
    assert given is not None, name
    recipe = OptimizerRecipe(
        lr=float(given[1]), min_lr=float(given[2]), decay_rate=float(given[3]),
        schedule="exponential", steps_per_epoch=7,
    )  # fmt: skip
    ours = [learning_rate(recipe, 7 * epoch + 6, 10_000) for epoch in range(len(rates))]
    assert ours == pytest.approx(rates, rel=1e-9)
    assert learning_rate(recipe, 7 * 1000, 10_000) == recipe.min_lr


@pytest.mark.parametrize("recipe", [ObjectiveRecipe, RetrievalRecipe])
def test_without_a_ramp_the_soft_target_weight_is_there_from_the_first_step(recipe: type) -> None:
    values = recipe(soft_target_weight=0.3, soft_target_ramp_steps=0)
    assert values.soft_target_weight_at(0) == 0.3


def test_matrices_are_decayed_and_nothing_else(blip: Blip) -> None:
    decay = decay_by_name(blip, RECIPE)
    assert decay.keys() == {name for name, _ in blip.named_parameters()}
    for name, value in decay.items():
        is_kept = (
            name.endswith("bias")
            or "norm" in name
            or "position_embedding" in name
            or name in {"temperature", "vision.class_token"}
        )
        assert value == (0.0 if is_kept else RECIPE.weight_decay), name
    assert decay["text.word_embedding.weight"] == RECIPE.weight_decay


def test_the_original_decays_everything(blip: Blip) -> None:
    decay = decay_by_name(blip, RECIPE.model_copy(update={"decay_all": True}))
    assert set(decay.values()) == {RECIPE.weight_decay}


def test_the_temperature_takes_its_share_of_the_rate(blip: Blip) -> None:
    for decay_all in (False, True):
        recipe = RECIPE.model_copy(update={"temperature_lr": 0.1, "decay_all": decay_all})
        optimizer = build_optimizer(blip, recipe)
        set_learning_rate(optimizer, 0.5)
        for group in optimizer.param_groups:
            is_temperature = any(p is blip.temperature for p in group["params"])
            assert group["lr"] == pytest.approx(0.05 if is_temperature else 0.5)
            assert len(group["params"]) == 1 or not is_temperature


def test_what_is_frozen_is_left_alone(blip: Blip) -> None:
    frozen = Blip(blip.config)
    frozen.vision.requires_grad_(False)
    names = decay_by_name(frozen, RECIPE)
    assert not any(name.startswith("vision.") for name in names)


def test_one_step_is_adamw(blip: Blip) -> None:
    """Against a step by hand, of a decayed and of an undecayed parameter."""
    module = torch.nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(2.0)
    optimizer = build_optimizer(module, OptimizerRecipe(lr=0.1, weight_decay=0.5))
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert module.bias.item() == pytest.approx(2.0 - 0.1)
    assert module.weight[0, 0].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)
