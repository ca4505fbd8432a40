"""Training on image-text pairs: what pre-training and the fine-tunings have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from openblip.config import Recipe
from openblip.data.blocks import CaptionChoice
from openblip.data.position import start_positions
from openblip.data.sources import Data
from openblip.data.stream import PairStream
from openblip.images import TrainTransform
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.distributed import world
from openblip.training.dry_run import DryRun, dry_run
from openblip.training.loop import Precision, TrainingStep, fit
from openblip.training.optim import OptimizerRecipe
from openblip.training.state import SavingRecipe, TrainingFiles, TrainingState

MAY_CHANGE = ("num_workers", "max_bad_fraction", "saving")
"""Settings that change no number, so that a training may go on with others."""


class PairRecipe(Recipe):
    """How long to train on pairs, how fast, and what is done to images and texts.

    The defaults are the released code's for fine-tuning.
    captions               of an image: `all` that are kept are pairs, or `one`, drawn anew every
                           epoch
    max_tokens, max_words  where a text is cut, with [CLS] and [SEP] and without
    min_crop_scale         smallest share of an image that a random crop keeps
    accumulation_steps     batches whose gradients are averaged for one optimizer step; in-batch
                           negatives stay those of the batch
    num_workers            threads that decode and augment
    max_bad_fraction       share of the samples that may be unusable; more stops the run
    saving                 when the state of the training is saved
    """

    optimizer: OptimizerRecipe = OptimizerRecipe(lr=1e-5, min_lr=0.0)
    num_steps: int = Field(10_000, ge=1)
    batch_size: int = Field(256, ge=1)
    accumulation_steps: int = Field(1, ge=1)
    captions: CaptionChoice = "all"
    max_tokens: int = Field(40, ge=3)
    max_words: int = Field(30, ge=1)
    min_crop_scale: float = Field(0.5, gt=0, le=1)
    randaugment_ops: int = Field(2, ge=0)
    randaugment_magnitude: int = Field(5, ge=0, le=10)
    flip: bool = True
    precision: Precision = "float32"
    seed: int = 42
    num_workers: int = Field(2, ge=1)
    max_bad_fraction: float = Field(0.5, ge=0, le=1)
    saving: SavingRecipe = SavingRecipe()


@dataclass(frozen=True)
class PairTraining:
    """A step on a model, and all that its batches are made of.

    data    data sets of any kind that `data.sources` reads
    prefix  put before every text
    With several ranks, each takes its part of the data, and `batch_size` of them at a time.
    """

    step: TrainingStep
    blip: Blip
    recipe: PairRecipe
    data: Sequence[Data]
    tokenizer: Tokenizer
    prefix: str = ""

    def run(self, files: TrainingFiles, title: str) -> None:
        """Train the step's model in place, or go on with that.

        Raises ValueError if `files` hold the state of another training.
        """
        recipe, stream = self.recipe, self._stream()
        unchanged = {name: PairRecipe.model_fields[name].default for name in MAY_CHANGE}
        state = TrainingState(files.state, recipe.saving, recipe.model_copy(update=unchanged))
        fit(
            self.step,
            stream,
            recipe.optimizer,
            num_steps=recipe.num_steps,
            title=title,
            log_path=files.log,
            precision=recipe.precision,
            accumulation_steps=recipe.accumulation_steps,
            state=state,
        )
        stream.warn_of_problems(title)

    def dry_run(self) -> DryRun:
        """Say what it would cost, from a few steps that are thrown away."""
        return dry_run(
            self.step,
            self._stream(),
            self.recipe.optimizer,
            num_steps=self.recipe.num_steps,
            precision=self.recipe.precision,
            accumulation_steps=self.recipe.accumulation_steps,
        )

    def _stream(self) -> PairStream:
        recipe = self.recipe
        return PairStream(
            self.data,
            self.tokenizer,
            TrainTransform(
                self.blip.config.vision.image_size_px,
                recipe.min_crop_scale,
                recipe.randaugment_ops,
                recipe.randaugment_magnitude,
                recipe.flip,
            ),
            batch_size=recipe.batch_size,
            max_tokens=recipe.max_tokens,
            captions=recipe.captions,
            max_words=recipe.max_words,
            seed=recipe.seed,
            prefix=self.prefix,
            num_workers=recipe.num_workers,
            max_bad_fraction=recipe.max_bad_fraction,
            position=start_positions(world().size)[world().rank],
        )
