"""The recipes for a CPU do what their first lines say, by the commands that stand there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str) -> Any:
    """Run a command of openblip in a folder and return its answer."""
    done = subprocess.run(
        [sys.executable, "-m", "openblip", *arguments, "--json"], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw the world and pre-train on it."""
    folder = tmp_path_factory.mktemp("recipes")
    run(folder, "draw", "runs/world")
    run(folder, "pretrain", str(RECIPES / "world_cpu.yaml"), "--out", "runs/world_model")
    return folder


def test_captioning(workplace: Path) -> None:
    recipe, out = RECIPES / "captioning_cpu.yaml", "runs/world_captioner"
    run(workplace, "finetune", "captioning", str(recipe), "--out", out)
    scores = run(workplace, "evaluate", "captioning", out, "runs/world/test", "--prompt", "")
    assert scores["scores"]["cider"] > 3.0


def test_retrieval(workplace: Path) -> None:
    recipe, out = RECIPES / "retrieval_cpu.yaml", "runs/world_retrieval"
    run(workplace, "finetune", "retrieval", str(recipe), "--out", out)
    scores = run(workplace, "evaluate", "retrieval", out, "runs/world/test", "--shortlist", "32")
    assert scores["reranked"]["tr_at_1"] > 0.3
