"""Where every model and data folder of a loop comes from, back to the data that it was given.

`lineage.json` names for each of them what it was made from and by which part of the recipe, with
what tells its content from another's: hashes of weights, checksums of samples. The same loop on the
same data gives the same bytes, wherever it lies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openblip import __version__
from openblip.capfilt.manifest import Manifest, manifests
from openblip.checkpoint import image_encoder_id, load_checkpoint, model_id
from openblip.config import Recipe
from openblip.data.shards import Shard, checksum
from openblip.data.sources import Address, list_shards

Kind = Literal["tokenizer", "model", "data", "evaluation"]


@dataclass(frozen=True)
class Made:
    """One thing that a loop made.

    name    of its file or folder, in the loop's folder
    inputs  names of what it was made from: things made before, or data sets that were given
    recipe  the parts of the loop's recipe that say how
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    recipe: tuple[str, ...]


def lineage(
    out: Path, recipe: Recipe, given: Mapping[str, Address], made: Sequence[Made]
) -> dict[str, Any]:
    """Return where all that a loop made in `out` comes from, in plain values.

    given  data sets by name
    made   all of it, in the order in which it was made
    Returns  `version` of openblip, `recipe`, and `artifacts` by name. All have their `kind` and
             `inputs`. A data set that was given (`input`) has its shards with names, sizes in
             bytes (None of a remote one) and, where CapFilt has read it, checksums. A model has
             `model_id` and `image_encoder_id`; a data folder its rule of what is kept, and the
             checksums of every unit's input and output; a file its checksum
    Raises ValueError for a model that cannot be loaded, and a manifest that cannot be read.
    """
    artifacts: dict[str, Any] = {}
    checksums: dict[str, str] = {}
    for name, address in given.items():
        artifacts[name] = {"kind": "input", "inputs": [], "recipe": []}
        artifacts[name]["shards"] = [
            {"name": shard.name, "num_bytes": shard.num_bytes} for shard in list_shards(address)
        ]
    for one in made:
        assert artifacts.keys() >= set(one.inputs), one
        path = out / one.name
        what: dict[str, Any]
        match one.kind:
            case "model":
                blip, _ = load_checkpoint(path)
                what = {"model_id": model_id(blip), "image_encoder_id": image_encoder_id(blip)}
            case "data":
                units = {path.stem: Manifest.read(path) for path in manifests(path)}
                checksums |= {Shard.at(u.shard).name: u.input_checksum for u in units.values()}
                what = {
                    "keep": next((unit.settings["keep"] for unit in units.values()), None),
                    "units": {name: _unit(unit) for name, unit in units.items()},
                }
            case _:
                what = {"checksum": checksum(path)}
        artifacts[one.name] = {
            "kind": one.kind, "inputs": list(one.inputs), "recipe": list(one.recipe), **what,
        }  # fmt: skip
    _add_checksums(artifacts, given, made, checksums)
    return {
        "version": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "artifacts": artifacts,
    }


def _unit(done: Manifest) -> dict[str, Any]:
    return {
        "shard": Shard.at(done.shard).name,
        "part": done.part,
        "num_parts": done.num_parts,
        "input_checksum": done.input_checksum,
        "output_checksum": done.output_checksum,
        "captioner": done.captioner,
        "filter": done.filter,
        "version": done.version,
    }


def _add_checksums(
    artifacts: Mapping[str, Any],
    given: Mapping[str, Address],
    made: Sequence[Made],
    checksums: Mapping[str, str],
) -> None:
    """Add the checksums of shards that data folders were made from, where a name tells which."""
    read = {name for one in made if one.kind == "data" for name in one.inputs}
    for name in read & given.keys():
        shards = artifacts[name]["shards"]
        times = Counter(shard["name"] for shard in shards)
        for shard in shards:
            if times[shard["name"]] == 1 and shard["name"] in checksums:
                shard["checksum"] = checksums[shard["name"]]
