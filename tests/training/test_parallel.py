"""Runs `two_ranks_split.py` beside this file under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest

from openblip.config import RecipeError, load_recipe
from openblip.finetune.captioning import CaptioningRecipe


@pytest.mark.slow
def test_a_split_training_equals_one_of_whole_copies(tmp_path: Path) -> None:
    script = Path(__file__).parent / "two_ranks_split.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert {f"rank {rank} is done" for rank in range(2)} <= set(result.stdout.splitlines())


def test_float16_is_not_split() -> None:
    with pytest.raises(RecipeError, match="parallel fsdp takes precision float32 or bfloat16"):
        load_recipe(CaptioningRecipe, None, ["parallel=fsdp", "precision=float16"])
