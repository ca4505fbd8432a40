"""A drawn world to train on, and a model to start from."""

from pathlib import Path

import pytest

from openblip.data.world import WorldConfig, draw_world
from tests.faults.trainings import COMMON, RECIPES, start
from tests.task_data import write_task_data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=40, num_human=20, num_test=2, seed=1), folder)
    write_task_data(folder)
    return folder


@pytest.fixture(scope="module")
def base(world: Path) -> Path:
    recipe, out = world / "base.yaml", world / "base"
    recipe.write_text(f"data: [{world / 'web'}]\n" + COMMON + RECIPES["pretrain"])
    assert start("pretrain", recipe, out).wait() == 0
    return out
