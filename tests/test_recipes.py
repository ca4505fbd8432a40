"""Every shipped recipe loads with its class, and opens with the command that runs it."""

import re
from pathlib import Path

import pytest

from openblip.capfilt.bootstrap import BootstrapRecipe
from openblip.config import Recipe, RecipeError, dump_recipe, load_recipe
from openblip.data.sources import WeightedData, weights_of
from openblip.finetune.captioning import CaptioningRun
from openblip.finetune.retrieval import RetrievalRun
from openblip.pretrain import PretrainRecipe, PretrainRun

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# The longest beginning of a name that fits decides; the others are whole loops.
CLASSES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRun,
    "world": PretrainRun,
    "finetune_captioning": CaptioningRun,
    "finetune_retrieval": RetrievalRun,
}
FILES = sorted(RECIPES.glob("*.yaml"))


def class_of(path: Path) -> type[Recipe]:
    return next(
        (cls for name, cls in CLASSES.items() if path.stem.startswith(name)), BootstrapRecipe
    )


def test_there_are_recipes() -> None:
    assert {path.stem for path in FILES} >= set(CLASSES) - {"world"} | {"world_cpu"}


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
