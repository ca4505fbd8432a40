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

NUM_STEPS = 150
MODEL = (
    "{image_size_px: 32, patch_size_px: 16, vision_width: 16, vision_layers: 1, vision_heads: 2, "
    "text_width: 16, text_layers: 1, text_heads: 2, ffn_width: 32, max_positions: 40, "
    "embedding_width: 8, init_std: 0.1}"
)
COMMON = f"num_steps: {NUM_STEPS}\nbatch_size: 4\nmax_tokens: 20\nsaving: {{every_steps: 5}}\n"
QUEUE = "alignment: {queue_size: 10, momentum: 0.9}"
RECIPES = {
    "pretrain": f"vocab_size: 120\nmodel: {MODEL}\n"
    f"objective: {{reconstruction_weight: 1.0, {QUEUE}}}\n",
    "finetune captioning": "init: {base}\n",
    "finetune reconstruction": "init: {base}\n",
    "finetune retrieval": f"init: {{base}}\n{QUEUE}\n",
}


def start(
    command: str, recipe: Path, out: Path, num_ranks: int = 1, *options: str
) -> subprocess.Popen[bytes]:
    arguments = ["-m", "openblip", *command.split(), str(recipe), "--out", str(out), *options]
    if num_ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
        arguments = [*torchrun, f"--nproc-per-node={num_ranks}", *arguments]
    return subprocess.Popen(
        [sys.executable, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def children_of(pid: int) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == pid:
            children.append(int(path.parent.name))
    return sorted(children)


def check_equal(first: Path, second: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    logs = [path.with_name(f"{path.name}.log.jsonl").read_bytes() for path in (first, second)]
    assert logs[0] == logs[1]
    for folder in (first, second):
        assert not folder.with_name(f"{folder.name}.state").exists()


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
    check_equal(whole, killed)


@pytest.mark.parametrize("command", RECIPES)
def test_two_ranks_that_are_killed_end_as_two_that_were_not(
    command: str, world: Path, base: Path, tmp_path: Path
) -> None:
    """Kill all processes, let SIGTERM stop them, and kill one alone, which torchrun restarts."""
    recipe = tmp_path / "recipe.yaml"
    text = f"data: [{world / 'web'}]\n" + COMMON + RECIPES[command].replace("{base}", str(base))
    recipe.write_text(text)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(command, recipe, whole, 2).wait() == 0

    def until(process: subprocess.Popen[bytes], num: int) -> None:
        while num_logged(killed) < num:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)

    process = start(command, recipe, killed, 2)
    until(process, 2)
    # torchrun's processes do not die with it.
    for pid in (process.pid, *children_of(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    process = start(command, recipe, killed, 2)
    until(process, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    assert not killed.exists()
    process = start(command, recipe, killed, 2)
    while len(ranks := children_of(process.pid)) < 2:
        time.sleep(0.1)
    until(process, 8)
    os.kill(ranks[-1], signal.SIGKILL)
    assert process.wait() == 0
    check_equal(whole, killed)
