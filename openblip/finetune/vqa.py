"""Visual question answering: the LM of all answers, each by its weight (BLIP sec. 5.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openblip.answering import ANSWER_DECODING, write_answers
from openblip.checkpoint import check_is_free, initialise_from
from openblip.data.questions import VqaBatch, VqaStream, question_texts
from openblip.data.samples import Sample
from openblip.data.sources import Data, WeightedData, check_data
from openblip.evaluation.vqa import evaluate_vqa, questions_of
from openblip.hub import is_vqa, load, load_vqa
from openblip.losses import text_losses, vqa_loss
from openblip.models.vqa import Vqa, VqaConfig, vqa_from_blip
from openblip.tokenizer import Tokenizer
from openblip.training.best import Evaluation, Scores
from openblip.training.distributed import world
from openblip.training.finetuning import TaskRun, train_and_save
from openblip.training.loop import StepOutput, TrainingStep
from openblip.training.optim import OptimizerRecipe
from openblip.training.pairs import (
    PairRecipe,
    Training,
    stream_options,
    train_transform,
    usable_samples,
)
from openblip.training.state import TrainingFiles


class VqaRecipe(PairRecipe):
    """One VQA run; the defaults are the released code's.

    max_answer_tokens  where an answer is cut, with [DEC] and [SEP]; the original cuts none
    """

    optimizer: OptimizerRecipe = OptimizerRecipe(lr=2e-5, min_lr=0.0)
    max_tokens: int = Field(35, ge=3)
    max_words: int = Field(50, ge=1)
    max_answer_tokens: int = Field(40, ge=3)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class VqaRun(VqaRecipe, TaskRun):
    """The same with its data and where it starts, as a recipe file describes it.

    data  data sets with questions, of any kind that `data.sources` reads, some perhaps with weights
    init  may also be a model that answers questions already
    """

    data: tuple[str | WeightedData, ...] = Field(min_length=1)


class VqaStep(TrainingStep[VqaBatch]):
    """LM of all answers of a batch, the image and its question encoded once."""

    def __init__(self, vqa: Vqa, label_smoothing: float) -> None:
        super().__init__()
        self.vqa = vqa
        self.label_smoothing = label_smoothing

    def forward(self, batch: VqaBatch, step: int) -> StepOutput:
        vqa = self.vqa
        images = vqa.project_image(vqa.encode_image(batch.images))
        states = vqa.encode_question(batch.question_ids, batch.question_mask, images)
        context = vqa.project_question(states, batch.question_mask).select(batch.owners)
        losses = text_losses(
            vqa.decode(batch.answer_ids, batch.answer_mask, context),
            batch.answer_ids,
            batch.answer_mask,
            label_smoothing=self.label_smoothing,
        )
        loss = vqa_loss(losses, batch.weights, batch.images.shape[0])
        return StepOutput(loss, {"loss": loss.detach()})

    def after_optimizer_step(self, output: StepOutput) -> None:
        """Write nothing: VQA has neither twin nor queue."""


@dataclass(frozen=True)
class VqaTraining(Training[VqaBatch, Vqa]):
    """Training on questions.

    data  data sets of any kind that `data.sources` reads; every question is an example
    """

    max_answer_tokens: int

    def new_stream(self) -> VqaStream:
        recipe = self.recipe
        return VqaStream(
            self.data,
            self.tokenizer,
            train_transform(recipe, self.model.config.vision.image_size_px),
            max_tokens=recipe.max_tokens,
            max_answer_tokens=self.max_answer_tokens,
            max_words=recipe.max_words,
            **stream_options(recipe),
        )

    def evaluation(self, folder: Path) -> Evaluation | None:
        """Prepare what the recipe says; the best model by accuracy goes to `folder`.

        Answers are written, not chosen, and scored as the VQA challenge does.
        Raises ValueError for data that the model cannot be evaluated on.
        """
        how = self.recipe.evaluation
        if how is None:
            return None
        samples = usable_samples(how.data, _check_answers) if world().is_first else []
        decoding = how.decoding or ANSWER_DECODING
        give = partial(write_answers, self.model, self.tokenizer, decoding=decoding)

        def measure() -> Scores:
            report = evaluate_vqa(self.model, self.tokenizer, samples, answer=give, is_silent=True)
            assert report.accuracy is not None
            return Scores({"accuracy": report.accuracy}, report.accuracy)

        return self.evaluating(how, folder, measure)


def _check_answers(sample: Sample) -> str | None:
    """Return what a sample lacks to be scored, if anything."""
    questions = questions_of(sample)
    return None if all(one.references for one in questions) else "a question has no answer"


def vqa_training(
    recipe: VqaRecipe, vqa: Vqa, data: Sequence[Data], tokenizer: Tokenizer
) -> VqaTraining:
    """Prepare the training of a model on the questions of `data`."""
    torch.manual_seed(recipe.seed)
    step = VqaStep(vqa, recipe.label_smoothing)
    return VqaTraining(step, recipe, vqa, data, tokenizer, recipe.max_answer_tokens)


def finetune_vqa(
    recipe: VqaRecipe,
    vqa: Vqa,
    data: Sequence[Data],
    tokenizer: Tokenizer,
    *,
    files: TrainingFiles,
    title: str = "VQA",
) -> Vqa:
    """Train a model in place and return it."""
    vqa_training(recipe, vqa, data, tokenizer).run(files, title)
    return vqa


def run_vqa(run: VqaRun, out: Path, *, is_dry: bool = False) -> dict[str, Any]:
    """Train and save the checkpoint `out`, its losses beside it; return what came out.

    A run that was stopped goes on.
    is_dry  write nothing, and return what it would cost
    Raises ValueError if `out` exists, and for data or a model that cannot be read or used.
    """
    check_is_free(out)
    check_data(run.data)
    torch.manual_seed(run.seed)
    vqa, tokenizer, notes = _start(run)
    return train_and_save(
        run,
        out,
        lambda: vqa_training(run, vqa, run.data, tokenizer),
        title="VQA",
        what="VQA fine-tuning",
        notes=notes,
        is_dry=is_dry,
    )


def _start(run: VqaRun) -> tuple[Vqa, Tokenizer, list[str]]:
    """Return the model that training starts from, and what is to be known of it."""
    if run.model is not None:
        texts = question_texts(run.data, run.max_words)
        tokenizer = Tokenizer.train(texts, vocab_size=run.vocab_size)
        sizes = run.model.build_config(tokenizer)
        config = VqaConfig.from_text(sizes.vision, sizes.text, sizes.tokens)
        note = (
            f"a vocabulary of {tokenizer.vocab_size} words was learned from questions and answers"
        )
        return Vqa(config), tokenizer, ["it starts from nothing", note]
    assert run.init is not None
    if is_vqa(run.init):
        vqa, tokenizer = load_vqa(run.init)
        size_px = vqa.config.vision.image_size_px
        if run.image_size_px not in {None, size_px}:
            raise ValueError(
                f"image_size_px {run.image_size_px}: {run.init} answers questions already, about "
                f"images of {size_px} px"
            )
        return vqa, tokenizer, [f"it starts from {run.init}"]
    blip, tokenizer = load(run.init)
    part = initialise_from(blip, frozenset({"pair", "decode"}), run.image_size_px)
    start = vqa_from_blip(part.blip)
    notes = [f"it starts from {run.init}", *part.notes(), *start.notes()]
    return start.model, tokenizer, notes
