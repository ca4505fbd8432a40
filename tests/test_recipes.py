"""Every shipped recipe loads with its class, and opens with the command that runs it."""

import math
import re
from pathlib import Path

import pytest

from openblip.capfilt.bootstrap import BootstrapRecipe
from openblip.config import Recipe, RecipeError, dump_recipe, load_recipe
from openblip.data.sources import WeightedData, weights_of
from openblip.finetune.captioning import CaptioningRun
from openblip.finetune.nlvr import NlvrRun
from openblip.finetune.reconstruction import ReconstructionRun
from openblip.finetune.retrieval import RetrievalRun
from openblip.finetune.vqa import VqaRun
from openblip.pretrain import PretrainRecipe, PretrainRun

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# The longest beginning of a name that fits decides; the others are whole loops.
CLASSES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRun,
    "world_reconstruction": ReconstructionRun,
    "world": PretrainRun,
    "finetune_captioning": CaptioningRun,
    "finetune_retrieval": RetrievalRun,
    "captioning": CaptioningRun,
    "retrieval": RetrievalRun,
    "finetune_vqa": VqaRun,
    "vqa": VqaRun,
    "finetune_nlvr": NlvrRun,
    "nlvr": NlvrRun,
}
FILES = sorted(RECIPES.glob("*.yaml"))


def class_of(path: Path) -> type[Recipe]:
    return next(
        (cls for name, cls in CLASSES.items() if path.stem.startswith(name)), BootstrapRecipe
    )


def test_there_are_recipes() -> None:
    for name in CLASSES:
        assert any(path.stem.startswith(name) for path in FILES), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_comes_back_from_its_dump(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(class_of(path), path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(class_of(path), copy) == recipe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command(path: Path) -> None:
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert "openblip " in first or "runs/" in first
    assert f"recipes/{path.name}" in first
    assert second.startswith("# ")


def test_the_shipped_values_are_those_of_the_paper() -> None:
    pretrain = load_recipe(PretrainRun, RECIPES / "pretrain.yaml")
    defaults = PretrainRecipe()
    assert pretrain.model == defaults.model
    by_epoch = {"schedule": "exponential", "steps_per_epoch": 4861}
    assert pretrain.optimizer == defaults.optimizer.model_copy(update=by_epoch)
    assert pretrain.objective.alignment == defaults.objective.alignment
    for cls in (CaptioningRun, RetrievalRun):
        name = cls.__name__.removesuffix("Run").lower()
        run = load_recipe(cls, RECIPES / f"finetune_{name}.yaml")
        assert run.image_size_px == 384
        usual = cls(data=("a",), init="b").optimizer
        assert run.optimizer == usual.model_copy(update={"steps_per_epoch": 2214})
    run = load_recipe(VqaRun, RECIPES / "finetune_vqa.yaml")
    assert run.image_size_px == 480
    assert run.optimizer == VqaRun(data=("a",), init="b").optimizer
    nlvr = load_recipe(NlvrRun, RECIPES / "finetune_nlvr.yaml")
    assert nlvr.image_size_px == 384
    assert nlvr.optimizer == NlvrRun(data=("a",), init="b").optimizer.model_copy(
        update={"steps_per_epoch": nlvr.num_steps // 15}
    )


def test_an_epoch_is_as_long_in_every_value_of_a_recipe() -> None:
    for name, num_pairs in (("pretrain", 14_000_000), ("pretrain_large", 14_000_000)):
        run = load_recipe(PretrainRun, RECIPES / f"{name}.yaml")
        epoch = run.optimizer.steps_per_epoch
        assert epoch == num_pairs // (32 * run.batch_size)
        assert run.num_steps // epoch == 20
        assert run.objective.soft_target_ramp_steps == 2 * epoch
    for cls, name, num_epochs in ((CaptioningRun, "captioning", 5), (RetrievalRun, "retrieval", 6)):
        run = load_recipe(cls, RECIPES / f"finetune_{name}.yaml")
        epoch = run.optimizer.steps_per_epoch
        assert epoch == math.ceil(566_747 / (8 * run.batch_size))
        assert run.num_steps == num_epochs * epoch


def test_data_sets_may_carry_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("data: [a.tar, {path: 'b.tar', weight: 2}, {path: c.tar}]\n")
    run = load_recipe(PretrainRun, path)
    assert run.data == ("a.tar", WeightedData("b.tar", 2.0), WeightedData("c.tar", 1.0))
    assert weights_of(run.data) == (0.25, 0.5, 0.25)
    (tmp_path / "copy.yaml").write_text(dump_recipe(run))
    assert load_recipe(PretrainRun, tmp_path / "copy.yaml") == run
    for wrong, message in (
        ("{path: b, weight: 0}", "the weight of b is 0.0; it must be above 0"),
        ("{path: b, weight: '2'}", "data.0.weight is '2'"),
        ("{path: b, wieght: 2}", "wieght"),
        ("{weight: 2}", "path is missing"),
        ("3", "data.0 is 3"),
    ):
        path.write_text(f"data: [{wrong}]\n")
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe(PretrainRun, path)
