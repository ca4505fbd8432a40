"""The bootstrap loop on the drawn world: minutes on a laptop, and every truth is known."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from openblip.capfilt.bootstrap import (
    BootstrapData,
    BootstrapRecipe,
    EvaluationRecipe,
    bootstrap,
)
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.checkpoint import check_is_free
from openblip.data.world import WorldConfig, draw_world
from openblip.finetune.captioning import CaptioningRecipe
from openblip.finetune.retrieval import RetrievalRecipe
from openblip.generation import Decoding
from openblip.pretrain import ObjectiveRecipe, PretrainRecipe
from openblip.training.alignment import AlignmentConfig
from openblip.training.new_model import ModelRecipe
from openblip.training.optim import OptimizerRecipe

WORLD = WorldConfig(num_web=6000, num_human=800, num_test=500)

# One patch for each quarter of the image, and initial weights of a size that lets a model this
# small leave the plateau on which it knows the words but not the picture; see docs/results.md.
_MODEL = ModelRecipe(
    image_size_px=32,
    patch_size_px=16,
    vision_width=96,
    vision_layers=2,
    vision_heads=4,
    text_width=96,
    text_layers=2,
    text_heads=4,
    ffn_width=256,
    max_positions=32,
    dropout=0.0,
    embedding_width=64,
    init_std=0.1,
    position_init_std=3.0,
)
_QUEUE_SIZE, _MOMENTUM = 256, 0.99
# What is drawn needs no augmentation: a crop would cut objects off, a change of colour be untrue.
_PAIRS: dict[str, Any] = {
    "batch_size": 32,
    "max_tokens": 20,
    "min_crop_scale": 1.0,
    "randaugment_ops": 0,
    "flip": False,
}


def quickstart_recipe(seed: int) -> BootstrapRecipe:
    """Return the recipe of the quickstart: the paper's loop at the size of the drawn world."""
    return BootstrapRecipe(
        vocab_size=200,
        pretrain=PretrainRecipe(
            model=_MODEL,
            objective=ObjectiveRecipe(
                soft_target_ramp_steps=600,
                alignment=AlignmentConfig(
                    positives="image_or_text", queue_size=_QUEUE_SIZE, momentum=_MOMENTUM
                ),
            ),
            optimizer=_optimizer(2e-3),
            num_steps=1500,
            seed=seed,
            **_PAIRS,
        ),
        captioner=CaptioningRecipe(
            optimizer=_optimizer(1e-3),
            num_steps=1500,
            prompt="",
            # Smoothing spreads a tenth of the belief over all words, and nucleus sampling draws it:
            # with it one synthetic caption in five was garbled, without it one in a hundred.
            label_smoothing=0.0,
            seed=seed,
            **_PAIRS,
        ),
        filter=RetrievalRecipe(
            optimizer=_optimizer(1e-3),
            num_steps=1200,
            soft_target_weight=0.0,
            alignment=AlignmentConfig(
                positives="image_or_text",
                mining="online",
                queue_size=_QUEUE_SIZE,
                momentum=_MOMENTUM,
            ),
            seed=seed,
            **_PAIRS,
        ),
        capfilt=CapfiltRecipe(
            decoding=Decoding(method="nucleus", top_p=0.9, min_tokens=5, max_tokens=16),
            prompts=("",),
            captions_per_image=2,
            batch_size=64,
            seed=seed,
        ),
        evaluation=EvaluationRecipe(
            shortlist=32,
            decoding=Decoding(method="beam", num_beams=3, min_tokens=5, max_tokens=16),
        ),
    )


def draw(out: Path, *, seed: int) -> dict[str, Any]:
    """Draw the quickstart's world: the sets `web`, `human` and `test` in the new folder `out`.

    Returns the number of images of each set.
    Raises ValueError if `out` exists.
    """
    check_is_free(out)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    config = replace(WORLD, seed=seed)
    draw_world(config, unfinished)
    unfinished.rename(out)
    return {
        str(out / name): num
        for name, num in (
            ("web", config.num_web), ("human", config.num_human), ("test", config.num_test),
        )
    }  # fmt: skip


def quickstart(out: Path, *, seed: int, has_ablation: bool = False) -> dict[str, Any]:
    """Draw the world, run the loop on it and write `results.json` and `report.html` in `out`.

    Returns what `results.json` holds. A quickstart that was stopped goes on where it was.
    Raises ValueError if `out` holds one of another seed.
    """
    world = out / "world"
    if not world.exists():
        draw(world, seed=seed)
    data = BootstrapData(world / "web", world / "human", world / "test")
    return bootstrap(quickstart_recipe(seed), data, out, has_ablation=has_ablation)


def _optimizer(lr: float) -> OptimizerRecipe:
    return OptimizerRecipe(lr=lr, min_lr=1e-5, warmup_steps=50, temperature_lr=0.02)
