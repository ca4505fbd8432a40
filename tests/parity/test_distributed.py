"""Runs `two_ranks.py` beside this file under torchrun."""

import subprocess
import sys
from pathlib import Path


def test_two_ranks_equal_those_of_the_official_code(reference: Path) -> None:
    script = Path(__file__).parent / "two_ranks.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*torchrun, str(script), str(reference)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equals on rank 0") == 3
    assert result.stdout.count("equals on rank 1") == 3
