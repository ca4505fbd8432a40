"""The settings of a CapFilt run, and how manifests tell of them."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from openblip.capfilt.images import ImageChecks
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.manifest import Manifest
from openblip.capfilt.models import Ensemble
from openblip.captions import DEFAULT_PROMPT
from openblip.config import Recipe
from openblip.data.shards import checksum
from openblip.data.writers import OutputKind
from openblip.generation import Decoding
from openblip.kernels import Precision


class CapfiltRecipe(Recipe):
    """How captions are written, judged and kept; the defaults are the paper's.

    prompts             every captioner writes captions for each of them
    captions_per_image  of each captioner, for each prompt
    ensemble            how several filters judge together, as of `Models.judge`
    images              which images are captioned at all
    predicate           `file.py:function` of the user: called with each `Sample`, it returns
                        whether the sample is wanted, or a text that says why not
    output              kind of the files with the kept captions
    unit_samples        most samples of a unit of work, where a table or a folder is cut into some
    unit_bytes          most bytes of a unit of work, where a tar shard is cut into some
    """

    decoding: Decoding = Decoding(method="nucleus", top_p=0.9)
    prompts: tuple[str, ...] = Field((DEFAULT_PROMPT,), min_length=1)
    captions_per_image: int = Field(1, ge=1)
    keep: KeepRule = KeepRule()
    ensemble: Ensemble = "mean"
    images: ImageChecks = ImageChecks()
    predicate: str | None = None
    output: OutputKind = "tar"
    unit_samples: int = Field(10_000, ge=1)
    unit_bytes: int = Field(4 << 30, ge=1)
    batch_size: int = Field(32, ge=1)
    dtype: Precision = "float32"
    seed: int = 42

    @model_validator(mode="after")
    def _has_as_many_captions(self) -> "CapfiltRecipe":
        most = {"greedy": 1, "beam": self.decoding.num_beams}.get(self.decoding.method)
        if most is not None and self.captions_per_image > most:
            raise ValueError(
                f"captions_per_image is {self.captions_per_image}, and {self.decoding.method} "
                f"decoding has {most}"
            )
        return self


def settings_of(recipe: CapfiltRecipe) -> dict[str, Any]:
    """Return what a manifest tells of a recipe: plain values, with the hash of the predicate."""
    settings = recipe.model_dump(mode="json")
    if recipe.predicate is not None:
        file = Path(recipe.predicate.rpartition(":")[0])
        settings["predicate"] += f"@{checksum(file)[:16] if file.is_file() else 'absent'}"
    return settings


def recipe_of(done: Manifest) -> CapfiltRecipe:
    """Return the recipe that a unit was done with."""
    settings = dict(done.settings)
    if settings["predicate"] is not None:
        settings["predicate"] = settings["predicate"].rpartition("@")[0]
    return CapfiltRecipe.model_validate_json(json.dumps(settings))
