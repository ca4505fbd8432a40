"""Evaluation as a training goes on: no trace in the training, and the best model is kept."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openblip.checkpoint import (
    Model,
    load_checkpoint,
    load_nlvr_checkpoint,
    load_vqa_checkpoint,
    model_id,
)
from openblip.data.sources import kept_captions, list_shards, read_samples
from openblip.data.world import WorldConfig, draw_world
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.finetune.captioning import CaptioningRecipe, captioning_training
from openblip.finetune.nlvr import NlvrRecipe, nlvr_training
from openblip.finetune.retrieval import RetrievalRecipe, retrieval_training
from openblip.finetune.vqa import VqaRecipe, vqa_training
from openblip.generation import Decoding
from openblip.inference import Engine
from openblip.models.blip import Blip
from openblip.models.nlvr import nlvr_from_blip
from openblip.models.vqa import vqa_from_blip
from openblip.pretrain import ModelRecipe, ObjectiveRecipe, PretrainRecipe, pretraining
from openblip.tokenizer import Tokenizer
from openblip.training import loop
from openblip.training.alignment import AlignmentConfig
from openblip.training.best import BestSoFar, Evaluation, Scores
from openblip.training.pairs import PairRecipe, Training
from openblip.training.state import TrainingFiles
from tests.task_data import write_task_data

DECODING = Decoding("greedy", min_tokens=1, max_tokens=6)
PAIRS: dict[str, Any] = {
    "num_steps": 6, "batch_size": 4, "max_tokens": 20, "randaugment_ops": 1,
    "saving": {"every_steps": 2, "every_minutes": 0.0},
    "optimizer": {"lr": 0.01},
}  # fmt: skip
ALIGNMENT = {"queue_size": 10, "momentum": 0.9}
MODEL = ModelRecipe(
    image_size_px=32, patch_size_px=16, vision_width=16, vision_layers=2, vision_heads=2,
    drop_path=0.2, text_width=16, text_layers=1, text_heads=2, ffn_width=16, max_positions=32,
    embedding_width=8, init_std=0.1,
)  # fmt: skip


def start(tokenizer: Tokenizer, *roles: str) -> Blip:
    torch.manual_seed(5)
    return Blip(MODEL.build_config(tokenizer).with_roles(frozenset(roles)))


@dataclass(frozen=True)
class Task:
    recipe: PairRecipe
    prepare: Callable[[Any, Path, Tokenizer], Training[Any, Any]]
    names: set[str]
    evaluated_on: str = "test"
    load: Callable[[Path], tuple[Model, Tokenizer]] = load_checkpoint


RECALLS = {f"{way}_at_{k}" for way in ("tr", "ir") for k in (1, 5, 10)}
RECALLS |= {"tr_mean", "ir_mean", "mean"}
TASKS = {
    "pretraining": Task(
        PretrainRecipe.model_validate(
            {**PAIRS, "model": MODEL,
             "objective": ObjectiveRecipe(alignment=AlignmentConfig(**ALIGNMENT))}
        ),
        lambda recipe, data, tokenizer: pretraining(recipe, [data / "web"], tokenizer),
        {f"itc_{name}" for name in RECALLS} | {"cider", "bleu_4"},
    ),
    "captioning": Task(
        CaptioningRecipe.model_validate(PAIRS),
        lambda recipe, data, tokenizer: captioning_training(
            recipe, start(tokenizer, "decode"), [data / "human"], tokenizer
        ),
        {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"},
    ),
    "vqa": Task(
        VqaRecipe.model_validate(PAIRS),
        lambda recipe, data, tokenizer: vqa_training(
            recipe, vqa_from_blip(start(tokenizer, "pair", "decode")).model, [data / "asked.tar"],
            tokenizer,
        ),
        {"accuracy"},
        "asked.tar",
        load_vqa_checkpoint,
    ),
    "nlvr": Task(
        NlvrRecipe.model_validate(PAIRS),
        lambda recipe, data, tokenizer: nlvr_training(
            recipe, nlvr_from_blip(start(tokenizer, "pair"), first_merge_layer=0).model,
            [data / "pairs.jsonl"], tokenizer,
        ),
        {"accuracy"},
        "pairs.jsonl",
        load_nlvr_checkpoint,
    ),
    "retrieval": Task(
        RetrievalRecipe.model_validate(
            {**PAIRS, "alignment": AlignmentConfig("image", "online", **ALIGNMENT)}
        ),
        lambda recipe, data, tokenizer: retrieval_training(
            recipe, start(tokenizer, "text", "pair"), [data / "human"], tokenizer
        ),
        RECALLS | {"itc_mean"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=24, num_human=9, num_test=5, seed=1), folder)
    write_task_data(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return Tokenizer.train(kept_captions((data / "web").glob("*.tar")), vocab_size=120)


def evaluated(recipe: PairRecipe, data: Path) -> PairRecipe:
    evaluation = {
        "every_steps": 2, "data": (str(data),), "decoding": DECODING, "shortlist": 3,
    }  # fmt: skip
    return type(recipe).model_validate({**dict(recipe), "evaluation": evaluation})


def state_of(training: Training[Any, Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in training.step.state_dict().items()}


def lines_of(files: TrainingFiles) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files.log.read_text().splitlines()]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", TASKS)
def test_it_leaves_no_trace_and_survives_a_stop(
    name: str, data: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS[name]
    plain_files, files, stopped_files = (
        TrainingFiles.beside(tmp_path / which) for which in ("plain", "whole", "stopped")
    )
    plain = task.prepare(task.recipe, data, tokenizer)
    plain.run(plain_files, name)
    recipe = evaluated(task.recipe, data / task.evaluated_on)
    whole = task.prepare(recipe, data, tokenizer)
    whole.run(files, name)
    expected, found = state_of(plain), state_of(whole)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert not plain_files.best.exists()
    lines = lines_of(files)
    assert [line for line in lines if "evaluation" not in line] == lines_of(plain_files)
    scores = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    assert [*scores] == [1, 3, 5]
    assert all(one.keys() == task.names | {"criterion"} for one in scores.values())

    best_step = max(scores, key=lambda step: scores[step]["criterion"])
    best, _ = task.load(files.best)
    assert f"after {best_step + 1} steps" in (files.best / "README.md").read_text()
    assert (model_id(best) == model_id(whole.model)) == (best_step == 5)
    assert "Measured 3 times" in files.log.with_suffix(".html").read_text()

    advance = loop.ProgressLine.advance
    for stop in (2, 5):

        def until(line: loop.ProgressLine, num: int = 1, note: str = "", stop: int = stop) -> None:
            advance(line, num, note)
            if line.done == stop and line.title == name:
                raise StoppedError

        with monkeypatch.context() as patch:
            patch.setattr(loop.ProgressLine, "advance", until)
            with pytest.raises(StoppedError):
                task.prepare(recipe, data, tokenizer).run(stopped_files, name)
    task.prepare(recipe, data, tokenizer).run(stopped_files, name)
    assert stopped_files.log.read_bytes() == files.log.read_bytes()
    assert model_id(task.load(stopped_files.best)[0]) == model_id(best)


def test_the_scores_are_those_of_the_kept_model(
    data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    [shard] = list_shards(data / "test")
    samples = list(read_samples(shard, on_bad=lambda key, reason: pytest.fail(reason)))
    for name in ("captioning", "retrieval"):
        files = TrainingFiles.beside(tmp_path / name)
        recipe = evaluated(TASKS[name].recipe, data / "test").model_copy(update={"num_steps": 2})
        TASKS[name].prepare(recipe, data, tokenizer).run(files, name)
        [scores] = [line["evaluation"] for line in lines_of(files) if "evaluation" in line]
        engine = Engine.plain(*load_checkpoint(files.best))
        if name == "captioning":
            prompt = CaptioningRecipe().prompt
            report = evaluate_captioning(engine, samples, prompt=prompt, decoding=DECODING)
            expected = report.scores.to_json()
            criterion = expected["cider"] + expected["bleu_4"]
        else:
            recalls = evaluate_retrieval(engine, samples, shortlist=3)
            expected = recalls.reranked.to_json() | {"itc_mean": recalls.itc.mean}
            criterion = recalls.reranked.mean
        assert scores == {**expected, "criterion": criterion}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"key": "a", "image_base64": "AAAA", "captions": ["x"]}, "sample a is unusable"),
        ({"key": "a", "image_base64": "", "captions": []}, "sample a is unusable"),
    ],
)
def test_a_bad_sample_is_told_before_the_first_step(
    line: dict[str, Any], message: str, data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(line) + "\n")
    recipe = CaptioningRecipe.model_validate(
        {**PAIRS, "evaluation": {"every_steps": 2, "data": (str(path),)}}
    )
    files = TrainingFiles.beside(tmp_path / "m")
    with pytest.raises(ValueError, match=f"evaluation.data: {message}"):
        TASKS["captioning"].prepare(recipe, data, tokenizer).run(files, "captioning")
    assert not files.log.exists()


def test_the_best_stays_and_the_random_numbers_go_on() -> None:
    criteria = iter([1.0, 3.0, 3.0, float("nan"), 2.0])
    kept: list[int] = []

    def measure() -> Scores:
        torch.rand(3)
        assert not module.training
        return Scores({}, next(criteria))

    module = torch.nn.Dropout().train()
    best = BestSoFar(Evaluation(2, measure, lambda num_steps, scores: kept.append(num_steps)))
    assert [step for step in range(7) if best.is_due(step)] == [2, 4, 6]
    torch.manual_seed(0)
    expected = torch.rand(5).tolist()
    torch.manual_seed(0)
    found = []
    for step in range(2, 7):
        if step == 5:
            again = BestSoFar(Evaluation(2, measure, lambda num_steps, scores: kept.append(9)))
            again.restore(json.loads(json.dumps(best.to_json())))
            best = again
        best.evaluate(module, step)
        found += torch.rand(1).tolist()
        assert module.training
    assert found == expected
    assert kept == [2, 3]
