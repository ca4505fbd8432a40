"""The whole loop on a tiny drawn world: what it leaves, how it goes on, and what it refuses."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openblip.capfilt import bootstrap as loop
from openblip.capfilt.bootstrap import BootstrapData, BootstrapRecipe, bootstrap
from openblip.config import dump_recipe, load_recipe
from openblip.data.world import WorldConfig, draw_world
from openblip.training.alignment import AlignmentConfig

TRAINING = {"batch_size": 8, "num_steps": 6, "randaugment_ops": 0, "flip": False}
ALIGNMENT = {"queue_size": 32, "momentum": 0.9}
RECIPE = BootstrapRecipe.model_validate(
    {
        "vocab_size": 120,
        "pretrain": {
            **TRAINING,
            "model": {
                "image_size_px": 32, "patch_size_px": 16, "vision_width": 32, "vision_layers": 1,
                "vision_heads": 2, "text_width": 32, "text_layers": 1, "text_heads": 2,
                "ffn_width": 64, "max_positions": 40, "embedding_width": 16, "init_std": 0.1,
            },
            "objective": {"alignment": AlignmentConfig(**ALIGNMENT)},
        },
        "captioner": {**TRAINING, "prompt": ""},
        "filter": {
            **TRAINING,
            "alignment": AlignmentConfig(positives="image_or_text", mining="online", **ALIGNMENT),
        },
        "capfilt": {"prompts": ("",), "keep": {"threshold": 0.4}},
        "evaluation": {"shortlist": 4},
    }
)  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
from openblip.capfilt.bootstrap import BootstrapData, BootstrapRecipe, bootstrap
from openblip.config import load_recipe
world, recipe, out = map(Path, sys.argv[1:])
data = BootstrapData(world / "web", world / "human", world / "test")
bootstrap(load_recipe(BootstrapRecipe, recipe), data, out)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> BootstrapData:
    folder = tmp_path_factory.mktemp("world")
    draw_world(WorldConfig(num_web=48, num_human=12, num_test=8, seed=1), folder)
    return BootstrapData(folder / "web", folder / "human", folder / "test")


@pytest.fixture(scope="module")
def done(
    data: BootstrapData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("loop")
    return out, bootstrap(RECIPE, data, out)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if "seconds" not in name}


def test_the_results_compare_before_and_after(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    assert {"before", "after", "filter", "seconds"} <= results.keys()
    for row in (results["before"], results["after"]):
        assert {"tr_at_1", "ir_at_1", "cider"} <= row.keys()
        assert 0 <= row["tr_at_1"] <= 100
    assert 0 <= results["filter"]["roc_auc"] <= 1
    assert results["seconds"] > 0
    assert json.loads((out / "results.json").read_text()) == results


def test_every_stage_leaves_its_folder_and_its_log(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    for name in ("base", "captioner", "filter", "bootstrapped"):
        assert (out / name / "model.safetensors").is_file()
        lines = [
            json.loads(line) for line in (out / "logs" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert lines[-1]["step"] == TRAINING["num_steps"] - 1
    assert not list(out.rglob("*.tmp"))


def test_a_second_start_trains_nothing_and_tells_the_same(
    done: tuple[Path, dict[str, Any]], data: BootstrapData, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = done
    for stage in ("pretrain", "finetune_captioning", "finetune_retrieval", "evaluate_retrieval"):
        monkeypatch.setattr(loop, stage, None)
    assert numbers(bootstrap(RECIPE, data, out)) == numbers(results)


def test_another_recipe_in_the_folder_is_refused(
    done: tuple[Path, dict[str, Any]], data: BootstrapData
) -> None:
    out, _ = done
    other = RECIPE.model_copy(update={"vocab_size": 121})
    with pytest.raises(ValueError, match="holds a loop of another recipe"):
        bootstrap(other, data, out)


def test_other_data_for_the_folder_are_refused(
    done: tuple[Path, dict[str, Any]], data: BootstrapData
) -> None:
    out, _ = done
    with pytest.raises(ValueError, match="holds a loop of other data"):
        bootstrap(RECIPE, replace(data, web=data.test), out)


def test_the_recipe_beside_the_results_is_the_recipe(done: tuple[Path, dict[str, Any]]) -> None:
    out, _ = done
    assert load_recipe(BootstrapRecipe, out / "recipe.yaml") == RECIPE


def test_the_ablation_is_added_to_a_loop_that_is_done(
    done: tuple[Path, dict[str, Any]], data: BootstrapData
) -> None:
    out, results = done
    extended = bootstrap(RECIPE, data, out, has_ablation=True)
    assert list(extended["ablation"]) == list(loop.MODELS)
    assert extended["ablation"]["base"] == extended["before"] == results["before"]
    assert extended["after"] == results["after"]


@pytest.mark.parametrize("has_web_negatives", [False, True])
def test_the_filter_takes_web_captions_as_wrong_where_the_recipe_says_so(
    has_web_negatives: bool, data: BootstrapData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenError(Exception):
        pass

    def finetune(*args: Any, negatives: Sequence[Path], **kwargs: Any) -> None:
        raise SeenError(negatives)

    monkeypatch.setattr(loop, "finetune_retrieval", finetune)
    recipe = RECIPE.model_copy(update={"has_web_negatives": has_web_negatives})
    with pytest.raises(SeenError) as seen:
        bootstrap(recipe, data, tmp_path)
    assert seen.value.args == ([data.web] if has_web_negatives else [],)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign", ["logs/base.jsonl", "logs/filter.jsonl", "capfilt", "logs/bootstrapped.jsonl"]
)
def test_a_loop_that_was_killed_ends_with_the_numbers_of_one_that_was_not(
    sign: str, done: tuple[Path, dict[str, Any]], data: BootstrapData, tmp_path: Path
) -> None:
    """Kill the process when `sign`, of a stage that has begun, appears."""
    _, results = done
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(dump_recipe(RECIPE))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(data.web.parent), str(recipe), str(out)],
        stderr=subprocess.DEVNULL,
    )
    while not (out / sign).exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "results.json").exists()
    assert numbers(bootstrap(RECIPE, data, out)) == numbers(results)
