"""A disk that fills up while a training saves its state on it."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.faults.trainings import COMMON, RECIPES, check_equal, start

pytestmark = pytest.mark.slow

DISK_BYTES = 8 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """Mount a small disk in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_training_whose_disk_is_full_goes_on_when_there_is_room(
    disk: Path, world: Path, tmp_path: Path
) -> None:
    recipe, ballast = tmp_path / "recipe.yaml", disk / "ballast"
    recipe.write_text(f"data: [{world / 'web'}]\n" + COMMON + RECIPES["pretrain"])
    whole, out = tmp_path / "whole", disk / "out"
    assert start("pretrain", recipe, whole).wait() == 0
    # Room for one state, and not for the second.
    ballast.write_bytes(bytes(DISK_BYTES - 3 * 2**19))
    process = subprocess.run(
        [sys.executable, "-m", "openblip", "pretrain", str(recipe), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert "No space left on device" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert not out.exists()
    assert len(list(disk.glob("out.state/step-*/.metadata"))) == 1
    ballast.unlink()
    assert start("pretrain", recipe, out).wait() == 0
    check_equal(whole, out)
