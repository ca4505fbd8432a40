"""A drawn world to train on, and a model to start from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import WorldConfig, draw_world
from tests.faults.trainings import COMMON, RECIPES, start


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=40, num_human=20, num_test=2, seed=1), folder)
    samples = list(read_samples(*list_shards(folder / "web"), on_bad=lambda key, reason: None))
    rows = []
    with ShardWriter(folder / "asked.tar") as writer:
        for number, sample in enumerate(samples):
            qa = [{"question": c.text, "answers": c.text.split()} for c in sample.captions]
            writer.write(replace(sample, captions=(), meta={"qa": qa}))
            (folder / f"{sample.key}.jpg").write_bytes(sample.image_bytes)
            images = [f"{one.key}.jpg" for one in (sample, samples[number - 1])]
            rows.append({"sentence": qa[0]["question"], "label": number % 2 == 0, "images": images})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(world: Path) -> Path:
    recipe, out = world / "base.yaml", world / "base"
    recipe.write_text(f"data: [{world / 'web'}]\n" + COMMON + RECIPES["pretrain"])
    assert start("pretrain", recipe, out).wait() == 0
    return out
