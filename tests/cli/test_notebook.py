"""The cells of docs/openblip.ipynb run, in order, on tiny models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openblip.checkpoint import load_checkpoint, save_checkpoint
from openblip.models.blip import Blip
from openblip.models.vqa import vqa_from_blip

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "openblip.ipynb"


def test_every_cell_runs(
    model: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blip, tokenizer = load_checkpoint(model)
    torch.manual_seed(0)
    # A text model of one layer explains nothing.
    text = replace(blip.config.text, num_layers=2)
    blip = Blip(replace(blip.config, text=text))
    save_checkpoint(tmp_path / "model", blip, tokenizer, "# tiny\n")
    save_checkpoint(tmp_path / "vqa", vqa_from_blip(blip).model, tokenizer, "# tiny\n")
    (tmp_path / "world").symlink_to(world)
    (tmp_path / "capfilt").mkdir()
    (tmp_path / "capfilt" / "00000.captions.jsonl").write_text('{"key": "a"}\n')
    monkeypatch.setenv("OPENBLIP_RUN", str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 8
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    names: dict[str, object] = {}
    for cell in code:
        exec(compile(cell, NOTEBOOK.name, "exec"), names)
    assert names["rows"] == [{"key": "a"}]
