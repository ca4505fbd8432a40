"""Trainings as processes that are killed, and started again with the same command."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openblip.data.world import WorldConfig, draw_world

pytestmark = pytest.mark.slow

NUM_STEPS = 60
MODEL = (
    "{image_size_px: 32, patch_size_px: 16, vision_width: 16, vision_layers: 1, vision_heads: 2, "
    "text_width: 16, text_layers: 1, text_heads: 2, ffn_width: 32, max_positions: 40, "
    "embedding_width: 8, init_std: 0.1}"
)
COMMON = f"num_steps: {NUM_STEPS}\nbatch_size: 4\nmax_tokens: 20\nsaving: {{every_steps: 5}}\n"
QUEUE = "alignment: {queue_size: 10, momentum: 0.9}"
RECIPES = {
    "pretrain": f"vocab_size: 120\nmodel: {MODEL}\nobjective: {{{QUEUE}}}\n",
    "finetune captioning": "init: {base}\n",
    "finetune retrieval": f"init: {{base}}\n{QUEUE}\n",
}


def start(command: str, recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "openblip", *command.split(), str(recipe), "--out", str(out)],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment,
    )  # fmt: skip


def num_logged(out: Path) -> int:
    log = out.with_name(f"{out.name}.log.jsonl")
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=40, num_human=20, num_test=2, seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def base(world: Path) -> Path:
    recipe, out = world / "base.yaml", world / "base"
    recipe.write_text(f"data: [{world / 'web'}]\n" + COMMON + RECIPES["pretrain"])
    assert start("pretrain", recipe, out).wait() == 0
    return out


@pytest.mark.parametrize("signals", [[signal.SIGKILL] * 3, [signal.SIGTERM, signal.SIGINT]])
@pytest.mark.parametrize("command", RECIPES)
def test_a_killed_training_ends_as_one_that_was_not(
    command: str, signals: list[signal.Signals], world: Path, base: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = f"data: [{world / 'web'}]\n" + COMMON + RECIPES[command].replace("{base}", str(base))
    recipe.write_text(text)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(command, recipe, whole).wait() == 0
    rng = random.Random(f"{command} {signals}")
    for number, kind in enumerate(signals, start=1):
        process = start(command, recipe, killed)
        while num_logged(killed) <= number:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(kind)
        code = process.wait()
        assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[kind]
        assert not killed.exists()
    assert start(command, recipe, killed).wait() == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    logs = [path.with_name(f"{path.name}.log.jsonl").read_bytes() for path in (whole, killed)]
    assert logs[0] == logs[1]
    assert not killed.with_name("killed.state").exists()
