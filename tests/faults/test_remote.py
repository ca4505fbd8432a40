"""A training on remote data whose server vanishes, and comes back."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import WorldConfig, draw_world

if TYPE_CHECKING:
    from tests.conftest import FailingServer

pytestmark = pytest.mark.slow

NUM_SHARDS = 10
RECIPE = """
data:
  - {path: "URL/{000..009}.tar", weight: 2}
  - {path: "URL/{000..002}.tar"}
vocab_size: 120
model: {image_size_px: 32, patch_size_px: 16, vision_width: 16, vision_layers: 1, vision_heads: 2,
  text_width: 16, text_layers: 1, text_heads: 2, ffn_width: 32, max_positions: 40,
  embedding_width: 8, init_std: 0.1}
objective: {alignment: {queue_size: 10, momentum: 0.9}}
num_steps: 300
batch_size: 4
max_tokens: 20
saving: {every_steps: 5}
"""


def train(recipe: Path, out: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLIP_CACHE": str(cache),
        "OPENBLIP_CACHE_GB": "1e-5",
        "OPENBLIP_REMOTE_ATTEMPTS": "3",
    }
    return subprocess.run(
        [sys.executable, "-m", "openblip", "pretrain", str(recipe), "--out", str(out)],
        capture_output=True, text=True, env=environment, check=False, timeout=600,
    )  # fmt: skip


def test_a_training_whose_server_vanishes_stops_with_a_sentence_and_goes_on_to_the_bit(
    server: "FailingServer", tmp_path: Path
) -> None:
    world = tmp_path / "world"
    draw_world(WorldConfig(num_web=100, num_human=4, num_test=2, seed=1), world)
    [shard] = list_shards(world / "web")
    samples = list(read_samples(shard, on_bad=lambda key, reason: pytest.fail(reason)))
    for number in range(NUM_SHARDS):
        with ShardWriter(server.folder / f"{number:03}.tar") as writer:
            for sample in samples[number::NUM_SHARDS]:
                writer.write(sample)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("URL", server.url))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(recipe, whole, tmp_path / "cache-1")
    assert done.returncode == 0, done.stderr
    num_requests = server.requests.total()
    assert num_requests > 8 * NUM_SHARDS, "the cache should be too small to hold the shards"

    server.num_left = num_requests * 2 // 3
    gone = train(recipe, stopped, tmp_path / "cache-2")
    assert gone.returncode == 2
    assert f"{server.url}/" in gone.stderr
    assert "could not be fetched in 3 attempts" in gone.stderr
    assert "Traceback" not in gone.stderr
    assert not stopped.exists()
    assert list(tmp_path.glob("stopped.state/step-*"))

    server.num_left = None
    back = train(recipe, stopped, tmp_path / "cache-3")
    assert back.returncode == 0, back.stderr
    assert "goes on after step" in back.stderr
    for name in ("model.safetensors", "tokenizer.json"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    logs = [tmp_path / f"{name}.log.jsonl" for name in ("whole", "stopped")]
    assert logs[0].read_bytes() == logs[1].read_bytes()
