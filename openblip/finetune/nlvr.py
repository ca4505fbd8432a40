"""NLVR2: is a sentence true of two images? (BLIP sec. 5.4)"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.nn import functional as F

from openblip.checkpoint import check_is_free, initialise_from
from openblip.data.nlvr import NlvrBatch, NlvrPair, NlvrStream, read_pairs
from openblip.data.rows import BadSample
from openblip.evaluation.nlvr import evaluate_nlvr, read_all_pairs
from openblip.hub import load
from openblip.images import ImageDecodeError, decode_image
from openblip.models.nlvr import FIRST_MERGE_LAYER, Nlvr, NlvrConfig, nlvr_from_blip
from openblip.tokenizer import Tokenizer
from openblip.training.best import Evaluation, Scores
from openblip.training.distributed import world
from openblip.training.finetuning import TaskRun, train_and_save
from openblip.training.loop import StepOutput, TrainingStep
from openblip.training.optim import OptimizerRecipe
from openblip.training.pairs import PairRecipe, Training, stream_options, train_transform
from openblip.training.state import TrainingFiles


class NlvrRecipe(PairRecipe):
    """One NLVR2 run; the defaults are the released code's, which cuts sentences by words alone."""

    optimizer: OptimizerRecipe = OptimizerRecipe(lr=3e-5, min_lr=0.0)
    max_tokens: int = Field(128, ge=3)
    max_words: int = Field(40, ge=1)


class NlvrRun(NlvrRecipe, TaskRun):
    """The same with its data and where it starts, as a recipe file describes it.

    data               JSONL or JSON files, see `data.nlvr`
    first_merge_layer  from which on a layer merges what it finds in the two images by weights
    """

    data: tuple[str, ...] = Field(min_length=1)
    first_merge_layer: int = Field(FIRST_MERGE_LAYER, ge=0)


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
class NlvrTraining(Training[NlvrBatch, Nlvr]):
    """Training on sentences about two images, of files as `data.nlvr` reads."""

    def new_stream(self) -> NlvrStream:
        recipe = self.recipe
        return NlvrStream(
            self.data,
            self.tokenizer,
            train_transform(recipe, self.model.config.vision.image_size_px),
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
            report = evaluate_nlvr(self.model, self.tokenizer, pairs, is_silent=True)
            assert report.accuracy is not None
            return Scores({"accuracy": report.accuracy}, report.accuracy)

        return self.evaluating(how, folder, measure)


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
    return train_and_save(
        run,
        out,
        lambda: nlvr_training(run, nlvr, data, tokenizer),
        title="NLVR2",
        what="NLVR2 fine-tuning",
        notes=notes,
        is_dry=is_dry,
    )


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
    notes = [f"it starts from {run.init}", *part.notes(), *start.notes()]
    return start.model, tokenizer, notes


def _sentences(data: Sequence[Path], max_words: int) -> Iterator[str]:
    for path in data:
        for pair in read_pairs(path, max_words):
            if not isinstance(pair, BadSample):
                yield pair.sentence
