"""Text-guided reconstruction for a model that is there: a head is trained, all else stays.

The embeddings of images and texts are those of the model that it starts from, so an index of them
stays valid. The image encoder does not move: it is its own momentum encoder.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from openblip.checkpoint import check_is_free
from openblip.data.batches import ImageTextBatch
from openblip.data.sources import Data, WeightedData, check_data
from openblip.hub import load
from openblip.losses import reconstruction_loss
from openblip.models.blip import Blip
from openblip.models.reconstruction import ReconstructionConfig, draw_visible, is_hidden
from openblip.tokenizer import Tokenizer
from openblip.training.finetuning import train_and_save
from openblip.training.loop import StepOutput, TrainingStep
from openblip.training.pairs import PairRecipe, PairTraining


class ReconstructionRecipe(PairRecipe):
    """One training of a head."""

    max_tokens: int = Field(35, ge=3)
    reconstruction: ReconstructionConfig = ReconstructionConfig()


class ReconstructionRun(ReconstructionRecipe):
    """The same with its data and the model that it starts from, as a recipe file describes it.

    data  data sets of any kind that `data.sources` reads, some perhaps with a weight
    init  checkpoint folder, transformers folder or name on the Hugging Face Hub, of a model with
          the role `text`; a head that it has is replaced
    """

    data: tuple[str | WeightedData, ...] = Field(min_length=1)
    init: str


class ReconstructionStep(TrainingStep[ImageTextBatch]):
    """Reconstruction of a batch by the head of a model of which nothing else is trained."""

    def __init__(self, blip: Blip, config: ReconstructionConfig) -> None:
        super().__init__()
        self.blip = blip.requires_grad_(False)
        self.config = config
        blip.reconstruction_head.requires_grad_(True)

    def train(self, mode: bool = True) -> "ReconstructionStep":
        """Switch the mode, but leave the model without dropout: the head has none."""
        super().train(mode)
        self.blip.eval()
        return self

    def forward(self, batch: ImageTextBatch, step: int) -> StepOutput:
        blip, num_patches = self.blip, self.blip.config.vision.num_patches
        with torch.no_grad():
            image_states = blip.encode_image(batch.images)
            text_states = blip.encode_text(batch.token_ids, batch.text_mask)
        visible = draw_visible(
            batch.images.shape[0],
            num_patches,
            self.config.num_visible(num_patches),
            batch.images.device,
        )
        predicted = blip.reconstruct(batch.images, visible, text_states, batch.text_mask)
        loss = reconstruction_loss(predicted, image_states, is_hidden(visible, num_patches))
        return StepOutput(loss, {"reconstruction": loss.detach()})

    def after_optimizer_step(self, output: StepOutput) -> None:
        """Write nothing: there is neither queue nor twin."""


def with_reconstruction(blip: Blip, config: ReconstructionConfig) -> Blip:
    """Return a model with the same weights and a new head.

    Raises ValueError for a model without the role `text`.
    """
    if "text" not in blip.config.text.roles:
        raise ValueError(
            f"reconstruction needs the role 'text'; the model has "
            f"{', '.join(sorted(blip.config.text.roles))}"
        )
    model = Blip(replace(blip.config, reconstruction=config))
    own = {k: v for k, v in blip.state_dict().items() if not k.startswith("reconstruction_head.")}
    model.load_state_dict(model.state_dict() | own)
    return model


def reconstruction_training(
    recipe: ReconstructionRecipe, blip: Blip, data: Sequence[Data], tokenizer: Tokenizer
) -> PairTraining:
    """Prepare the training of a new head; the model that will have it is the training's `blip`."""
    torch.manual_seed(recipe.seed)
    model = with_reconstruction(blip, recipe.reconstruction)
    step = ReconstructionStep(model, recipe.reconstruction)
    return PairTraining(step, recipe, model, data, tokenizer)


def run_reconstruction(
    run: ReconstructionRun, out: Path, *, is_dry: bool = False
) -> dict[str, Any]:
    """Train a head and save the checkpoint `out`, its losses beside it; return what came out.

    A run that was stopped goes on.
    is_dry  write nothing, and return what it would cost
    Raises ValueError if `out` exists, and for data or a model that cannot be read or used.
    """
    check_is_free(out)
    check_data(run.data)
    blip, tokenizer = load(run.init)
    notes = [f"all but the reconstruction head is {run.init}, unchanged"]
    return train_and_save(
        run,
        out,
        lambda: reconstruction_training(run, blip, run.data, tokenizer),
        title="reconstruction",
        what="training of a reconstruction head",
        notes=notes,
        is_dry=is_dry,
    )
