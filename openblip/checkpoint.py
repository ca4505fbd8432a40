"""A checkpoint is a folder: config.json, model.safetensors, tokenizer.json and README.md.

A training run leaves one, with the recipe in its model card, and its losses in a file beside it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from openblip.config import Recipe, dump_recipe
from openblip.data.sinks import write_json_atomically
from openblip.models.blip import Blip, BlipConfig
from openblip.models.nlvr import Nlvr, NlvrConfig
from openblip.models.text import Med, Role
from openblip.models.vision import resize_position_embedding
from openblip.models.vqa import Vqa, VqaConfig
from openblip.tokenizer import Tokenizer
from openblip.training.distributed import world
from openblip.training.log import read_log
from openblip.training.state import TrainingFiles

FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")
CALIBRATION = "calibration.json"
"""A filter's temperature, which `openblip capfilt calibrate --save` puts beside them."""

# What a checkpoint can hold.
Model = Blip | Nlvr | Vqa
C = TypeVar("C")
M = TypeVar("M", Blip, Nlvr, Vqa)

_POSITIONS = "vision.position_embedding"


@dataclass(frozen=True)
class Initialised:
    """A model that starts from another's weights, and the tensors that are not as they were."""

    blip: Blip
    left_out: tuple[str, ...]
    resized: tuple[str, ...]

    def notes(self) -> list[str]:
        """Return sentences that name every tensor left out or resized."""
        said = {"left out": self.left_out, "resized": self.resized}
        return [
            f"tensors {what} ({len(names)}): {', '.join(names)}"
            for what, names in said.items()
            if names
        ]


def save_checkpoint(folder: str | Path, model: Model, tokenizer: Tokenizer, card: str) -> None:
    """Write a model, its tokenizer and its model card (Markdown); the folder appears whole.

    Raises ValueError if something is there already.
    """
    folder = Path(folder)
    check_is_free(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json_atomically(temporary / "config.json", model.config.to_json())
        tokenizer.save(temporary / "tokenizer.json")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_checkpoint(folder: Path, model: Model, tokenizer: Tokenizer, card: str) -> None:
    """Write a model as `save_checkpoint` does, in place of what is there."""
    new, old = (folder.with_name(f"{folder.name}.{which}") for which in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    save_checkpoint(new, model, tokenizer, card)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_is_free(folder: Path) -> None:
    """Raise ValueError if something is there already, so that a long run finds out early."""
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another name or remove it")


def load_checkpoint(folder: str | Path) -> tuple[Blip, Tokenizer]:
    """Read a folder strictly; the model is in eval mode.

    Raises ValueError for a model of another task, and listing files that are absent, and weights
    that are missing, extra or of another shape.
    """
    return _load(folder, None, BlipConfig.from_json, Blip)


def load_nlvr_checkpoint(folder: str | Path) -> tuple[Nlvr, Tokenizer]:
    """Read the folder of a model for NLVR2, as `load_checkpoint` does."""
    return _load(folder, "nlvr", NlvrConfig.from_json, Nlvr)


def load_vqa_checkpoint(folder: str | Path) -> tuple[Vqa, Tokenizer]:
    """Read the folder of a model for VQA, as `load_checkpoint` does."""
    return _load(folder, "vqa", VqaConfig.from_json, Vqa)


def _load(
    folder: str | Path,
    task: str | None,
    read_config: Callable[[Mapping[str, Any]], C],
    build: Callable[[C], M],
) -> tuple[M, Tokenizer]:
    """Read a folder as `load_checkpoint` does; a Blip's `config.json` names no task."""
    folder = Path(folder)
    absent = [name for name in FILES[:3] if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} is no checkpoint: it lacks {', '.join(absent)}")
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
        found = values.pop("task", None)
        if found != task:
            raise ValueError(f"a model for {found or 'no task'}, expected {task or 'no task'}")
        config = read_config(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'}: {error}") from error
    model = build(config)
    own = model.state_dict()
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"extra {name}" for name in sorted(tensors.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise ValueError(f"{folder / 'model.safetensors'}: {'; '.join(problems)}")
    model.load_state_dict(tensors)
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a vocabulary: a `tokenizer.json`, a BERT `vocab.txt` or the one of a checkpoint folder.

    Raises ValueError if there is none that fits.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.suffix == ".json":
        try:
            return Tokenizer.load(path)
        except ValueError:
            raise
        except Exception as error:  # `tokenizers` has no class of its own for a broken file
            raise ValueError(f"{path} is no tokenizer: {error}") from error
    if not path.is_file():
        raise ValueError(f"no vocabulary at {path}")
    try:
        # Not `splitlines`: it would also break at separators that are words of some vocabularies.
        return Tokenizer.from_vocabulary(path.read_text("utf-8").rstrip("\n").split("\n"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def with_roles(blip: Blip, roles: frozenset[Role]) -> Blip:
    """Return a copy that plays some of a model's roles, as fine-tuning starts from.

    Raises ValueError for a role that the model does not have.
    """
    if not roles <= blip.config.text.roles:
        raise ValueError(
            f"roles {sorted(roles)}: the model has {', '.join(sorted(blip.config.text.roles))}"
        )
    part = Blip(blip.config.with_roles(roles))
    own = blip.state_dict()
    part.load_state_dict({name: own[name] for name in part.state_dict()})
    return part


def initialise_from(
    blip: Blip, roles: frozenset[Role], image_size_px: int | None = None
) -> Initialised:
    """Return the model that fine-tuning starts from; nowhere else are positions resized.

    image_size_px   side of its images; None keeps that of `blip`
    Raises ValueError as `with_roles` does, and for a size that the patches do not divide.
    """
    part = with_roles(blip, roles)
    left_out = tuple(sorted(blip.state_dict().keys() - part.state_dict().keys()))
    vision = part.config.vision
    if image_size_px is None or image_size_px == vision.image_size_px:
        return Initialised(part, left_out, ())
    vision = replace(vision, image_size_px=image_size_px)
    tensors = part.state_dict()
    tensors[_POSITIONS] = resize_position_embedding(tensors[_POSITIONS], vision.num_patches)
    resized = Blip(replace(part.config, vision=vision))
    resized.load_state_dict(tensors)
    return Initialised(resized, left_out, (_POSITIONS,))


def save_run(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    recipe: Recipe,
    what: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Save what a run trained, the recipe in its card, and return what came out in plain values.

    What the training went on from is removed. Of several ranks the first saves, and returns.

    what    the training, in a word or two
    notes   what else a user of the model must know, in sentences
    """
    if not world().is_first:
        world().wait()
        return {}
    roles = roles_of(model)
    files = TrainingFiles.beside(folder)
    logged = read_log(files.log)
    result: dict[str, Any] = {
        "folder": str(folder),
        "log": str(files.log),
        "model_id": model_id(model),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "roles": roles,
        "notes": list(notes),
        "last_step": logged.losses[-1],
    }
    evaluated = "It has been evaluated on nothing yet."
    if logged.evaluations:
        best = max(logged.evaluations, key=lambda line: line["criterion"])
        result["last_evaluation"] = logged.evaluations[-1]
        result["best"] = {"folder": str(files.best), **best}
        evaluated = f"On the data of the recipe's `evaluation`: {logged.evaluations[-1]}."
    lines = "".join(f"- {note}.\n" for note in notes)
    card = f"""---
library_name: openblip
pipeline_tag: {pipeline_tag(model)}
tags: [blip]
---
# {folder.name}

A BLIP of {result["num_parameters"]:,} parameters for images of \
{model.config.vision.image_size_px} px, made by openblip's {what}. Roles: {", ".join(roles)}. \
Model id `{result["model_id"]}`.

{lines}
## Recipe

```yaml
{dump_recipe(recipe)}```

Losses at the last logged step: {result["last_step"]}.

## Use and limits

What it knows is what its data say: see the recipe's `data`. {evaluated}
"""
    save_checkpoint(folder, model, tokenizer, card)
    files.remove_state()
    world().wait()
    return result


def roles_of(model: Model) -> list[Role]:
    """Return the roles that a model's MEDs play, sorted."""
    meds = [module for module in model.modules() if isinstance(module, Med)]
    return sorted({role for med in meds for role in med.config.roles})


def pipeline_tag(model: Model) -> str:
    """Return what the Hugging Face Hub calls a model's task."""
    match model:
        case Vqa():
            return "visual-question-answering"
        case Blip() if model.config.text.roles == {"decode"}:
            return "image-to-text"
        case _:
            return "image-feature-extraction"


def model_id(model: Model) -> str:
    """Return a 16-digit hash of the weights, names and configuration."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(model.config.to_json(), sort_keys=True).encode())
    _hash_weights(digest, model)
    return digest.hexdigest()


def image_encoder_id(blip: Blip) -> str:
    """Return a 16-digit hash of the image encoder alone: models that share it encode alike."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(blip.config.to_json()["vision"], sort_keys=True).encode())
    _hash_weights(digest, blip.vision)
    return digest.hexdigest()


def _hash_weights(digest: hashlib.blake2b, module: nn.Module) -> None:
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
