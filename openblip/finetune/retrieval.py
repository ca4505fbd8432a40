"""Image-text retrieval: ITC and ITM on human captions; CapFilt's filter is this (BLIP sec. 5.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from openblip.data.batches import ImageTextBatch
from openblip.data.samples import Sample
from openblip.data.sources import Data, check_data, kept_captions
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.inference import Engine
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.alignment import Alignment, AlignmentConfig, WrongTexts
from openblip.training.best import EvaluatingRecipe, Scores
from openblip.training.distributed import world
from openblip.training.finetuning import (
    FinetuningRecipe,
    FinetuningRun,
    FinetuningStep,
    run_finetuning,
)
from openblip.training.loop import StepOutput
from openblip.training.pairs import PairTraining
from openblip.training.state import TrainingFiles

MAX_NEGATIVE_TEXTS = 100_000


class RetrievalRecipe(FinetuningRecipe):
    """One retrieval run; the defaults are the released code's.

    negatives_share  of the images whose wrong text for ITM comes from the data set `negatives`, if
                     there is one, instead of from the batch
    """

    batch_size: int = Field(256, ge=2)
    max_tokens: int = Field(35, ge=3)
    soft_target_weight: float = Field(0.4, ge=0, le=1)
    soft_target_ramp_steps: int = Field(0, ge=0)
    alignment: AlignmentConfig = AlignmentConfig(positives="image", mining="online")
    negatives_share: float = Field(0.5, ge=0, le=1)

    def soft_target_weight_at(self, step: int) -> float:
        """Return the weight at a step: from 0 in a straight line over the ramp."""
        if step >= self.soft_target_ramp_steps:
            return self.soft_target_weight
        return self.soft_target_weight * step / self.soft_target_ramp_steps


class RetrievalRun(RetrievalRecipe, FinetuningRun):
    """The same with its data and the model that it starts from, as a recipe file describes it.

    negatives  data sets of the same kinds as `data`, of other images: each of their captions is
               wrong for all of `data`. Without them a filter has never seen text that is no
               caption; with them it also learns how such text sounds, and trusts true ones less
    """

    negatives: tuple[str, ...] = ()


class NegativeTexts:
    """Captions of a data set, drawn as wrong texts for the images of another."""

    def __init__(self, data: Sequence[Data], tokenizer: Tokenizer, recipe: RetrievalRecipe) -> None:
        """Read the captions; of more than `MAX_NEGATIVE_TEXTS`, as many at random.

        Raises ValueError if there is none.
        """
        self._tokenizer, self._recipe = tokenizer, recipe
        self._texts: list[str] = []
        rng = np.random.default_rng(recipe.seed)
        for number, text in enumerate(kept_captions(data, recipe.max_words)):
            if number < MAX_NEGATIVE_TEXTS:
                self._texts.append(text)
                continue
            place = int(rng.integers(number + 1))
            if place < MAX_NEGATIVE_TEXTS:
                self._texts[place] = text
        if not self._texts:
            raise ValueError(f"no caption in {', '.join(map(str, data))} to take as wrong text")

    def draw(
        self, batch_size: int, step: int, device: torch.device, rank: int = 0, number: int = 0
    ) -> WrongTexts | None:
        """Draw texts for some images of a batch; the same ones whenever the step is taken.

        rank, number  of the process, and of the batch in the step: others draw other texts
        """
        rng = np.random.default_rng([self._recipe.seed, step, rank, number])
        rows = np.flatnonzero(rng.random(batch_size) < self._recipe.negatives_share)
        if not rows.size:
            return None
        texts = [self._texts[int(i)] for i in rng.integers(len(self._texts), size=rows.size)]
        tokens = self._tokenizer.encode_batch(texts, max_tokens=self._recipe.max_tokens)
        return WrongTexts(
            torch.from_numpy(rows).to(device),
            tokens.token_ids.to(device),
            tokens.text_mask.to(device),
        )


class RetrievalStep(FinetuningStep):
    """ITC + ITM of a batch."""

    def __init__(
        self, blip: Blip, recipe: RetrievalRecipe, negatives: NegativeTexts | None = None
    ) -> None:
        super().__init__(blip, has_frozen_image_encoder=recipe.freeze_image_encoder)
        self._negatives = negatives
        self.recipe = recipe
        self.alignment = Alignment(blip, recipe.alignment)
        self._step, self._number = -1, 0

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        # Several batches of one step, under accumulation, differ by their number.
        self._step, self._number = step, self._number + 1 if step == self._step else 0
        image_states = self.blip.encode_image(batch.images)
        wrong_texts = None
        if self._negatives is not None:
            wrong_texts = self._negatives.draw(
                batch.images.shape[0], step, batch.images.device, world().rank, self._number
            )
        aligned = self.alignment(
            self.blip,
            batch.images,
            image_states,
            self.blip.project_context(image_states),
            batch.token_ids,
            batch.text_mask,
            batch.image_ids,
            batch.text_ids,
            self.recipe.soft_target_weight_at(step),
            wrong_texts=wrong_texts,
        )
        total = aligned.itc + aligned.itm
        measures: dict[str, torch.Tensor | float] = {
            "loss": total.detach(),
            "itc": aligned.itc.detach(),
            "itm": aligned.itm.detach(),
            "without_negative": float(aligned.num_without_negative),
        }
        return StepOutput(total, measures, (aligned.entries,))

    def after_optimizer_step(self, output: StepOutput) -> None:
        self.alignment.after_optimizer_step(self.blip, list(output.entries))


def retrieval_training(
    recipe: RetrievalRecipe,
    blip: Blip,
    data: Sequence[Data],
    tokenizer: Tokenizer,
    negatives: Sequence[Data] = (),
) -> PairTraining:
    """Prepare the training of a model with the roles `text` and `pair`.

    negatives  data sets of other images, whose captions are wrong for all of `data`
    """
    torch.manual_seed(recipe.seed)
    wrong_texts = NegativeTexts(negatives, tokenizer, recipe) if negatives else None
    step = RetrievalStep(blip, recipe, wrong_texts)
    return PairTraining(step, recipe, blip, data, tokenizer, measure=_measure)


def _measure(
    blip: Blip, tokenizer: Tokenizer, samples: Sequence[Sample], how: EvaluatingRecipe
) -> Scores:
    """Measure recalls after re-ranking; the mean one chooses the best, as in the released code."""
    engine = Engine.plain(blip, tokenizer)
    report = evaluate_retrieval(engine, samples, shortlist=how.shortlist, is_silent=True)
    values = {**report.reranked.to_json(), "itc_mean": report.itc.mean}
    return Scores(values, report.reranked.mean)


def finetune_retrieval(
    recipe: RetrievalRecipe,
    blip: Blip,
    data: Sequence[Data],
    tokenizer: Tokenizer,
    *,
    files: TrainingFiles,
    title: str = "filter",
    negatives: Sequence[Data] = (),
) -> Blip:
    """Train a model with the roles `text` and `pair` in place and return it.

    negatives  data sets of other images, whose captions are wrong for all of `data`
    """
    retrieval_training(recipe, blip, data, tokenizer, negatives).run(files, title)
    return blip


def run_retrieval(run: RetrievalRun, out: Path, *, is_dry: bool = False) -> dict[str, Any]:
    """Fine-tune and save the checkpoint `out`, its losses beside it; return what came out.

    A run that was stopped goes on.
    is_dry  write nothing, and return what it would cost
    Raises ValueError if `out` exists, and for data or a model that cannot be read or used.
    """
    check_data(run.negatives)

    def prepare(blip: Blip, data: Sequence[Data], tokenizer: Tokenizer) -> PairTraining:
        return retrieval_training(run, blip, data, tokenizer, run.negatives)

    return run_finetuning(
        run,
        out,
        roles=frozenset({"text", "pair"}),
        title="retrieval fine-tuning",
        prepare=prepare,
        is_dry=is_dry,
    )
