"""The whole loop on a tiny drawn world: what it leaves, how it goes on, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openblip.capfilt import bootstrap as loop
from openblip.capfilt.bootstrap import BootstrapData, BootstrapRecipe, bootstrap
from openblip.capfilt.bootstrap_results import MODELS
from openblip.capfilt.manifest import Manifest, manifests
from openblip.capfilt.run import EngineChoice
from openblip.checkpoint import image_encoder_id, load_checkpoint
from openblip.config import dump_recipe, load_recipe
from openblip.data.sources import list_shards, read_samples
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
TWICE = RECIPE.model_copy(update={"rounds": 2})
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


@pytest.fixture(scope="module")
def done_twice(
    data: BootstrapData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Run two rounds, with the ablation's models."""
    out = tmp_path_factory.mktemp("loop")
    return out, bootstrap(TWICE, data, out, has_ablation=True)


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
    assert list(extended["ablation"]) == list(MODELS)
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


def test_a_second_round_starts_from_the_model_of_the_first(
    done: tuple[Path, dict[str, Any]], done_twice: tuple[Path, dict[str, Any]]
) -> None:
    out, results = done_twice
    scores = {
        name: json.loads((out / "evaluation" / f"{name}.json").read_text())["captioning"]["scores"]
        for name in ("bootstrapped", "bootstrapped_2")
    }
    assert results["rounds"][0].items() >= scores["bootstrapped"].items()
    assert results["after"] == results["rounds"][1]
    assert results["after"].items() >= scores["bootstrapped_2"].items()
    assert "rounds" not in done[1]
    first, _ = done
    for name in ("base", "captioner", "filter", "bootstrapped"):
        file = Path(name, "model.safetensors")
        assert (out / file).read_bytes() == (first / file).read_bytes(), name
    for name in ("captioner", "filter"):
        file = "model.safetensors"
        assert (out / f"{name}_2" / file).read_bytes() != (out / name / file).read_bytes()
    done_of, again = (
        Manifest.read(path) for path in (*manifests(out / "capfilt"), *manifests(out / "capfilt_2"))
    )
    assert (done_of.shard, done_of.input_checksum) == (again.shard, again.input_checksum)
    assert (done_of.captioner, done_of.filter) != (again.captioner, again.filter)


def test_each_version_of_the_data_has_its_worth(
    done: tuple[Path, dict[str, Any]], done_twice: tuple[Path, dict[str, Any]]
) -> None:
    out, results = done_twice
    rows = {row["data"]: row for row in results["data_utility"]}
    assert list(rows) == [
        "web", "selections/filter_only", "selections/captioner_only", "capfilt", "capfilt_2",
    ]  # fmt: skip
    assert [row["model"] for row in rows.values()] == [*MODELS, "bootstrapped_2"]
    assert rows["web"]["scores"] == results["before"]
    assert rows["capfilt_2"]["scores"] == results["after"]
    assert rows["web"]["captions_by_source"] == {"web": 48}
    for data, row in rows.items():
        if data != "web":
            samples = [
                sample
                for shard in list_shards(out / data)
                for sample in read_samples(shard, on_bad=lambda key, reason: None)
            ]
            assert row["num_captions"] == sum(len(sample.captions) for sample in samples)
    assert rows["selections/captioner_only"]["captions_by_source"].keys() == {"web", "synthetic"}
    assert [row["data"] for row in done[1]["data_utility"]] == ["web", "capfilt"]


def test_the_page_shows_the_rounds(done_twice: tuple[Path, dict[str, Any]]) -> None:
    page = (done_twice[0] / "report.html").read_text()
    for text in (
        "2 rounds of CapFilt",
        "bootstrapped, round 1",
        "bootstrapped, round 2 (after)",
        "Each round",
        '<a href="capfilt_2/report.html">CapFilt report of round 2</a>',
        "What each version of the data is worth",
        "web and synthetic, kept by the filter, round 2",
        "captioner 2: fine-tuning on human captions",
    ):
        assert text in page, text


def test_a_unit_that_cannot_be_done_stops_the_loop_until_it_can(
    done: tuple[Path, dict[str, Any]], data: BootstrapData, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = without_capfilt(done[0], tmp_path / "out")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("it is broken")

    with monkeypatch.context() as patch:
        patch.setattr("openblip.capfilt.work.process_shard", broken)
        with pytest.raises(ValueError, match="capfilt: 1 of 1 units not done: 00000: it is broken"):
            bootstrap(RECIPE, data, out)
    assert not (out / "bootstrapped").exists()
    assert numbers(bootstrap(RECIPE, data, out)) == numbers(done[1])


def test_captioner_and_filter_may_share_the_image_encoder_of_their_base(
    data: BootstrapData, tmp_path: Path
) -> None:
    frozen = {"freeze_image_encoder": True}
    recipe = RECIPE.model_copy(
        update={
            "captioner": RECIPE.captioner.model_copy(update=frozen),
            "filter": RECIPE.filter.model_copy(update=frozen),
        }
    )
    bootstrap(recipe, data, tmp_path)
    models = [load_checkpoint(tmp_path / name)[0] for name in ("base", "captioner", "filter")]
    assert len({image_encoder_id(blip) for blip in models}) == 1
    base, captioner, judge = (blip.state_dict() for blip in models)
    for part in (captioner, judge):
        assert any(not torch.equal(value, base[name]) for name, value in part.items())


def test_an_engine_that_does_a_part_alone_is_refused(data: BootstrapData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loop takes local or pool"):
        bootstrap(RECIPE, data, tmp_path / "out", engine=EngineChoice("slurm"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_pool_writes_the_bytes_of_one_process(
    data: BootstrapData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another number of threads may change the last digits; tests have one, and so have workers.
    monkeypatch.setattr("openblip.capfilt.run.os.cpu_count", lambda: 1)
    [web] = list_shards(data.web)
    assert web.num_bytes is not None
    cut = RECIPE.capfilt.model_copy(update={"unit_bytes": web.num_bytes // 4})
    recipe = RECIPE.model_copy(update={"capfilt": cut})
    results = bootstrap(recipe, data, tmp_path / "local")
    out = without_capfilt(tmp_path / "local", tmp_path / "pool")
    again = bootstrap(recipe, data, out, engine=EngineChoice("pool", num_workers=2))
    assert numbers(again) == numbers(results)
    for name in ("tar", "captions.jsonl"):
        files = sorted(path.name for path in (tmp_path / "local" / "capfilt").glob(f"*.{name}"))
        assert len(files) == 4
        for file in files:
            local, pool = (tmp_path / which / "capfilt" / file for which in ("local", "pool"))
            assert local.read_bytes() == pool.read_bytes(), file
    assert (out / "lineage.json").read_bytes() == (tmp_path / "local/lineage.json").read_bytes()


def without_capfilt(loop: Path, copy: Path) -> Path:
    """Copy a loop as it was before its CapFilt; return the copy's folder."""
    shutil.copytree(loop, copy)
    for folder in ("capfilt", "bootstrapped", "evaluation"):
        shutil.rmtree(copy / folder)
    (copy / "results.json").unlink()
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    "sign", ["logs/base.jsonl", "logs/filter.jsonl", "capfilt", "logs/bootstrapped.jsonl"]
)
def test_a_loop_that_was_killed_ends_with_the_numbers_of_one_that_was_not(
    sign: str, done: tuple[Path, dict[str, Any]], data: BootstrapData, tmp_path: Path
) -> None:
    """Kill the process when `sign`, of a stage that has begun, appears."""
    out = killed(RECIPE, data, tmp_path, sign)
    assert numbers(bootstrap(RECIPE, data, out)) == numbers(done[1])


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["logs/captioner_2.jsonl", "capfilt_2"])
def test_a_second_round_that_was_killed_ends_with_the_same_models(
    sign: str, done_twice: tuple[Path, dict[str, Any]], data: BootstrapData, tmp_path: Path
) -> None:
    whole, results = done_twice
    out = killed(TWICE, data, tmp_path, sign)
    assert numbers(bootstrap(TWICE, data, out, has_ablation=True)) == numbers(results)
    # It tells of the weights of all models and the checksums of all data.
    assert (out / "lineage.json").read_bytes() == (whole / "lineage.json").read_bytes()


def killed(recipe: BootstrapRecipe, data: BootstrapData, folder: Path, sign: str) -> Path:
    """Run a loop, kill its process when a file or folder appears, and return its folder."""
    path, out = folder / "recipe.yaml", folder / "out"
    path.write_text(dump_recipe(recipe))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(data.web.parent), str(path), str(out)],
        stderr=subprocess.DEVNULL,
    )
    while not (out / sign).exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "results.json").exists()
    return out
