"""Trainings as processes that are killed, and started again with the same command."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from openblip.data.sources import list_shards, read_samples
from tests.faults.trainings import RECIPES, check_equal, children_of, num_logged, recipe_of, start

pytestmark = pytest.mark.slow

SPLIT = (
    "parallel: fsdp\nprecision: bfloat16\nactivation_checkpointing: true\n"
    "evaluation: {every_steps: 40, data: [{test}], decoding: {method: greedy, max_tokens: 6}}\n"
)


@pytest.mark.parametrize("signals", [[signal.SIGKILL] * 3, [signal.SIGTERM, signal.SIGINT]])
@pytest.mark.parametrize("command", RECIPES)
def test_a_killed_training_ends_as_one_that_was_not(
    command: str, signals: list[signal.Signals], world: Path, base: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(command, world, base))
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


@pytest.mark.parametrize(
    ("command", "extra"), [*((command, "") for command in RECIPES), ("pretrain", SPLIT)]
)
def test_two_ranks_that_are_killed_end_as_two_that_were_not(
    command: str, extra: str, world: Path, base: Path, tmp_path: Path
) -> None:
    """Kill all processes, let SIGTERM stop them, and kill one alone, which torchrun restarts."""
    recipe = tmp_path / "recipe.yaml"
    text = recipe_of(command, world, base) + extra.replace("{test}", str(world / "test"))
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


def test_a_killed_captioning_ends_as_one_that_was_not(
    world: Path, base: Path, tmp_path: Path
) -> None:
    photos, killed, whole = tmp_path / "photos", tmp_path / "killed.csv", tmp_path / "whole.csv"
    photos.mkdir()
    for shard in list_shards(world / "web"):
        for sample in read_samples(shard, on_bad=lambda key, reason: None):
            (photos / f"{sample.key}.png").write_bytes(sample.image_bytes)
    (photos / "broken.png").write_bytes(b"no image")
    options = ("--model", str(base), "--method", "nucleus", "--batch-size", "1")
    assert start("caption", photos, whole, 1, *options).wait() == 0
    partial = tmp_path / ".killed.csv.partial"
    for number in (3, 9, 20):
        process = start("caption", photos, killed, 1, *options)
        while not partial.exists() or partial.read_bytes().count(b"\n") < number:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not killed.exists()
    assert start("caption", photos, killed, 1, *options).wait() == 0
    assert killed.read_bytes() == whole.read_bytes()
    lost = [path.with_name(f"{path.name}.failed.jsonl").read_bytes() for path in (killed, whole)]
    assert lost[0] == lost[1]
