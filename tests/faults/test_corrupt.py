"""Shards that are damaged while their owner thinks that they are whole."""

import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.faults.trainings import COMMON, NUM_STEPS, RECIPES

pytestmark = pytest.mark.slow


def damage(source: Path, target: Path) -> None:
    """Copy the shards, damage some images of the first, and cut a copy of it in the middle."""
    target.mkdir()
    [shard] = sorted(source.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    (target / "cut.tar").write_bytes(data[: len(data) // 2 + 100])
    rng = random.Random(1)
    with tarfile.open(shard) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
    for number, member in enumerate(images[:10]):
        start, end = member.offset_data, member.offset_data + member.size
        if number % 2:
            data[start:end] = rng.randbytes(member.size)
        else:  # its second half is gone
            data[start + member.size // 2 : end] = bytes(member.size - member.size // 2)
    (target / "damaged.tar").write_bytes(data)


def train(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openblip", "pretrain", str(recipe), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_damaged_shards_cost_their_samples_and_no_more(world: Path, tmp_path: Path) -> None:
    damage(world / "web", tmp_path / "damaged")
    recipe = tmp_path / "recipe.yaml"
    text = f"data: [{tmp_path / 'damaged'}]\n" + COMMON + RECIPES["pretrain"]
    recipe.write_text(text)
    done = train(recipe, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for reason in ("not_an_image", "corrupt", "truncated_tar"):
        assert reason in done.stderr, done.stderr
    # The share is judged from a thousand samples on.
    longer = text.replace(f"num_steps: {NUM_STEPS}", "num_steps: 1000")
    recipe.write_text(longer + "max_bad_fraction: 0.05\n")
    stopped = train(recipe, tmp_path / "strict")
    assert stopped.returncode == 2
    last = stopped.stderr.splitlines()[-1]
    assert "more than max_bad_fraction 0.05 allows" in last
    assert "not_an_image" in last
    assert not (tmp_path / "strict").exists()
