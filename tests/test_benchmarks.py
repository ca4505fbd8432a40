"""The benchmarks run too long for tests; that they start is seen here."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NO_COMMANDS = {"plain_step.py"}  # a part of train_step


@pytest.mark.parametrize("name", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_a_benchmark_finds_what_it_calls(name: str) -> None:
    arguments = [] if name in NO_COMMANDS else ["--help"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
