"""From a loop's last model back to all data that it was given."""

import json
from pathlib import Path
from typing import Any

import pytest

from openblip.capfilt.bootstrap import BootstrapRecipe
from openblip.capfilt.lineage import Made, lineage
from openblip.capfilt.manifest import Manifest, manifests
from openblip.capfilt.models import Models
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.shard import process_shard
from openblip.checkpoint import image_encoder_id, model_id, save_checkpoint
from openblip.data.samples import Caption, Sample
from openblip.data.shards import checksum
from openblip.data.sinks import ShardWriter
from openblip.generation import Decoding
from openblip.tokenizer import Tokenizer
from tests.capfilt.conftest import build, picture

MADE = (
    Made("tokenizer.json", "tokenizer", ("web", "human"), ("vocab_size",)),
    Made("base", "model", ("web", "human", "tokenizer.json"), ("pretrain",)),
    Made("capfilt", "data", ("web", "base"), ("capfilt",)),
    Made("bootstrapped", "model", ("capfilt", "human", "tokenizer.json"), ("pretrain",)),
    Made("evaluation/new.json", "evaluation", ("bootstrapped", "test"), ("evaluation.prompt",)),
)


def write_loop(folder: Path, models: Models, tokenizer: Tokenizer) -> dict[str, Path]:
    """Write what a loop leaves, with two shards of web; return the data that it was given."""
    given = {name: folder / "data" / name for name in ("web", "human", "test")}
    for number, path in enumerate(given.values()):
        for name in "ab" if number == 0 else "a":
            with ShardWriter(path / f"{name}.tar") as writer:
                writer.write(Sample(f"{name}1", picture(number), (Caption("a blue dog"),)))
    tokenizer.save(folder / "tokenizer.json")
    for seed, name in enumerate(("base", "bootstrapped")):
        save_checkpoint(folder / name, build(tokenizer, "pair", 16, seed), tokenizer, "")
    decoding = Decoding(method="nucleus", min_tokens=1, max_tokens=5)
    for name in "ab":
        recipe = CapfiltRecipe(decoding=decoding, prompts=("a ",))
        process_shard(given["web"] / f"{name}.tar", folder / "capfilt", models, recipe)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "new.json").write_text("{}")
    return given


@pytest.fixture
def told(tmp_path: Path, models: Models, tokenizer: Tokenizer) -> dict[str, Any]:
    given = write_loop(tmp_path, models, tokenizer)
    return lineage(tmp_path, BootstrapRecipe(), given, MADE)


def test_a_model_leads_back_to_every_input(told: dict[str, Any]) -> None:
    artifacts = told["artifacts"]

    def ancestors(name: str) -> set[str]:
        return {name}.union(*map(ancestors, artifacts[name]["inputs"]))

    assert ancestors("bootstrapped") == {
        "bootstrapped", "capfilt", "base", "tokenizer.json", "web", "human",
    }  # fmt: skip
    assert ancestors("evaluation/new.json") == artifacts.keys()
    for name, artifact in artifacts.items():
        assert artifact["inputs"] or artifact["kind"] == "input", name
        for part in artifact["recipe"]:
            values = told["recipe"]
            for key in part.split("."):
                values = values[key]


def test_what_is_told_identifies_the_content(
    tmp_path: Path, told: dict[str, Any], tokenizer: Tokenizer
) -> None:
    artifacts = told["artifacts"]
    for seed, name in enumerate(("base", "bootstrapped")):
        blip = build(tokenizer, "pair", 16, seed)
        assert artifacts[name]["model_id"] == model_id(blip)
        assert artifacts[name]["image_encoder_id"] == image_encoder_id(blip)
    done = [Manifest.read(path) for path in manifests(tmp_path / "capfilt")]
    units = artifacts["capfilt"]["units"]
    assert list(units) == ["a", "b"]
    for unit, manifest in zip(units.values(), done, strict=True):
        assert unit["output_checksum"] == manifest.output_checksum
        assert unit["input_checksum"] == manifest.input_checksum
        assert (unit["captioner"], unit["filter"]) == (manifest.captioner, manifest.filter)
    assert artifacts["capfilt"]["keep"] == done[0].settings["keep"]
    assert artifacts["web"]["shards"] == [
        {
            "name": f"{name}.tar",
            "num_bytes": (tmp_path / "data" / "web" / f"{name}.tar").stat().st_size,
            "checksum": checksum(tmp_path / "data" / "web" / f"{name}.tar"),
        }
        for name in "ab"
    ]
    [shard] = artifacts["human"]["shards"]
    assert shard.keys() == {"name", "num_bytes"}  # CapFilt has not read it
    assert artifacts["tokenizer.json"]["checksum"] == checksum(tmp_path / "tokenizer.json")


def test_it_tells_the_same_wherever_the_loop_lies(
    tmp_path: Path, told: dict[str, Any], models: Models, tokenizer: Tokenizer
) -> None:
    elsewhere = tmp_path / "elsewhere"
    given = write_loop(elsewhere, models, tokenizer)
    again = lineage(elsewhere, BootstrapRecipe(), given, MADE)
    assert json.dumps(again) == json.dumps(told)
    assert str(tmp_path) not in json.dumps(told)


def test_shards_of_one_name_are_told_apart_by_the_units_alone(
    tmp_path: Path, models: Models, tokenizer: Tokenizer
) -> None:
    given = write_loop(tmp_path, models, tokenizer)
    with ShardWriter(tmp_path / "data" / "more" / "a.tar") as writer:
        writer.write(Sample("c", picture(9), (Caption("a blue dog"),)))
    several = f"{tmp_path}/data/{{web,more}}"
    told = lineage(tmp_path, BootstrapRecipe(), {**given, "web": several}, MADE)
    shards = told["artifacts"]["web"]["shards"]
    assert [(shard["name"], "checksum" in shard) for shard in shards] == [
        ("a.tar", False), ("b.tar", True), ("a.tar", False),
    ]  # fmt: skip
