"""Pre-training: ITC, ITM and LM together on image-text pairs (BLIP sec. 3.2).

Text-guided reconstruction joins them where its weight is not 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from openblip.checkpoint import check_is_free, load_tokenizer, save_run
from openblip.config import Recipe
from openblip.data.batches import ImageTextBatch
from openblip.data.samples import Sample
from openblip.data.sources import Data, WeightedData, check_data, kept_captions
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.retrieval import evaluate_itc
from openblip.generation import Decoding
from openblip.inference import Engine
from openblip.losses import lm_loss, reconstruction_loss
from openblip.models.blip import Blip
from openblip.models.reconstruction import ReconstructionConfig, draw_visible, is_hidden
from openblip.tokenizer import Tokenizer
from openblip.training.alignment import Alignment, AlignmentConfig, AlignmentOutput
from openblip.training.best import EvaluatingRecipe, Scores
from openblip.training.distributed import world
from openblip.training.loop import StepOutput, TrainingStep
from openblip.training.new_model import ModelRecipe
from openblip.training.optim import OptimizerRecipe
from openblip.training.pairs import PairRecipe, PairTraining
from openblip.training.state import TrainingFiles


class ObjectiveRecipe(Recipe):
    """Weights of the losses, and the momentum twin's share of the ITC targets.

    reconstruction_weight  0, as in the paper, makes a model without a reconstruction head
    reconstruction         of the head
    """

    itc_weight: float = Field(1.0, ge=0)
    itm_weight: float = Field(1.0, ge=0)
    lm_weight: float = Field(1.0, ge=0)
    reconstruction_weight: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    soft_target_weight: float = Field(0.4, ge=0, le=1)
    soft_target_ramp_steps: int = Field(0, ge=0)
    alignment: AlignmentConfig = AlignmentConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()

    def soft_target_weight_at(self, step: int) -> float:
        """Return the weight at a step: from 0 in a straight line over the ramp."""
        if step >= self.soft_target_ramp_steps:
            return self.soft_target_weight
        return self.soft_target_weight * step / self.soft_target_ramp_steps


class PretrainRecipe(PairRecipe):
    """One pre-training run; the defaults are the paper's."""

    model: ModelRecipe = ModelRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe(warmup_steps=3000)
    num_steps: int = Field(100_000, ge=1)
    batch_size: int = Field(64, ge=2)
    max_tokens: int = Field(30, ge=3)
    min_crop_scale: float = Field(0.2, gt=0, le=1)


class PretrainRun(PretrainRecipe):
    """A pre-training with its data, as a recipe file describes it.

    data        data sets of any kind that `data.sources` reads, some perhaps with a weight
    vocabulary  BERT's `vocab.txt`, a `tokenizer.json` or a checkpoint folder; without one a
                WordPiece vocabulary is learned from the captions, which reads all data once
    vocab_size  of a vocabulary that is learned
    """

    data: tuple[str | WeightedData, ...] = Field(min_length=1)
    vocabulary: str | None = None
    vocab_size: int = Field(30_524, ge=16)


class PretrainStep(TrainingStep[ImageTextBatch]):
    """ITC + ITM + LM of a batch, the whole image encoded once; reconstruction where it weighs."""

    def __init__(self, blip: Blip, objective: ObjectiveRecipe) -> None:
        super().__init__()
        self.blip = blip
        self.objective = objective
        self.alignment = Alignment(blip, objective.alignment)

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        blip, objective = self.blip, self.objective
        image_states = blip.encode_image(batch.images)
        context = blip.project_context(image_states)
        aligned = self.alignment(
            blip,
            batch.images,
            image_states,
            context,
            batch.token_ids,
            batch.text_mask,
            batch.image_ids,
            batch.text_ids,
            objective.soft_target_weight_at(step),
        )
        logits = blip.decode(batch.token_ids, batch.text_mask, context)
        lm = lm_loss(
            logits, batch.token_ids, batch.text_mask, label_smoothing=objective.label_smoothing
        )
        total = (
            objective.itc_weight * aligned.itc
            + objective.itm_weight * aligned.itm
            + objective.lm_weight * lm
        )
        measures = {"itc": aligned.itc, "itm": aligned.itm, "lm": lm}
        if objective.reconstruction_weight:
            reconstruction = self._reconstruction(batch, aligned)
            total = total + objective.reconstruction_weight * reconstruction
            measures["reconstruction"] = reconstruction
        measures = {"loss": total} | measures
        detached = {name: value.detach() for name, value in measures.items()}
        return StepOutput(total, detached, (aligned.entries,))

    def _reconstruction(self, batch: ImageTextBatch, aligned: AlignmentOutput) -> Tensor:
        num_images, device = batch.images.shape[0], batch.images.device
        num_patches = self.blip.config.vision.num_patches
        num_visible = self.objective.reconstruction.num_visible(num_patches)
        visible = draw_visible(num_images, num_patches, num_visible, device)
        predicted = self.blip.reconstruct(
            batch.images, visible, aligned.text_states, batch.text_mask
        )
        hidden = is_hidden(visible, num_patches)
        return reconstruction_loss(predicted, aligned.momentum_image_states, hidden)

    def after_optimizer_step(self, output: StepOutput) -> None:
        self.alignment.after_optimizer_step(self.blip, list(output.entries))


def pretraining(recipe: PretrainRecipe, data: Sequence[Data], tokenizer: Tokenizer) -> PairTraining:
    """Prepare the training of a new model on the kept captions of `data`."""
    torch.manual_seed(recipe.seed)
    config = recipe.model.build_config(tokenizer)
    if recipe.objective.reconstruction_weight:
        config = replace(config, reconstruction=recipe.objective.reconstruction)
    blip = Blip(config)
    step = PretrainStep(blip, recipe.objective)
    return PairTraining(step, recipe, blip, data, tokenizer, measure=_measure)


def _measure(
    blip: Blip, tokenizer: Tokenizer, samples: Sequence[Sample], how: EvaluatingRecipe
) -> Scores:
    """Measure recalls by ITC alone, whose mean chooses the best, and captions without a prompt."""
    engine = Engine.plain(blip, tokenizer)
    itc = evaluate_itc(engine, samples)
    captions = evaluate_captioning(
        engine, samples, prompt="", decoding=how.decoding or Decoding(), is_silent=True
    ).scores
    assert captions is not None
    values = {f"itc_{name}": value for name, value in itc.to_json().items()}
    values |= {"cider": captions.cider, "bleu_4": captions.bleu_4}
    return Scores(values, itc.mean)


def pretrain(
    recipe: PretrainRecipe,
    data: Sequence[Data],
    tokenizer: Tokenizer,
    *,
    files: TrainingFiles,
    title: str = "pre-training",
) -> Blip:
    """Train a new model on the kept captions of `data` and return it.

    data  data sets of any kind that `data.sources` reads
    """
    training = pretraining(recipe, data, tokenizer)
    training.run(files, title)
    return training.model


def run_pretraining(run: PretrainRun, out: Path, *, is_dry: bool = False) -> dict[str, Any]:
    """Pre-train and save the checkpoint `out`, its losses beside it; return what came out.

    A run that was stopped goes on.
    is_dry  write nothing, and return what it would cost
    Raises ValueError if `out` exists, and for data or a vocabulary that cannot be read.
    """
    check_is_free(out)
    data = run.data
    check_data(data)
    if run.vocabulary is not None:
        tokenizer = load_tokenizer(run.vocabulary)
        note = f"the vocabulary of {tokenizer.vocab_size} words is that of {run.vocabulary}"
    else:
        if is_dry:
            tokenizer = Tokenizer.train(kept_captions(data), vocab_size=run.vocab_size)
        else:
            tokenizer = _learned(data, run.vocab_size, TrainingFiles.beside(out).state)
        note = f"a vocabulary of {tokenizer.vocab_size} words was learned from the captions"
    if is_dry:
        return pretraining(run, data, tokenizer).dry_run().to_json()
    blip = pretrain(run, data, tokenizer, files=TrainingFiles.beside(out))
    return save_run(out, blip, tokenizer, run, "pre-training", [note])


def _learned(data: Sequence[Data], vocab_size: int, state: Path) -> Tokenizer:
    """Learn a vocabulary, or read the one that the run which goes on has learned."""
    path = state / "tokenizer.json"
    if world().is_first and not (state / "recipe.yaml").exists():
        learned = Tokenizer.train(kept_captions(data), vocab_size=vocab_size)
        state.mkdir(exist_ok=True)
        learned.save(path)
    world().wait()
    return Tokenizer.load(path)
