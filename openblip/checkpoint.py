"""A checkpoint is a folder: config.json, model.safetensors, tokenizer.json and README.md."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from openblip.data.sinks import write_json_atomically
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import Role
from openblip.tokenizer import Tokenizer

FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


def save_checkpoint(folder: str | Path, blip: Blip, tokenizer: Tokenizer, card: str) -> None:
    """Write a model, its tokenizer and its model card (Markdown); the folder appears whole.

    Raises ValueError if something is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another name or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        tensors = {name: value.contiguous() for name, value in blip.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json_atomically(temporary / "config.json", blip.config.to_json())
        tokenizer.save(temporary / "tokenizer.json")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(folder: str | Path) -> tuple[Blip, Tokenizer]:
    """Read a folder strictly; the model is in eval mode.

    Raises ValueError listing files that are absent, and weights that are missing, extra or of
    another shape.
    """
    folder = Path(folder)
    absent = [name for name in FILES[:3] if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} is no checkpoint: it lacks {', '.join(absent)}")
    try:
        config = BlipConfig.from_json(json.loads((folder / "config.json").read_text("utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    try:
        tensors = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'}: {error}") from error
    blip = Blip(config)
    own = blip.state_dict()
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"extra {name}" for name in sorted(tensors.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise ValueError(f"{folder / 'model.safetensors'}: {'; '.join(problems)}")
    blip.load_state_dict(tensors)
    return blip.eval(), Tokenizer.load(folder / "tokenizer.json")


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


def model_id(blip: Blip) -> str:
    """Return a 16-digit hash of the weights, names and configuration."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(blip.config.to_json(), sort_keys=True).encode())
    for name, tensor in sorted(blip.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
