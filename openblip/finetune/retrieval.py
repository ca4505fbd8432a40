"""Image-text retrieval: ITC and ITM on human captions; CapFilt's filter is this (BLIP sec. 5.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openblip.checkpoint import log_path_of
from openblip.data.batches import ImageTextBatch
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.alignment import Alignment, AlignmentConfig
from openblip.training.finetuning import FinetuningRun, run_finetuning
from openblip.training.loop import StepOutput, TrainingStep
from openblip.training.pairs import PairRecipe, train_on_pairs


class RetrievalRecipe(PairRecipe):
    """One retrieval run; the defaults are the released code's."""

    batch_size: int = Field(256, ge=2)
    max_tokens: int = Field(35, ge=3)
    soft_target_weight: float = Field(0.4, ge=0, le=1)
    soft_target_ramp_steps: int = Field(0, ge=0)
    alignment: AlignmentConfig = AlignmentConfig(positives="image", mining="online")

    def soft_target_weight_at(self, step: int) -> float:
        """Return the weight at a step: from 0 in a straight line over the ramp."""
        if step >= self.soft_target_ramp_steps:
            return self.soft_target_weight
        return self.soft_target_weight * step / self.soft_target_ramp_steps


class RetrievalRun(RetrievalRecipe, FinetuningRun):
    """The same with its data and the model that it starts from, as a recipe file describes it."""


class RetrievalStep(TrainingStep):
    """ITC + ITM of a batch."""

    def __init__(self, blip: Blip, recipe: RetrievalRecipe) -> None:
        super().__init__()
        self.blip = blip
        self.recipe = recipe
        self.alignment = Alignment(blip, recipe.alignment)

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        image_states = self.blip.encode_image(batch.images)
        aligned = self.alignment(
            self.blip,
            batch.images,
            image_states,
            self.blip.project_context(image_states),
            batch.token_ids,
            batch.text_mask,
            batch.image_ids,
            batch.text_ids,
            self.recipe.soft_target_weight_at(step),
        )
        total = aligned.itc + aligned.itm
        measures: dict[str, torch.Tensor | float] = {
            "loss": total.detach(),
            "itc": aligned.itc.detach(),
            "itm": aligned.itm.detach(),
            "without_negative": float(aligned.num_without_negative),
        }
        return StepOutput(total, measures, (aligned.entries,))

    def after_optimizer_step(self, output: StepOutput) -> None:
        self.alignment.after_optimizer_step(self.blip, list(output.entries))


def finetune_retrieval(
    recipe: RetrievalRecipe,
    blip: Blip,
    data: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    log_path: Path,
    title: str = "filter",
) -> Blip:
    """Train a model with the roles `text` and `pair` in place and return it."""
    torch.manual_seed(recipe.seed)
    train_on_pairs(
        RetrievalStep(blip, recipe),
        recipe,
        data,
        tokenizer,
        image_size_px=blip.config.vision.image_size_px,
        log_path=log_path,
        title=title,
    )
    return blip


def run_retrieval(run: RetrievalRun, out: Path) -> dict[str, Any]:
    """Fine-tune and save the checkpoint `out`, its losses beside it; return what came out.

    Raises ValueError if `out` exists, and for data or a model that cannot be read or used.
    """
    title = "retrieval fine-tuning"

    def train(blip: Blip, data: list[Path], tokenizer: Tokenizer) -> Blip:
        return finetune_retrieval(
            run, blip, data, tokenizer, log_path=log_path_of(out), title=title
        )

    return run_finetuning(run, out, roles=frozenset({"text", "pair"}), title=title, train=train)
