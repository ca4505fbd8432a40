"""The examples of docs/ecosystem.md run, on tiny models."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openblip.checkpoint import load_checkpoint, save_checkpoint
from openblip.data.sources import list_shards, read_samples
from openblip.models.blip import Blip
from openblip.models.vqa import vqa_from_blip

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"
EXAMPLES = [
    code
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    if code.startswith("# ")
]


@pytest.fixture
def folder(model: Path, world: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that holds what the examples name, and go there."""
    blip, tokenizer = load_checkpoint(model)
    torch.manual_seed(0)
    # A text model of one layer explains nothing.
    blip = Blip(replace(blip.config, text=replace(blip.config.text, num_layers=2)))
    save_checkpoint(tmp_path / "MODEL", blip, tokenizer, "# tiny\n")
    save_checkpoint(tmp_path / "VQA_MODEL", vqa_from_blip(blip).model, tokenizer, "# tiny\n")
    [shard] = list_shards(world / "test")
    sample = next(iter(read_samples(shard, on_bad=lambda key, reason: None)))
    (tmp_path / "photo.jpg").write_bytes(sample.image_bytes)
    monkeypatch.chdir(tmp_path)
    assert run("index", world / "test", "INDEX", "--model", "MODEL").code == 0
    return tmp_path


def test_there_is_one_for_every_verb() -> None:
    told = " ".join(code.splitlines()[0] for code in EXAMPLES)
    assert {"caption", "match", "classify", "embed", "ask", "explain", "search"} <= set(
        re.findall(r"\w+", told)
    )


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLES[number], GUIDE.name, "exec"), {})
    assert capsys.readouterr().out or (folder / "where.png").is_file()
