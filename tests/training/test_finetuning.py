"""A frozen image encoder stays to the bit, in the model and in its twin; all else is trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openblip.checkpoint import image_encoder_id, with_roles
from openblip.data.sources import kept_captions
from openblip.data.world import WorldConfig, draw_world
from openblip.finetune.captioning import CaptioningRecipe, captioning_training
from openblip.finetune.retrieval import RetrievalRecipe, RetrievalStep, retrieval_training
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.alignment import AlignmentConfig
from openblip.training.new_model import ModelRecipe
from openblip.training.pairs import PairTraining
from openblip.training.state import TrainingFiles

PAIRS = {"num_steps": 4, "batch_size": 4, "max_tokens": 20, "randaugment_ops": 0}
MODEL = ModelRecipe(
    image_size_px=32, patch_size_px=16, vision_width=16, vision_layers=2, vision_heads=2,
    drop_path=0.5, text_width=16, text_layers=1, text_heads=2, ffn_width=16, max_positions=32,
    embedding_width=8, init_std=0.1, dropout=0.0,
)  # fmt: skip
Prepare = Callable[[Blip, bool], PairTraining]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=2, num_human=9, num_test=2, seed=1), folder)
    return folder / "human"


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return Tokenizer.train(kept_captions([data]), vocab_size=120)


@pytest.fixture
def base(tokenizer: Tokenizer) -> Blip:
    torch.manual_seed(5)
    return Blip(MODEL.build_config(tokenizer))


@pytest.fixture(params=["captioning", "retrieval"])
def prepare(request: pytest.FixtureRequest, data: Path, tokenizer: Tokenizer) -> Prepare:
    """Return a function that prepares a training of a copy of a model, frozen or not."""

    def captioning(base: Blip, is_frozen: bool) -> PairTraining:
        recipe = CaptioningRecipe.model_validate(
            {**PAIRS, "prompt": "", "freeze_image_encoder": is_frozen}
        )
        blip = with_roles(base, frozenset({"decode"}))
        return captioning_training(recipe, blip, [data], tokenizer)

    def retrieval(base: Blip, is_frozen: bool) -> PairTraining:
        alignment = AlignmentConfig("image", "online", queue_size=8, momentum=0.3)
        recipe = RetrievalRecipe.model_validate(
            {**PAIRS, "alignment": alignment, "freeze_image_encoder": is_frozen}
        )
        blip = with_roles(base, frozenset({"text", "pair"}))
        return retrieval_training(recipe, blip, [data], tokenizer)

    return captioning if request.param == "captioning" else retrieval


def weights(blip: Blip) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in blip.named_parameters()}


@pytest.mark.parametrize("is_frozen", [True, False])
def test_the_image_encoder_alone_stays(
    is_frozen: bool, prepare: Prepare, base: Blip, tmp_path: Path
) -> None:
    training = prepare(base, is_frozen)
    before = weights(training.model)
    training.run(TrainingFiles.beside(tmp_path / "m"), "m")
    after = weights(training.model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert (image_encoder_id(training.model) == image_encoder_id(base)) == is_frozen
    assert any(name.startswith("vision.") for name in changed) != is_frozen
    assert "text" in {name.partition(".")[0] for name in changed}
    if is_frozen and isinstance(training.step, RetrievalStep):
        twin = training.step.alignment.twin
        assert "image_projection.weight" in changed
        assert not torch.equal(twin.image_projection.weight, before["image_projection.weight"])
        for name, value in twin.vision.named_parameters():
            assert torch.equal(value, before[f"vision.{name}"]), name


def test_a_frozen_image_encoder_drops_no_path(prepare: Prepare, base: Blip) -> None:
    step = prepare(base, True).step.train()
    assert step.training
    assert not any(part.training for part in step.blip.vision.modules())
    assert step.blip.text.training
    assert prepare(base, False).step.train().blip.vision.training


def test_a_dry_run_counts_what_is_trained(prepare: Prepare, base: Blip) -> None:
    whole, frozen = (prepare(base, is_frozen).dry_run() for is_frozen in (False, True))
    num_vision = sum(p.numel() for p in base.vision.parameters())
    assert frozen.num_trained == whole.num_trained - num_vision
    assert frozen.num_parameters == whole.num_parameters
    assert frozen.flops_per_step < whole.flops_per_step
