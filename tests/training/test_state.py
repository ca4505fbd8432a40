"""A training that was stopped, however, ends as one that never was: weights, queue and log."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openblip.config import Recipe
from openblip.data.position import Position
from openblip.data.sources import kept_captions
from openblip.data.world import WorldConfig, draw_world
from openblip.finetune.captioning import CaptioningRecipe, finetune_captioning
from openblip.finetune.nlvr import NlvrRecipe, finetune_nlvr
from openblip.finetune.reconstruction import ReconstructionRecipe, reconstruction_training
from openblip.finetune.retrieval import RetrievalRecipe, finetune_retrieval
from openblip.finetune.vqa import VqaRecipe, finetune_vqa
from openblip.models.blip import Blip
from openblip.models.nlvr import Nlvr, nlvr_from_blip
from openblip.models.vqa import Vqa, vqa_from_blip
from openblip.pretrain import ModelRecipe, ObjectiveRecipe, PretrainRecipe, pretrain
from openblip.tokenizer import Tokenizer
from openblip.training import loop, watch
from openblip.training.alignment import AlignmentConfig
from openblip.training.pairs import PairRecipe
from openblip.training.state import SavingRecipe, TrainingFiles, TrainingState
from tests.task_data import write_task_data

NUM_STEPS = 12
PAIRS = {
    "num_steps": NUM_STEPS, "batch_size": 4, "max_tokens": 20, "randaugment_ops": 1,
    "saving": {"every_steps": 2, "every_minutes": 0.0},
}  # fmt: skip
ALIGNMENT = {"queue_size": 10, "momentum": 0.9}
MODEL = ModelRecipe(
    image_size_px=32, patch_size_px=16, vision_width=16, vision_layers=2, vision_heads=2,
    drop_path=0.2, text_width=16, text_layers=1, text_heads=2, ffn_width=16, max_positions=32,
    embedding_width=8, init_std=0.1,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A training of any kind: from a folder of data and its files to a model."""

    recipe: PairRecipe
    train: Callable[[PairRecipe, Path, Tokenizer, TrainingFiles], Blip | Nlvr | Vqa]


def run_pretrain(recipe, data, tokenizer, files):
    return pretrain(recipe, [data / "web"], tokenizer, files=files)


def run_captioning(recipe, data, tokenizer, files):
    return finetune_captioning(
        recipe, start(tokenizer, "decode"), [data / "human"], tokenizer, files=files
    )


def run_retrieval(recipe, data, tokenizer, files):
    return finetune_retrieval(
        recipe, start(tokenizer, "text", "pair"), [data / "human"], tokenizer, files=files,
        negatives=[data / "web"],
    )  # fmt: skip


def run_vqa(recipe, data, tokenizer, files):
    vqa = vqa_from_blip(start(tokenizer, "pair", "decode")).model
    return finetune_vqa(recipe, vqa, [data / "asked.tar"], tokenizer, files=files)


def run_reconstruction(recipe, data, tokenizer, files):
    blip = start(tokenizer, "text", "pair")
    training = reconstruction_training(recipe, blip, [data / "human"], tokenizer)
    training.run(files, "reconstruction")
    return training.model


def run_nlvr(recipe, data, tokenizer, files):
    nlvr = nlvr_from_blip(start(tokenizer, "pair"), first_merge_layer=0).model
    return finetune_nlvr(recipe, nlvr, [data / "pairs.jsonl"], tokenizer, files=files)


def start(tokenizer: Tokenizer, *roles: str) -> Blip:
    torch.manual_seed(5)
    return Blip(MODEL.build_config(tokenizer).with_roles(frozenset(roles)))


TASKS = {
    "pretraining": Task(
        PretrainRecipe.model_validate(
            {**PAIRS, "model": MODEL, "accumulation_steps": 2,
             "objective": ObjectiveRecipe(alignment=AlignmentConfig(**ALIGNMENT))}
        ),
        run_pretrain,
    ),
    "pretraining with reconstruction": Task(
        PretrainRecipe.model_validate(
            {**PAIRS, "model": MODEL,
             "objective": ObjectiveRecipe(
                 reconstruction_weight=1.0, alignment=AlignmentConfig(**ALIGNMENT))}
        ),
        run_pretrain,
    ),
    "reconstruction": Task(ReconstructionRecipe.model_validate(PAIRS), run_reconstruction),
    "captioning": Task(CaptioningRecipe.model_validate(PAIRS), run_captioning),
    "retrieval": Task(
        RetrievalRecipe.model_validate(
            {**PAIRS, "alignment": AlignmentConfig("image", "online", **ALIGNMENT)}
        ),
        run_retrieval,
    ),
    "captioning, image encoder frozen": Task(
        CaptioningRecipe.model_validate({**PAIRS, "freeze_image_encoder": True}), run_captioning
    ),
    "retrieval, image encoder frozen": Task(
        RetrievalRecipe.model_validate(
            {**PAIRS, "freeze_image_encoder": True,
             "alignment": AlignmentConfig("image", "online", **ALIGNMENT)}
        ),
        run_retrieval,
    ),
    "vqa": Task(VqaRecipe.model_validate(PAIRS), run_vqa),
    "nlvr": Task(NlvrRecipe.model_validate(PAIRS), run_nlvr),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=24, num_human=9, num_test=2, seed=1), folder)
    write_task_data(folder, times_asked=2)
    return folder


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return Tokenizer.train(kept_captions((data / "web").glob("*.tar")), vocab_size=120)


class Twins:
    """Catches the training steps of all runs, so that twin and queue can be compared too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state: dict[str, Tensor] = {}
        fit = loop.fit

        def caught(step, *args, **kwargs) -> None:
            fit(step, *args, **kwargs)
            self.state = {name: value.clone() for name, value in step.state_dict().items()}

        monkeypatch.setattr("openblip.training.pairs.fit", caught)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("stops", [(1,), (7, 9), (3, 4, 10)])
def test_a_stopped_training_ends_as_one_that_was_not(
    name: str, stops: tuple[int, ...], data: Path, tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    task, twins = TASKS[name], Twins(monkeypatch)
    whole = TrainingFiles.beside(tmp_path / "whole")
    task.train(task.recipe, data, tokenizer, whole)
    expected = twins.state

    files = TrainingFiles.beside(tmp_path / "stopped")
    advance = loop.ProgressLine.advance
    for stop in stops:

        def until(line: loop.ProgressLine, num: int = 1, note: str = "", stop: int = stop) -> None:
            advance(line, num, note)
            if line.done == stop:
                raise StoppedError

        with monkeypatch.context() as patch:
            patch.setattr(loop.ProgressLine, "advance", until)
            with pytest.raises(StoppedError):
                task.train(task.recipe, data, tokenizer, files)
    faster = task.recipe.model_copy(update={"num_workers": 3, "activation_checkpointing": True})
    task.train(faster, data, tokenizer, files)
    assert same(twins.state, expected)
    assert files.log.read_bytes() == whole.log.read_bytes()


def test_another_recipe_does_not_go_on(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, files = TASKS["captioning"], TrainingFiles.beside(tmp_path / "m")
    task.train(task.recipe, data, tokenizer, files)
    other = task.recipe.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match=r"m\.state holds an unfinished training by another rec"):
        task.train(other, data, tokenizer, files)


class Nothing(Recipe):
    pass


def module_and_optimizer() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_the_last_states_are_kept(tmp_path: Path) -> None:
    state = TrainingState(tmp_path, SavingRecipe(keep_last=2), Nothing())
    module, optimizer = module_and_optimizer()
    for step in range(1, 6):
        state.save(step, module, optimizer, Position(next_unit=step), 10 * step)
    state.wait()
    assert saved(tmp_path) == ["step-00000004", "step-00000005"]
    resumed = TrainingState(tmp_path, SavingRecipe(), Nothing()).load(*module_and_optimizer())
    assert resumed is not None
    assert (resumed.num_steps, resumed.position.next_unit, resumed.log_bytes) == (5, 5, 50)


def test_what_is_saved_is_the_moment_of_saving(tmp_path: Path) -> None:
    state = TrainingState(tmp_path, SavingRecipe(), Nothing())
    module, optimizer = module_and_optimizer()
    before = module.weight.detach().clone()
    state.save(1, module, optimizer, Position(), 0)
    with torch.no_grad():
        module.weight.zero_()
    state.wait()
    state.load(module, optimizer)
    assert torch.equal(module.weight, before)


def test_a_state_that_was_not_finished_counts_for_nothing(tmp_path: Path) -> None:
    state = TrainingState(tmp_path, SavingRecipe(), Nothing())
    module, optimizer = module_and_optimizer()
    state.save(1, module, optimizer, Position(), 0)
    state.save(2, module, optimizer, Position(), 0)
    state.wait()
    (tmp_path / "step-00000002" / ".metadata").unlink()
    resumed = state.load(module, optimizer)
    assert resumed is not None
    assert resumed.num_steps == 1
    state.save(2, module, optimizer, Position(), 0)
    state.wait()
    assert (tmp_path / "step-00000002" / ".metadata").is_file()


def test_a_state_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    state = TrainingState(tmp_path, SavingRecipe(), Nothing())
    module, optimizer = module_and_optimizer()
    (tmp_path / "step-00000001").write_text("in the way")
    with pytest.raises(FileExistsError, match="step-00000001"):
        state.save(1, module, optimizer, Position(), 0)


def test_states_are_due_by_steps_and_by_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("openblip.training.state.time.monotonic", lambda: now)
    steps = TrainingState(tmp_path, SavingRecipe(every_steps=3, every_minutes=0.0), Nothing())
    minutes = TrainingState(tmp_path, SavingRecipe(every_minutes=2.0), Nothing())
    never = TrainingState(tmp_path, SavingRecipe(every_minutes=0.0), Nothing())
    now = 119.0
    assert [step for step in range(1, 8) if steps.is_due(step)] == [3, 6]
    assert not minutes.is_due(1)
    now = 121.0
    assert minutes.is_due(1)
    assert not never.is_due(1)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_step_and_saves(
    number: signal.Signals, error: type[BaseException], data: Path, tokenizer: Tokenizer,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    task, twins = TASKS["retrieval"], Twins(monkeypatch)
    recipe = task.recipe.model_copy(update={"saving": SavingRecipe(every_minutes=0.0)})
    whole = TrainingFiles.beside(tmp_path / "whole")
    task.train(recipe, data, tokenizer, whole)
    expected = twins.state
    files = TrainingFiles.beside(tmp_path / "stopped")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        steps = iter(range(100))

        def signalled(batch_stream, *args, **kwargs):
            if next(steps) == 5:
                os.kill(os.getpid(), number)
            return finite(batch_stream, *args, **kwargs)

        finite = watch.FiniteWatch.see
        patch.setattr(watch.FiniteWatch, "see", signalled)
        with pytest.raises(error):
            task.train(recipe, data, tokenizer, files)
    assert saved(files.state) == ["step-00000006"]
    assert signal.getsignal(number) is handler
    task.train(recipe, data, tokenizer, files)
    assert same(twins.state, expected)
    assert files.log.read_bytes() == whole.log.read_bytes()
