"""AdamW as BLIP uses it, its parameter groups, and the learning rate of every step."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from openblip.config import Recipe


class OptimizerRecipe(Recipe):
    """AdamW and its schedule; weight decay and warm-up start are the paper's.

    lr                learning rate after warm-up
    schedule          what follows the warm-up: `constant`; `cosine` to `min_lr`, which the step
                      after the last one would have; `exponential`: times `decay_rate` after every
                      epoch, not below `min_lr`, as the released code pre-trains
    steps_per_epoch   the rate changes with every epoch of so many steps, as in the released code;
                      0 lets the cosine fall with every step
    temperature_lr    learning rate of the temperature as a share of `lr`. 1 is the original; with a
                      `lr` far above the paper's the temperature falls to its bound within some
                      tens of steps, before the encoders have learned anything
    decay_all         decay biases, LayerNorms, temperature and position embeddings too, as the
                      original does
    max_gradient_norm clip to this L2 norm; 0 does not clip, as in the paper
    """

    lr: float = Field(3e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    decay_rate: float = Field(0.9, gt=0, le=1)
    steps_per_epoch: int = Field(0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    temperature_lr: float = Field(1.0, ge=0, le=1)
    decay_all: bool = False
    max_gradient_norm: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check_epochs(self) -> Self:
        if self.schedule == "exponential" and not self.steps_per_epoch:
            raise ValueError("schedule exponential needs steps_per_epoch")
        return self


def learning_rate(recipe: OptimizerRecipe, step: int, num_steps: int) -> float:
    """Return the learning rate of `step` (from 0) of a run of `num_steps`."""
    if step < recipe.warmup_steps:
        share = step / recipe.warmup_steps
        return recipe.warmup_lr + share * (recipe.lr - recipe.warmup_lr)
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.steps_per_epoch:
        step -= step % recipe.steps_per_epoch
    if recipe.schedule == "exponential":
        return max(recipe.min_lr, recipe.lr * recipe.decay_rate ** (step // recipe.steps_per_epoch))
    share = max(0, step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * share)) / 2


def build_optimizer(module: nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Build fused AdamW over the trainable parameters of `module`.

    Biases, LayerNorms, the temperature and the positions are not decayed unless `decay_all`.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    temperatures: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_plain = parameter.ndim < 2 or "position_embedding" in name or "class_token" in name
        if name.rpartition(".")[2] == "temperature":
            temperatures.append(parameter)
        elif is_plain and not recipe.decay_all:
            kept.append(parameter)
        else:
            decayed.append(parameter)
    decay = recipe.weight_decay
    groups = [
        {"params": decayed, "weight_decay": decay, "lr_share": 1.0},
        {"params": kept, "weight_decay": 0.0, "lr_share": 1.0},
        {
            "params": temperatures,
            "weight_decay": decay if recipe.decay_all else 0.0,
            "lr_share": recipe.temperature_lr,
        },
    ]
    # Fused is 3.5 times as fast as the loop on CPU.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        betas=recipe.betas,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]
