"""A fine-tuning as a recipe file describes it: from an earlier model and data to a checkpoint."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from openblip.checkpoint import check_is_free, initialise_from, save_run
from openblip.config import Recipe
from openblip.data.batches import ImageTextBatch
from openblip.data.sources import Data, WeightedData, check_data
from openblip.hub import load
from openblip.models.blip import Blip
from openblip.models.text import Role
from openblip.tokenizer import Tokenizer
from openblip.training.loop import TrainingStep
from openblip.training.new_model import ModelRecipe
from openblip.training.pairs import PairRecipe, PairTraining, Training
from openblip.training.state import TrainingFiles

_log = logging.getLogger(__name__)


class FinetuningRecipe(PairRecipe):
    """What fine-tunings of a pre-trained model have in common.

    freeze_image_encoder  train all but the image encoder, which stays as it is to the bit: models
                          fine-tuned from one share it, and CapFilt encodes each image once for all
                          of them. It takes no gradient, no weight decay, and drops no path
    """

    freeze_image_encoder: bool = False


class FinetuningStep(TrainingStep[ImageTextBatch]):
    """A step on a model of which the image encoder may be frozen."""

    def __init__(self, blip: Blip, *, has_frozen_image_encoder: bool = False) -> None:
        super().__init__()
        self.blip = blip
        self._has_frozen_image_encoder = has_frozen_image_encoder
        if has_frozen_image_encoder:
            blip.vision.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Switch the mode, but leave a frozen image encoder without dropped paths."""
        super().train(mode)
        if self._has_frozen_image_encoder:
            self.blip.vision.eval()
        return self


class FinetuningRun(Recipe):
    """What a recipe file adds to the settings of a fine-tuning.

    data           data sets of any kind that `data.sources` reads, some perhaps with a weight
    init           checkpoint folder, transformers folder or name on the Hugging Face Hub
    image_size_px  side of the images; another one than that of `init` resizes the positions
    """

    data: tuple[str | WeightedData, ...] = Field(min_length=1)
    init: str
    image_size_px: int | None = Field(None, ge=1)


class TaskRun(Recipe):
    """Where the training of a model for another task starts, as a recipe file describes it.

    init           checkpoint folder, transformers folder or name on the Hugging Face Hub; or else
    model          sizes of a new one, with a vocabulary learned from the task's texts, of
    vocab_size     words
    image_size_px  side of the images; another one than that of `init` resizes the positions
    """

    init: str | None = None
    model: ModelRecipe | None = None
    vocab_size: int = Field(30_524, ge=16)
    image_size_px: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if (self.init is None) == (self.model is None):
            raise ValueError("expected either init, a model to start from, or model, its sizes")
        if self.model is not None and self.image_size_px is not None:
            raise ValueError("the size of a new model's images is model.image_size_px")
        return self


def run_finetuning(
    run: FinetuningRun,
    out: Path,
    *,
    roles: frozenset[Role],
    title: str,
    prepare: Callable[[Blip, Sequence[Data], Tokenizer], PairTraining],
    is_dry: bool,
) -> dict[str, Any]:
    """Fine-tune and save the checkpoint `out`; return what came out.

    roles    what the new model keeps of that of `init`
    prepare  the training of a model in place on the data
    is_dry   write nothing, and return what it would cost
    Raises ValueError if `out` exists, and for data or a model that cannot be read or used.
    """
    check_is_free(out)
    check_data(run.data)
    blip, tokenizer = load(run.init)
    start = initialise_from(blip, roles, run.image_size_px)
    notes = [f"it starts from {run.init}", *start.notes()]
    return train_and_save(
        run,
        out,
        lambda: prepare(start.blip, run.data, tokenizer),
        title=title,
        what=title,
        notes=notes,
        is_dry=is_dry,
    )


def train_and_save(
    run: Recipe,
    out: Path,
    prepare: Callable[[], Training[Any, Any]],
    *,
    title: str,
    what: str,
    notes: Sequence[str],
    is_dry: bool,
) -> dict[str, Any]:
    """Tell the notes, train, and save the checkpoint `out`; return what came out.

    prepare       the training of a model in place
    title, what   of it, in the log and in the model card
    notes         of where it starts, in sentences
    is_dry        write nothing, and return what it would cost
    """
    for note in notes:
        _log.info("%s", note)
    training = prepare()
    if is_dry:
        return training.dry_run().to_json()
    training.run(TrainingFiles.beside(out), title)
    return save_run(out, training.model, training.tokenizer, run, what, notes)
