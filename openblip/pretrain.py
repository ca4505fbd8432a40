"""Pre-training: ITC, ITM and LM together on image-text pairs (BLIP sec. 3.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openblip.checkpoint import check_is_free, load_tokenizer, save_run
from openblip.config import Recipe
from openblip.data.batches import ImageTextBatch
from openblip.data.sources import Data, WeightedData, check_data, kept_captions
from openblip.losses import lm_loss
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer
from openblip.training.alignment import Alignment, AlignmentConfig
from openblip.training.distributed import world
from openblip.training.loop import StepOutput, TrainingStep
from openblip.training.optim import OptimizerRecipe
from openblip.training.pairs import PairRecipe, PairTraining
from openblip.training.state import TrainingFiles


class ModelRecipe(Recipe):
    """Sizes of a new model; the defaults are the paper's base size at 224 px."""

    image_size_px: int = 224
    patch_size_px: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    drop_path: float = 0.0
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    ffn_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    embedding_width: int = 256
    init_std: float = 0.02
    position_init_std: float = 0.02

    def build_config(self, tokenizer: Tokenizer) -> BlipConfig:
        """Return the configuration of this size over a tokenizer's vocabulary."""
        return BlipConfig(
            vision=VisionConfig(
                image_size_px=self.image_size_px,
                patch_size_px=self.patch_size_px,
                width=self.vision_width,
                num_layers=self.vision_layers,
                num_heads=self.vision_heads,
                drop_path=self.drop_path,
                init_std=self.init_std,
                position_init_std=self.position_init_std,
            ),
            text=MedConfig(
                vocab_size=tokenizer.vocab_size,
                width=self.text_width,
                num_layers=self.text_layers,
                num_heads=self.text_heads,
                ffn_width=self.ffn_width,
                max_positions=self.max_positions,
                context_width=self.vision_width,
                dropout=self.dropout,
                init_std=self.init_std,
            ),
            tokens=tokenizer.special,
            embedding_width=self.embedding_width,
        )


class ObjectiveRecipe(Recipe):
    """Weights of the losses, and the momentum twin's share of the ITC targets."""

    itc_weight: float = Field(1.0, ge=0)
    itm_weight: float = Field(1.0, ge=0)
    lm_weight: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    soft_target_weight: float = Field(0.4, ge=0, le=1)
    soft_target_ramp_steps: int = Field(0, ge=0)
    alignment: AlignmentConfig = AlignmentConfig()

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


class PretrainStep(TrainingStep):
    """ITC + ITM + LM of a batch, the image encoded once."""

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
        measures = {"loss": total, "itc": aligned.itc, "itm": aligned.itm, "lm": lm}
        detached = {name: value.detach() for name, value in measures.items()}
        return StepOutput(total, detached, (aligned.entries,))

    def after_optimizer_step(self, output: StepOutput) -> None:
        self.alignment.after_optimizer_step(self.blip, list(output.entries))


def pretraining(recipe: PretrainRecipe, data: Sequence[Data], tokenizer: Tokenizer) -> PairTraining:
    """Prepare the training of a new model on the kept captions of `data`."""
    torch.manual_seed(recipe.seed)
    blip = Blip(recipe.model.build_config(tokenizer))
    step = PretrainStep(blip, recipe.objective)
    return PairTraining(step, blip, recipe, data, tokenizer)


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
    return training.blip


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
