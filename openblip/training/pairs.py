"""Training on image-text pairs: what pre-training and the fine-tunings have in common."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from openblip.config import Recipe
from openblip.data.stream import PairStream
from openblip.images import TrainTransform
from openblip.tokenizer import Tokenizer
from openblip.training.loop import Precision, TrainingStep, fit
from openblip.training.optim import OptimizerRecipe


class PairRecipe(Recipe):
    """How long to train on pairs, how fast, and what is done to images and texts.

    The defaults are the released code's for fine-tuning.
    max_tokens, max_words  where a text is cut, with [CLS] and [SEP] and without
    min_crop_scale         smallest share of an image that a random crop keeps
    """

    optimizer: OptimizerRecipe = OptimizerRecipe(lr=1e-5, min_lr=0.0)
    num_steps: int = Field(10_000, ge=1)
    batch_size: int = Field(256, ge=1)
    max_tokens: int = Field(40, ge=3)
    max_words: int = Field(30, ge=1)
    min_crop_scale: float = Field(0.5, gt=0, le=1)
    randaugment_ops: int = Field(2, ge=0)
    randaugment_magnitude: int = Field(5, ge=0, le=10)
    flip: bool = True
    precision: Precision = "float32"
    seed: int = 42


def train_on_pairs(
    step: TrainingStep,
    recipe: PairRecipe,
    data: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    image_size_px: int,
    log_path: Path,
    title: str,
    prefix: str = "",
) -> None:
    """Train the step's model in place on all kept captions of `data`.

    data    tar shards, folders of them, image folders or JSONL files
    prefix  put before every text
    """
    stream = PairStream(
        data,
        tokenizer,
        TrainTransform(
            image_size_px,
            recipe.min_crop_scale,
            recipe.randaugment_ops,
            recipe.randaugment_magnitude,
            recipe.flip,
        ),
        batch_size=recipe.batch_size,
        max_tokens=recipe.max_tokens,
        max_words=recipe.max_words,
        seed=recipe.seed,
        prefix=prefix,
    )
    fit(
        step,
        iter(stream),
        recipe.optimizer,
        num_steps=recipe.num_steps,
        title=title,
        log_path=log_path,
        precision=recipe.precision,
    )
    stream.warn_of_problems(title)
