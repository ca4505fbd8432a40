"""A tiny drawn world, a tiny model that knows its words, and the command line in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from openblip.captions import clean_caption
from openblip.checkpoint import save_checkpoint
from openblip.cli import app
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import WorldConfig, draw_world
from openblip.models.blip import Blip
from openblip.pretrain import ModelRecipe
from openblip.tokenizer import Tokenizer

MODEL = ModelRecipe(
    image_size_px=32, patch_size_px=16, vision_width=16, vision_layers=1, vision_heads=2,
    text_width=16, text_layers=1, text_heads=2, ffn_width=32, max_positions=40, embedding_width=8,
    dropout=0.0, init_std=0.2,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Run a command in this process; an error that is not for the user is raised here."""

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with web, human and test."""
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=24, num_human=16, num_test=8), folder)
    return folder


@pytest.fixture(scope="session")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a model with random weights."""
    texts = [
        clean_caption(caption.text)
        for name in ("web", "human")
        for shard in list_shards(world / name)
        for sample in read_samples(shard, on_bad=lambda key, reason: None)
        for caption in sample.captions
    ]
    tokenizer = Tokenizer.train(texts, vocab_size=120, min_frequency=1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_checkpoint(folder, Blip(MODEL.build_config(tokenizer)), tokenizer, "# tiny\n")
    return folder
