"""Every shipped recipe loads with its class, and opens with the command that runs it."""

from pathlib import Path

import pytest

from openblip.capfilt.bootstrap import BootstrapRecipe
from openblip.config import Recipe, dump_recipe, load_recipe
from openblip.finetune.captioning import CaptioningRun
from openblip.finetune.nlvr import NlvrRun
from openblip.finetune.retrieval import RetrievalRun
from openblip.finetune.vqa import VqaRun
from openblip.pretrain import PretrainRecipe, PretrainRun

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# The longest beginning of a name that fits decides; the others are whole loops.
CLASSES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRun,
    "world": PretrainRun,
    "finetune_captioning": CaptioningRun,
    "finetune_retrieval": RetrievalRun,
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
    whole_names = {name for name in CLASSES if name not in {"world", "vqa", "nlvr"}}
    assert {path.stem for path in FILES} >= whole_names | {"world_cpu", "vqa_cpu", "nlvr_cpu"}


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
    assert pretrain.optimizer == defaults.optimizer
    assert pretrain.objective.alignment == defaults.objective.alignment
    for cls in (CaptioningRun, RetrievalRun):
        name = cls.__name__.removesuffix("Run").lower()
        run = load_recipe(cls, RECIPES / f"finetune_{name}.yaml")
        assert run.image_size_px == 384
        assert run.optimizer == cls(data=("a",), init="b").optimizer
    run = load_recipe(VqaRun, RECIPES / "finetune_vqa.yaml")
    assert run.image_size_px == 480
    assert run.optimizer == VqaRun(data=("a",), init="b").optimizer
    nlvr = load_recipe(NlvrRun, RECIPES / "finetune_nlvr.yaml")
    assert nlvr.image_size_px == 384
    assert nlvr.optimizer == NlvrRun(data=("a",), init="b").optimizer.model_copy(
        update={"steps_per_epoch": nlvr.num_steps // 15}
    )
