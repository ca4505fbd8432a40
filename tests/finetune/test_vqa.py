"""From a pre-trained model, from one that answers already, and from nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from openblip.answering import Candidates, rank_answers
from openblip.checkpoint import load_vqa_checkpoint, save_checkpoint
from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import WorldConfig, draw_world
from openblip.evaluation.vqa import evaluate_vqa
from openblip.finetune.vqa import VqaRun, run_vqa
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.new_model import ModelRecipe

ROOT = Path(__file__).resolve().parents[2]

MODEL = ModelRecipe(
    image_size_px=32, patch_size_px=16, vision_width=16, vision_layers=1, vision_heads=2,
    text_width=24, text_layers=1, text_heads=2, ffn_width=32, max_positions=40, embedding_width=8,
    dropout=0.0, init_std=0.1,
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a world whose images are asked what their captions tell: is something red there?"""
    folder = tmp_path_factory.mktemp("asked")
    draw_world(WorldConfig(num_web=40, num_human=2, num_test=2, seed=1), folder)
    with ShardWriter(folder / "asked.tar") as writer:
        [shard] = list_shards(folder / "web")
        for sample in read_samples(shard, on_bad=lambda key, reason: None):
            words = sample.captions[0].text.split()
            qa = [
                {"question": f"Is there {one}?", "answer": "yes" if one in words else "no"}
                for one in COLOURS
            ]
            writer.write(type(sample)(sample.key, sample.image_bytes, (), {"qa": qa}))
    return folder / "asked.tar"


def run(data: Path, **more: object) -> VqaRun:
    values = {
        "data": (str(data),), "num_steps": 2, "batch_size": 4, "randaugment_ops": 0, **more,
    }  # fmt: skip
    return VqaRun.model_validate(values)


def test_a_blip_learns_to_answer_and_goes_on(data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["is there red blue green yes no ?"] * 2, vocab_size=80)
    torch.manual_seed(0)
    blip = Blip(MODEL.build_config(tokenizer))
    save_checkpoint(tmp_path / "blip", blip, tokenizer, "# A card\n")
    result = run_vqa(run(data, init=str(tmp_path / "blip"), image_size_px=48), tmp_path / "vqa")
    assert result["roles"] == ["decode", "pair"]
    told = " ".join(result["notes"])
    assert "drawn anew (1): answer.layers.0.cross.key_value.weight" in told
    assert "resized (1): vision.position_embedding" in told
    assert "left out (" in told
    assert "match_head.weight" in told
    vqa, _ = load_vqa_checkpoint(tmp_path / "vqa")
    assert vqa.config.vision.image_size_px == 48
    again = run_vqa(run(data, init=str(tmp_path / "vqa")), tmp_path / "more")
    assert again["notes"] == [f"it starts from {tmp_path / 'vqa'}"]
    with pytest.raises(ValueError, match="about images of 48 px"):
        run_vqa(run(data, init=str(tmp_path / "vqa"), image_size_px=32), tmp_path / "other")
    # The tensors that are drawn are the same in every run.
    same = run_vqa(run(data, init=str(tmp_path / "blip"), image_size_px=48), tmp_path / "same")
    assert same["model_id"] == result["model_id"]


def test_a_new_model_learns_the_words_of_its_data(data: Path, tmp_path: Path) -> None:
    result = run_vqa(run(data, model=MODEL, vocab_size=90), tmp_path / "vqa")
    assert "it starts from nothing" in result["notes"]
    _, tokenizer = load_vqa_checkpoint(tmp_path / "vqa")
    assert len(tokenizer.encode("is there yellow")) == 5
    log = (tmp_path / "vqa.log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1]


def test_a_recipe_says_what_it_starts_from() -> None:
    for values in ({}, {"init": "a", "model": MODEL}):
        with pytest.raises(ValidationError, match="expected either init"):
            run(Path("a"), **values)
    with pytest.raises(ValidationError, match=r"model\.image_size_px"):
        run(Path("a"), model=MODEL, image_size_px=32)


@pytest.mark.slow
def test_it_learns_to_look(data: Path, tmp_path: Path) -> None:
    """Whether a colour is there stands in the image alone."""
    settings = {
        "optimizer": {"lr": 3e-3, "warmup_steps": 20}, "num_steps": 400, "batch_size": 16,
        "min_crop_scale": 1.0, "flip": False,
    }  # fmt: skip
    model = MODEL.model_copy(update={"patch_size_px": 8, "vision_layers": 2, "text_layers": 2})
    run_vqa(run(data, model=model, vocab_size=90, **settings), tmp_path / "vqa")
    vqa, tokenizer = load_vqa_checkpoint(tmp_path / "vqa")
    candidates = Candidates.of(["yes", "no"], tokenizer)
    samples = list(read_samples(data, on_bad=lambda key, reason: None))
    report = evaluate_vqa(
        vqa, tokenizer, samples, answer=lambda context: rank_answers(vqa, context, candidates)
    )
    shares = [one.answer for one in report.answers]
    no = (
        100
        * sum(question["answer"] == "no" for sample in samples for question in sample.meta["qa"])
        / len(shares)
    )
    assert report.accuracy is not None
    assert report.accuracy > no + 10


@pytest.mark.slow
def test_the_shipped_run_on_daquar(shared: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "runs" / "daquar_cpu.sh"), str(shared / "data" / "vqa-daquar"),
         str(tmp_path)],
        check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    [accuracy] = re.findall(r"accuracy in %\s+([\d.]+)", done.stdout)
    baseline = json.loads((tmp_path / "data" / "baseline.json").read_text())
    print(accuracy, baseline)
    assert float(accuracy) > baseline["accuracy"]
