"""NLVR2: is a sentence true of two images? (BLIP sec. 5.4)"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from openblip.checkpoint import check_is_free, initialise_from, save_run
from openblip.data.nlvr import NlvrBatch, NlvrPair, NlvrStream, read_pairs
from openblip.data.rows import BadSample
from openblip.evaluation.nlvr import evaluate_nlvr, read_all_pairs
from openblip.hub import load
from openblip.images import ImageDecodeError, decode_image
from openblip.models.nlvr import FIRST_MERGE_LAYER, Nlvr, NlvrConfig, nlvr_from_blip
from openblip.tokenizer import Tokenizer
from openblip.training.best import Evaluation, Scores
from openblip.training.distributed import world
from openblip.training.loop import StepOutput, TrainingStep
from openblip.training.new_model import ModelRecipe
from openblip.training.optim import OptimizerRecipe
from openblip.training.pairs import PairRecipe, Training, stream_options, train_transform
from openblip.training.state import TrainingFiles

_log = logging.getLogger(__name__)


class NlvrRecipe(PairRecipe):
    """One NLVR2 run; the defaults are the released code's, which cuts sentences by words alone."""

    optimizer: OptimizerRecipe = OptimizerRecipe(lr=3e-5, min_lr=0.0)
    max_tokens: int = Field(128, ge=3)
    max_words: int = Field(40, ge=1)


class NlvrRun(NlvrRecipe):
    """The same with its data and the model that it starts from, as a recipe file describes it.

    data               JSONL or JSON files, see `data.nlvr`
    init               checkpoint folder, transformers folder or name on the Hugging Face Hub, of a
                       pre-trained model; or else
    model              sizes of a new one, with a vocabulary learned from the sentences, of
    vocab_size         words
    image_size_px      side of the images; another one than that of `init` resizes the positions
    first_merge_layer  from which on a layer merges what it finds in the two images by weights
    """

    data: tuple[str, ...] = Field(min_length=1)
    init: str | None = None
    model: ModelRecipe | None = None
    vocab_size: int = Field(30_524, ge=16)
    image_size_px: int | None = Field(None, ge=1)
    first_merge_layer: int = Field(FIRST_MERGE_LAYER, ge=0)

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if (self.init is None) == (self.model is None):
            raise ValueError("expected either init, a model to start from, or model, its sizes")
        if self.model is not None and self.image_size_px is not None:
            raise ValueError("the size of a new model's images is model.image_size_px")
        return self


class NlvrStep(TrainingStep[NlvrBatch]):
    """Cross-entropy of true and false."""

    def __init__(self, nlvr: Nlvr) -> None:
        super().__init__()
        self.nlvr = nlvr

    def forward(self, batch: NlvrBatch, step: int) -> StepOutput:
        context = self.nlvr.project_context(self.nlvr.encode_image(batch.images))
        states = self.nlvr.encode_pair(batch.token_ids, batch.text_mask, context)
        logits = self.nlvr.truth_logits(states)
        loss = F.cross_entropy(logits, batch.labels)
        is_right = (logits.detach().argmax(dim=1) == batch.labels).float()
        return StepOutput(loss, {"loss": loss.detach(), "accuracy": is_right.mean()})

    def after_optimizer_step(self, output: StepOutput) -> None:
        """Write nothing: NLVR2 has neither twin nor queue."""


@dataclass(frozen=True)
class NlvrTraining(Training[NlvrBatch]):
    """Training on sentences about two images, of files as `data.nlvr` reads."""

    nlvr: Nlvr
    data: Sequence[Path]
    tokenizer: Tokenizer

    def new_stream(self) -> NlvrStream:
        recipe = self.recipe
        return NlvrStream(
            self.data,
            self.tokenizer,
            train_transform(recipe, self.nlvr.config.vision.image_size_px),
            max_tokens=recipe.max_tokens,
            max_words=recipe.max_words,
            **stream_options(recipe),
        )

    def evaluation(self, folder: Path) -> Evaluation | None:
        """Prepare what the recipe says; the best model by accuracy goes to `folder`.

        Source: the released code's choice of the best epoch.
        Raises ValueError for data that the model cannot be evaluated on.
        """
        how = self.recipe.evaluation
        if how is None:
            return None
        pairs = _usable_pairs(how.data) if world().is_first else []

        def measure() -> Scores:
            report = evaluate_nlvr(self.nlvr, self.tokenizer, pairs, is_silent=True)
            assert report.accuracy is not None
            return Scores({"accuracy": report.accuracy}, report.accuracy)

        return self.evaluating(how, folder, self.nlvr, self.tokenizer, measure)


def _usable_pairs(data: Sequence[str]) -> list[NlvrPair]:
    """Read pairs to evaluate on, all of them now: a bad one must not end a long training.

    Raises ValueError naming the first that is unusable.
    """
    pairs = [pair for path in data for pair in read_all_pairs(Path(path))]
    for pair in pairs:
        if pair.label is None:
            raise ValueError(f"evaluation.data: {pair.identifier} has no label")
        try:
            for content in pair.read_images():
                decode_image(content)
        except ImageDecodeError as error:
            raise ValueError(f"evaluation.data: {pair.identifier} is unusable: {error}") from error
    return pairs


def nlvr_training(
    recipe: NlvrRecipe, nlvr: Nlvr, data: Sequence[Path], tokenizer: Tokenizer
) -> NlvrTraining:
    """Prepare the training of a model on the sentences of `data`."""
    torch.manual_seed(recipe.seed)
    return NlvrTraining(NlvrStep(nlvr), recipe, nlvr, data, tokenizer)


def finetune_nlvr(
    recipe: NlvrRecipe,
    nlvr: Nlvr,
    data: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    files: TrainingFiles,
    title: str = "NLVR2",
) -> Nlvr:
    """Train a model in place and return it."""
    nlvr_training(recipe, nlvr, data, tokenizer).run(files, title)
    return nlvr


def run_nlvr(run: NlvrRun, out: Path, *, is_dry: bool = False) -> dict[str, Any]:
    """Train and save the checkpoint `out`, its losses beside it; return what came out.

    A run that was stopped goes on.
    is_dry  write nothing, and return what it would cost
    Raises ValueError if `out` exists, and for data or a model that cannot be read or used.
    """
    check_is_free(out)
    data = [Path(path) for path in run.data]
    torch.manual_seed(run.seed)
    nlvr, tokenizer, notes = _start(run, data)
    for note in notes:
        _log.info("%s", note)
    training = nlvr_training(run, nlvr, data, tokenizer)
    if is_dry:
        return training.dry_run().to_json()
    training.run(TrainingFiles.beside(out), "NLVR2")
    return save_run(out, nlvr, tokenizer, run, "NLVR2 fine-tuning", notes)


def _start(run: NlvrRun, data: Sequence[Path]) -> tuple[Nlvr, Tokenizer, list[str]]:
    """Return the model that training starts from, and what is to be known of it."""
    if run.model is not None:
        tokenizer = Tokenizer.train(_sentences(data, run.max_words), vocab_size=run.vocab_size)
        sizes = run.model.build_config(tokenizer).with_roles(frozenset({"pair"}))
        config = NlvrConfig(sizes.vision, sizes.text, sizes.tokens, run.first_merge_layer)
        note = f"a vocabulary of {tokenizer.vocab_size} words was learned from the sentences"
        return Nlvr(config), tokenizer, ["it starts from nothing", note]
    assert run.init is not None
    blip, tokenizer = load(run.init)
    part = initialise_from(blip, frozenset({"pair"}), run.image_size_px)
    start = nlvr_from_blip(part.blip, run.first_merge_layer)
    notes = [f"it starts from {run.init}", *part.notes()]
    for what, names in (("left out of its parts", start.left_out), ("drawn anew", start.drawn)):
        notes.append(f"tensors {what} ({len(names)}): {', '.join(names)}")
    return start.nlvr, tokenizer, notes


def _sentences(data: Sequence[Path], max_words: int) -> Iterator[str]:
    for path in data:
        for pair in read_pairs(path, max_words):
            if not isinstance(pair, BadSample):
                yield pair.sentence
