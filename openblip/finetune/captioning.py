"""Captioning: the decoder alone, on human captions behind a prompt (BLIP sec. 5.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openblip.captions import DEFAULT_PROMPT
from openblip.data.batches import ImageTextBatch
from openblip.data.samples import Sample
from openblip.data.sources import Data
from openblip.evaluation.captioning import evaluate_captioning
from openblip.generation import Decoding
from openblip.inference import Engine
from openblip.losses import lm_loss
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.best import EvaluatingRecipe, Scores
from openblip.training.finetuning import (
    FinetuningRecipe,
    FinetuningRun,
    FinetuningStep,
    run_finetuning,
)
from openblip.training.loop import StepOutput
from openblip.training.pairs import PairTraining
from openblip.training.state import TrainingFiles


class CaptioningRecipe(FinetuningRecipe):
    """One captioning run; the defaults are the released code's."""

    prompt: str = DEFAULT_PROMPT
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class CaptioningRun(CaptioningRecipe, FinetuningRun):
    """The same with its data and the model that it starts from, as a recipe file describes it."""


class CaptioningStep(FinetuningStep):
    """LM of a batch; the prompt is given, not predicted."""

    def __init__(self, blip: Blip, recipe: CaptioningRecipe, prompt_length: int) -> None:
        super().__init__(blip, has_frozen_image_encoder=recipe.freeze_image_encoder)
        self.prompt_length = prompt_length
        self.label_smoothing = recipe.label_smoothing

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        context = self.blip.project_context(self.blip.encode_image(batch.images))
        lm = lm_loss(
            self.blip.decode(batch.token_ids, batch.text_mask, context),
            batch.token_ids,
            batch.text_mask,
            prompt_length=self.prompt_length,
            label_smoothing=self.label_smoothing,
        )
        return StepOutput(lm, {"loss": lm.detach()})

    def after_optimizer_step(self, output: StepOutput) -> None:
        """Write nothing: captioning has neither twin nor queue."""


def captioning_training(
    recipe: CaptioningRecipe, blip: Blip, data: Sequence[Data], tokenizer: Tokenizer
) -> PairTraining:
    """Prepare the training of a model with the role `decode`."""
    torch.manual_seed(recipe.seed)
    # [CLS] stands where [DEC] will; [SEP] ends the encoded prompt and is no part of it.
    prompt_length = len(tokenizer.encode(recipe.prompt)) - 1
    step = CaptioningStep(blip, recipe, prompt_length)

    def measure(
        blip: Blip, tokenizer: Tokenizer, samples: Sequence[Sample], how: EvaluatingRecipe
    ) -> Scores:
        scores = evaluate_captioning(
            Engine.plain(blip, tokenizer),
            samples,
            prompt=recipe.prompt,
            decoding=how.decoding or Decoding(),
            is_silent=True,
        ).scores
        assert scores is not None
        # The released code's choice of the best epoch.
        return Scores(scores.to_json(), scores.cider + scores.bleu_4)

    return PairTraining(step, recipe, blip, data, tokenizer, recipe.prompt, measure)


def finetune_captioning(
    recipe: CaptioningRecipe,
    blip: Blip,
    data: Sequence[Data],
    tokenizer: Tokenizer,
    *,
    files: TrainingFiles,
    title: str = "captioner",
) -> Blip:
    """Train a model with the role `decode` in place and return it."""
    captioning_training(recipe, blip, data, tokenizer).run(files, title)
    return blip


def run_captioning(run: CaptioningRun, out: Path, *, is_dry: bool = False) -> dict[str, Any]:
    """Fine-tune and save the checkpoint `out`, its losses beside it; return what came out.

    A run that was stopped goes on.
    is_dry  write nothing, and return what it would cost
    Raises ValueError if `out` exists, and for data or a model that cannot be read or used.
    """

    def prepare(blip: Blip, data: Sequence[Data], tokenizer: Tokenizer) -> PairTraining:
        return captioning_training(run, blip, data, tokenizer)

    return run_finetuning(
        run, out, roles=frozenset({"decode"}), title="captioning", prepare=prepare, is_dry=is_dry
    )
