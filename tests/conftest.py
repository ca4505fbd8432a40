"""What every test may ask for: reference numbers, shared data, and one thread per test worker."""

import os
from pathlib import Path

# Two workers on two cores, each with a thread pool of its own, would fight for the cores.
# The variable also reaches the processes that command-line tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A busy machine is no failure of the code: examples have no time limit.
settings.register_profile("openblip", deadline=None)
settings.load_profile("openblip")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def reference() -> Path:
    """Return the folder with the numbers of the original code (OPENBLIP_REFERENCE)."""
    folder = Path(os.environ.get("OPENBLIP_REFERENCE", REPOSITORY / "tests" / "reference"))
    if not (folder / "config.json").is_file():
        pytest.fail(f"OPENBLIP_REFERENCE names {folder}, which holds no config.json")
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data (OPENBLIP_SHARED); skip the test where there is none."""
    value = os.environ.get("OPENBLIP_SHARED")
    if not value:
        pytest.skip("OPENBLIP_SHARED is not set: it names the folder with the shared data sets")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"OPENBLIP_SHARED names {folder}, which is not a folder")
    return folder
