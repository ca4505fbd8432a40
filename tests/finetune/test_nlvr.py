"""Fine-tuning on sentences about two images: from a recipe to a checkpoint, and what it learns."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from openblip.checkpoint import load_nlvr_checkpoint, save_checkpoint
from openblip.evaluation.nlvr import evaluate_nlvr, read_all_pairs
from openblip.finetune.nlvr import NlvrRun, run_nlvr
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.new_model import ModelRecipe

ROOT = Path(__file__).resolve().parents[2]
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
SIZES = {
    "image_size_px": 16, "patch_size_px": 8, "vision_width": 32, "vision_layers": 1,
    "vision_heads": 2, "text_width": 32, "text_layers": 2, "text_heads": 2, "ffn_width": 32,
    "max_positions": 40, "embedding_width": 8, "dropout": 0.0, "init_std": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return sentences on the colours of two images, half of them false."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for left, left_rgb in COLORS.items():
        for right, right_rgb in COLORS.items():
            names = [f"{left}-{right}-{side}.png" for side in ("left", "right")]
            for name, rgb in zip(names, (left_rgb, right_rgb), strict=True):
                Image.new("RGB", (16, 16), rgb).save(folder / name)
            for color in COLORS:
                rows.append((f"the left image is {color}", color == left, names))
                rows.append((f"both are {color}", color == left == right, names))
                rows.append((f"no image is {color}", color not in {left, right}, names))
    (folder / "train.jsonl").write_text(
        "".join(
            json.dumps({"sentence": sentence, "label": label, "images": names}) + "\n"
            for sentence, label, names in rows
        )
    )
    return folder / "train.jsonl"


def recipe(data: Path, **changes: object) -> NlvrRun:
    values = {
        "data": (str(data),), "model": ModelRecipe(**SIZES), "vocab_size": 60, "num_steps": 3,
        "batch_size": 8, "max_tokens": 40, "min_crop_scale": 1.0, "randaugment_ops": 0,
        "first_merge_layer": 1,
    }  # fmt: skip
    return NlvrRun.model_validate(values | changes)


@pytest.mark.slow
def test_a_new_model_learns_to_compare_two_images(data: Path, tmp_path: Path) -> None:
    run = recipe(data, num_steps=350)
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"lr": 3e-3})})
    result = run_nlvr(run, tmp_path / "model")
    assert "it starts from nothing" in result["notes"]
    nlvr, tokenizer = load_nlvr_checkpoint(tmp_path / "model")
    report = evaluate_nlvr(nlvr, tokenizer, read_all_pairs(data))
    assert report.accuracy is not None
    # A third of the sentences is true.
    assert report.accuracy >= 90.0


def test_it_starts_from_a_pretrained_model(data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the left right image is red blue both are no"], vocab_size=60)
    torch.manual_seed(0)
    save_checkpoint(
        tmp_path / "blip", Blip(ModelRecipe(**SIZES).build_config(tokenizer)), tokenizer, ""
    )
    run = recipe(data, model=None, init=str(tmp_path / "blip"), image_size_px=24)
    result = run_nlvr(run, tmp_path / "model")
    nlvr, _ = load_nlvr_checkpoint(tmp_path / "model")
    assert nlvr.config.vision.image_size_px == 24
    notes = " ".join(result["notes"])
    assert "tensors resized (1): vision.position_embedding" in notes
    assert "classifier.0.bias" in notes
    assert "match_head.bias" in notes
    again = run_nlvr(run, tmp_path / "again")
    assert again["model_id"] == result["model_id"]
    dry = run_nlvr(run, tmp_path / "dry", is_dry=True)
    assert dry["pairs_per_epoch"] == 2 * 24
    assert not (tmp_path / "dry").exists()


def test_what_does_not_go_together_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either init"):
        recipe(data, model=None)
    with pytest.raises(ValueError, match=r"model\.image_size_px"):
        recipe(data, image_size_px=32)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.tar: sentences about two images are read from"):
        run_nlvr(recipe(tmp_path / "a.tar"), tmp_path / "model")


@pytest.mark.slow
def test_the_shipped_run_on_nlvr(shared: Path, tmp_path: Path) -> None:
    subprocess.run(
        ["bash", str(ROOT / "runs" / "nlvr_cpu.sh"), str(shared / "data"), str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
    )
    log = [json.loads(line) for line in (tmp_path / "model.log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log]
    # A coin gives log 2.
    assert sum(losses[:10]) / 10 > 0.98 * math.log(2)
    assert sum(losses[-10:]) / 10 < 0.9 * math.log(2)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 198
