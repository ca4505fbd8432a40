"""A fine-tuning as a recipe file describes it: from an earlier model and data to a checkpoint."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from openblip.checkpoint import check_is_free, initialise_from, save_run
from openblip.config import Recipe
from openblip.data.sources import Data, WeightedData, check_data
from openblip.hub import load
from openblip.models.blip import Blip
from openblip.models.text import Role
from openblip.tokenizer import Tokenizer
from openblip.training.pairs import PairTraining
from openblip.training.state import TrainingFiles

_log = logging.getLogger(__name__)


class FinetuningRun(Recipe):
    """What a recipe file adds to the settings of a fine-tuning.

    data           data sets of any kind that `data.sources` reads, some perhaps with a weight
    init           checkpoint folder, transformers folder or name on the Hugging Face Hub
    image_size_px  side of the images; another one than that of `init` resizes the positions
    """

    data: tuple[str | WeightedData, ...] = Field(min_length=1)
    init: str
    image_size_px: int | None = Field(None, ge=1)


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
    for note in notes:
        _log.info("%s", note)
    training = prepare(start.blip, run.data, tokenizer)
    if is_dry:
        return training.dry_run().to_json()
    training.run(TrainingFiles.beside(out), title)
    return save_run(out, start.blip, tokenizer, run, title, notes)
