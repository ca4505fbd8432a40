"""Training on a stream: what pre-training and the fine-tunings have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import Field, model_validator

from openblip.checkpoint import Model, replace_checkpoint
from openblip.config import Recipe, dump_recipe
from openblip.data.batches import Batch, ImageTextBatch
from openblip.data.pairs import CaptionChoice, PairStream
from openblip.data.position import start_positions
from openblip.data.samples import Sample
from openblip.data.sources import Data, list_shards, read_samples
from openblip.data.stream import SampleStream, StreamOptions
from openblip.images import ImageDecodeError, TrainTransform, decode_image
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.best import EvaluatingRecipe, Evaluation, Scores
from openblip.training.distributed import world
from openblip.training.dry_run import DryRun, dry_run
from openblip.training.loop import TrainingStep, fit
from openblip.training.optim import OptimizerRecipe
from openblip.training.parallel import Parallel
from openblip.training.precision import Precision
from openblip.training.state import SavingRecipe, TrainingFiles, TrainingState
from openblip.training.tracking import TrackerName

B = TypeVar("B", bound=Batch)
M = TypeVar("M", bound=Model)

MAY_CHANGE = (
    "activation_checkpointing",
    "evaluation",
    "num_workers",
    "max_bad_fraction",
    "saving",
    "tracking",
)
"""Settings that change no number, so that a training may go on with others."""


class PairRecipe(Recipe):
    """How long to train, how fast, and what is done to images and texts.

    The defaults are the released code's for fine-tuning.
    captions               of an image: `all` that are kept are pairs, or `one`, drawn anew every
                           epoch
    max_tokens, max_words  where a text is cut, with [CLS] and [SEP] and without
    min_crop_scale         smallest share of an image that a random crop keeps
    accumulation_steps     batches whose gradients are averaged for one optimizer step; in-batch
                           negatives stay those of the batch
    precision              of the arithmetic; weights and optimizer stay float32
    activation_checkpointing  keep no activations within the transformer layers and compute them
                           anew in the backward pass: less memory, about a third more time, the
                           same numbers
    compile                the transformer layers by torch.compile; the first steps take minutes
    parallel               on several ranks: `ddp` keeps a whole copy of the model on each; `fsdp`
                           splits it with the optimizer's state, for models too large for that
    num_workers            threads that decode and augment
    max_bad_fraction       share of the samples that may be unusable; more stops the run
    saving                 when the state of the training is saved
    tracking               where the log's measures go besides: `tensorboard`, `wandb`
    evaluation             when and on what the model is evaluated, and the best one kept
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
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: Parallel = "ddp"
    seed: int = 42
    num_workers: int = Field(2, ge=1)
    max_bad_fraction: float = Field(0.5, ge=0, le=1)
    saving: SavingRecipe = SavingRecipe()
    tracking: tuple[TrackerName, ...] = ()
    evaluation: EvaluatingRecipe | None = None

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        if self.parallel == "fsdp" and self.precision == "float16":
            # The loss scale would have to know of overflows in the other ranks' parts.
            raise ValueError("parallel fsdp takes precision float32 or bfloat16, not float16")
        return self


Measure = Callable[[Blip, Tokenizer, Sequence[Sample], EvaluatingRecipe], Scores]


@dataclass(frozen=True)
class Training(ABC, Generic[B, M]):
    """A step on a model, and all that its batches are made of.

    data  data sets that the task's stream reads
    With several ranks, each takes its part of the data, and `batch_size` of them at a time.
    """

    step: TrainingStep[B]
    recipe: PairRecipe
    model: M
    data: Sequence[Data]
    tokenizer: Tokenizer

    @abstractmethod
    def new_stream(self) -> SampleStream[Any, B]:
        """Return this rank's stream at its start."""

    def run(self, files: TrainingFiles, title: str) -> None:
        """Train the step's model in place, or go on with that.

        Raises ValueError if `files` hold the state of another training, and for data that the
        model cannot be evaluated on.
        """
        evaluation = self.evaluation(files.best)
        recipe, stream = self.recipe, self.new_stream()
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
            parallel=recipe.parallel,
            is_compiled=recipe.compile,
            is_recomputed=recipe.activation_checkpointing,
            state=state,
            evaluation=evaluation,
            tracking=recipe.tracking,
        )
        stream.warn_of_problems(title)

    def evaluation(self, folder: Path) -> Evaluation | None:
        """Prepare what the recipe says; the best model goes to `folder`.

        Raises ValueError for data that the model cannot be evaluated on.
        """
        if self.recipe.evaluation is not None:
            raise ValueError("evaluation: this task has none; leave it out of the recipe")
        return None

    def evaluating(
        self, how: EvaluatingRecipe, folder: Path, measure: Callable[[], Scores]
    ) -> Evaluation:
        """Return an evaluation that keeps the best model so far as the checkpoint `folder`."""

        def keep(num_steps: int, scores: Scores) -> None:
            card = (
                f"# {folder.name}\n\nThe best model so far of a training by openblip, after "
                f"{num_steps} steps: {scores.to_json()}.\n\n"
                f"## Recipe\n\n```yaml\n{dump_recipe(self.recipe)}```\n"
            )
            replace_checkpoint(folder, self.model, self.tokenizer, card)

        return Evaluation(how.every_steps, measure, keep)

    def dry_run(self) -> DryRun:
        """Say what it would cost, from a few steps that are thrown away."""
        return dry_run(
            self.step,
            self.new_stream(),
            self.recipe.optimizer,
            num_steps=self.recipe.num_steps,
            precision=self.recipe.precision,
            accumulation_steps=self.recipe.accumulation_steps,
            parallel=self.recipe.parallel,
            is_compiled=self.recipe.compile,
            is_recomputed=self.recipe.activation_checkpointing,
        )


@dataclass(frozen=True)
class PairTraining(Training[ImageTextBatch, Blip]):
    """Training on image-text pairs.

    prefix   put before every text
    measure  evaluates the model if the recipe says so; None where the task has no scores
    """

    prefix: str = ""
    measure: Measure | None = None

    def new_stream(self) -> PairStream:
        recipe = self.recipe
        return PairStream(
            self.data,
            self.tokenizer,
            train_transform(recipe, self.model.config.vision.image_size_px),
            max_tokens=recipe.max_tokens,
            captions=recipe.captions,
            max_words=recipe.max_words,
            prefix=self.prefix,
            **stream_options(recipe),
        )

    def evaluation(self, folder: Path) -> Evaluation | None:
        recipe, measure = self.recipe.evaluation, self.measure
        if recipe is None or measure is None:
            return super().evaluation(folder)
        samples = usable_samples(recipe.data, _lacks_caption) if world().is_first else []
        return self.evaluating(
            recipe, folder, lambda: measure(self.model, self.tokenizer, samples, recipe)
        )


def train_transform(recipe: PairRecipe, image_size_px: int) -> TrainTransform:
    """Return what a recipe does to training images."""
    return TrainTransform(
        image_size_px,
        recipe.min_crop_scale,
        recipe.randaugment_ops,
        recipe.randaugment_magnitude,
        recipe.flip,
    )


def stream_options(recipe: PairRecipe) -> StreamOptions:
    """Return what a recipe says of a stream of any examples, at this rank's start."""
    return StreamOptions(
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        num_workers=recipe.num_workers,
        max_bad_fraction=recipe.max_bad_fraction,
        position=start_positions(world().size)[world().rank],
    )


def usable_samples(data: Sequence[str], lack: Callable[[Sample], str | None]) -> list[Sample]:
    """Read samples to evaluate on, all of them now: a bad one must not end a long training.

    lack  returns what a sample lacks, if anything
    Raises ValueError naming the first that is unusable.
    """

    def refuse(key: str, reason: str) -> None:
        raise ValueError(f"evaluation.data: sample {key} is unusable: {reason}")

    samples = [
        sample
        for path in data
        for shard in list_shards(path)
        for sample in read_samples(shard, on_bad=refuse)
    ]
    if not samples:
        raise ValueError(f"evaluation.data: there is no sample in {', '.join(data)}")
    for sample in samples:
        if (reason := lack(sample)) is not None:
            refuse(sample.key, reason)
        try:
            decode_image(sample.image_bytes)
        except ImageDecodeError as error:
            refuse(sample.key, str(error))
    return samples


def _lacks_caption(sample: Sample) -> str | None:
    return None if sample.captions else "it has no caption"
