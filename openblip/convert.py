"""Released BLIP checkpoints and transformers' BLIP folders -> our folder, and ours -> transformers.

Nothing is lost silently: what our model has no place for is counted by reason; what is missing,
extra, of another shape or not as equal as it should be is an error that lists it.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from openblip import convert_official, convert_transformers
from openblip.checkpoint import (
    Model,
    check_is_free,
    load_checkpoint,
    model_id,
    pipeline_tag,
    roles_of,
    save_checkpoint,
    with_roles,
)
from openblip.convert_official import OfficialKind, official_config
from openblip.convert_transformers import ROLES_OF, Architecture
from openblip.convert_vocabulary import read_vocabulary, words_of
from openblip.convert_weights import (
    foreign_shapes,
    from_official,
    listing,
    nlvr_names,
    official_names,
    read_tensors,
    reason_to_leave_out,
    tied_names,
    tied_vqa_names,
    to_official,
    transformers_names,
    transformers_vqa_names,
    vqa_names,
)
from openblip.data.sinks import write_json_atomically
from openblip.models.blip import INITIAL_TEMPERATURE, Blip
from openblip.models.nlvr import Nlvr
from openblip.models.text import Role
from openblip.models.vqa import Vqa, VqaConfig
from openblip.tokenizer import Tokenizer

__all__ = [
    "ConversionReport", "Converted", "convert_to_openblip", "convert_to_transformers",
    "from_official", "official_config", "official_names", "read_foreign", "to_official",
]  # fmt: skip

M = TypeVar("M", Blip, Nlvr, Vqa)

HEADS = ("image_projection", "text_projection", "match_head")


@dataclass(frozen=True)
class ConversionReport:
    """What became of a model.

    kind      what it was: one of the released kinds, or transformers' architecture
    left_out  reason -> number of tensors
    notes     what a user must know, in sentences
    """

    kind: OfficialKind | Architecture | Literal["BlipForQuestionAnswering"]
    roles: tuple[Role, ...]
    num_parameters: int
    left_out: Mapping[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Converted(Generic[M]):
    """A model in memory, in eval mode, with its tokenizer."""

    model: M
    tokenizer: Tokenizer
    report: ConversionReport


def convert_to_openblip(
    source: Path, folder: Path, *, config: Path | None = None, vocabulary: Path | None = None
) -> ConversionReport:
    """Write a model that is not ours as our folder; the arguments are those of `read_foreign`.

    Raises ValueError as `read_foreign` does, and if `folder` exists.
    """
    check_is_free(folder)
    converted = read_foreign(source, config=config, vocabulary=vocabulary)
    card = _card(folder.name, source.name, converted.model, converted.report, "openblip")
    save_checkpoint(folder, converted.model, converted.tokenizer, card)
    return converted.report


def read_foreign(
    source: Path, *, config: Path | None = None, vocabulary: Path | None = None
) -> Converted[Blip] | Converted[Nlvr] | Converted[Vqa]:
    """Read a model that is not ours.

    source      released checkpoint (.pth, .safetensors) or transformers folder
    config      of a checkpoint, see `official_config`; by default a file of that name beside the
                weights, else the sizes are the tensors' and the heads those of the released models
    vocabulary  BERT's vocab.txt or a tokenizer.json; by default the one beside the weights
    Raises ValueError for what is absent, unknown or does not fit, listing it.
    """
    if not source.is_dir():
        return _read_official(source, config, vocabulary)
    if config is not None:
        raise ValueError(f"{source} has a config.json of its own: leave {config} out")
    if convert_transformers.answers_questions(convert_transformers.read_config(source)):
        return read_transformers_vqa(source, vocabulary)
    return read_transformers(source, vocabulary)


def read_transformers(folder: Path, vocabulary: Path | None = None) -> Converted[Blip]:
    """Read a transformers folder, as `read_foreign` does."""
    values = convert_transformers.read_config(folder)
    tensors = convert_transformers.read_weights(folder)
    kind = convert_transformers.architecture_of(tensors)
    # Words that were added later are in tokenizer.json alone.
    tokenizer = read_vocabulary(vocabulary, folder, ("tokenizer.json", "vocab.txt"))
    sizes = convert_transformers.config_from_transformers(values, ROLES_OF[kind], tokenizer.special)
    temperature = convert_transformers.temperature_of(values)
    notes = convert_transformers.notes_on(values, ROLES_OF[kind])
    names = transformers_names(sizes)
    model = _without_memory(lambda: Blip(sizes))
    tied = tied_names(sizes)
    return _assemble(folder, kind, tensors, model, names, tied, tokenizer, temperature, notes)


def read_transformers_vqa(folder: Path, vocabulary: Path | None = None) -> Converted[Vqa]:
    """Read a transformers folder of a BlipForQuestionAnswering, as `read_foreign` does."""
    values, roles = convert_transformers.read_config(folder), frozenset[Role]({"pair", "decode"})
    tokenizer = read_vocabulary(vocabulary, folder, ("tokenizer.json", "vocab.txt"))
    sizes = convert_transformers.config_from_transformers(values, roles, tokenizer.special)
    config = VqaConfig.from_text(sizes.vision, sizes.text, sizes.tokens)
    return _assemble(
        folder,
        "BlipForQuestionAnswering",
        convert_transformers.read_weights(folder),
        _without_memory(lambda: Vqa(config)),
        transformers_vqa_names(config),
        tied_vqa_names(),
        tokenizer,
        None,
        convert_transformers.notes_on(values, roles),
    )


def convert_to_transformers(
    folder: Path, target: Path, *, architecture: Architecture | None = None
) -> ConversionReport:
    """Write our folder as a transformers folder with its processor; it appears whole.

    architecture  by default the one that has the model's roles; a model with all roles has two
    Raises ValueError if no architecture has the roles, and if `target` exists.
    """
    check_is_free(target)
    blip, tokenizer = load_checkpoint(folder)
    if architecture is None:
        fitting = [choice for choice, roles in ROLES_OF.items() if roles == blip.config.text.roles]
        architecture = fitting[0] if fitting else None
    if architecture is None:
        choices = [f"{name} ({', '.join(sorted(roles))})" for name, roles in ROLES_OF.items()]
        raise ValueError(
            f"the model has the roles {', '.join(sorted(blip.config.text.roles))}: "
            f"choose an architecture, {' or '.join(choices)}"
        )
    part = with_roles(blip, ROLES_OF[architecture])
    tensors = to_official(part.state_dict(), transformers_names(part.config))
    num_left_out = len(blip.state_dict()) - len(part.state_dict())
    temperature, notes = None, []
    if architecture == "BlipForImageTextRetrieval":
        temperature = part.temperature.item()
        notes = [
            "transformers has no temperature: it stands in config.json for the way back",
            "transformers judges pairs with [CLS] first: put [ENC] at position 0 of input_ids for "
            "openblip's match probabilities",
        ]
    report = _report(
        architecture, part, {"of other roles": num_left_out} if num_left_out else {}, notes
    )
    files = convert_transformers.processor_files(part.config)
    files["config.json"] = convert_transformers.config_to_transformers(
        part.config, architecture, temperature
    )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        # Pieces of a stacked tensor are views; safetensors wants each to own its memory.
        owned = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(owned, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, values in files.items():
            write_json_atomically(temporary / name, values)
        tokenizer.save(temporary / "tokenizer.json")
        words = "\n".join(words_of(temporary / "tokenizer.json"))
        (temporary / "vocab.txt").write_text(words + "\n", encoding="utf-8")
        card = _card(target.name, folder.name, part, report, "transformers")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _read_official(
    source: Path, config: Path | None, vocabulary: Path | None
) -> Converted[Blip] | Converted[Nlvr] | Converted[Vqa]:
    tensors = read_tensors(source)
    kind = convert_official.official_kind(tensors)
    # Beside a released checkpoint lies BERT's vocabulary under its authors' name.
    tokenizer = read_vocabulary(vocabulary, source.parent, ("vocab.txt", "tokenizer.json"))
    beside = source.with_name("config.json")
    if config is None and beside.is_file() and "med_config" in beside.read_text("utf-8"):
        config = beside
    if config is None:
        sizes = convert_official.config_from_tensors(tensors, tokenizer.special)
        notes = [
            "sizes from the tensors, heads by the released models' rule of width / "
            f"{convert_official.HEAD_WIDTH}: {sizes.vision.num_heads} for images, "
            f"{sizes.text.num_heads} for text"
        ]
    else:
        sizes = convert_official.read_official_config(config)
        notes = [f"sizes from {config.name}"]
    sizes = sizes.with_roles(convert_official.roles_of(kind))
    if kind == "nlvr":
        nlvr_config = convert_official.nlvr_config(sizes, tensors)
        nlvr, names = _without_memory(lambda: Nlvr(nlvr_config)), nlvr_names(nlvr_config)
        return _assemble(source, kind, tensors, nlvr, names, {}, tokenizer, None, notes)
    if kind == "vqa":
        config_of_both = VqaConfig.from_text(sizes.vision, sizes.text, sizes.tokens)
        vqa, names = _without_memory(lambda: Vqa(config_of_both)), vqa_names(config_of_both)
        tied = tied_vqa_names()
        return _assemble(source, kind, tensors, vqa, names, tied, tokenizer, None, notes)
    names = official_names(sizes)
    if kind in {"itm", "base"}:
        del names["temperature"]
        notes.append(f"no temperature in the checkpoint: it is the initial {INITIAL_TEMPERATURE}")
    if kind == "base":
        names = {ours: parts for ours, parts in names.items() if not ours.startswith(HEADS)}
        notes.append(
            "no projections and no matching head in the checkpoint: they are drawn anew, train "
            "them before comparing or matching"
        )
    return _assemble(
        source,
        kind,
        tensors,
        _without_memory(lambda: Blip(sizes)),
        names,
        tied_names(sizes),
        tokenizer,
        INITIAL_TEMPERATURE,
        notes,
    )


def _assemble(
    source: Path,
    kind: OfficialKind | Architecture | Literal["BlipForQuestionAnswering"],
    tensors: Mapping[str, Tensor],
    model: M,
    names: Mapping[str, Sequence[str]],
    tied: Mapping[str, str],
    tokenizer: Tokenizer,
    temperature: float | None,
    notes: Sequence[str],
) -> Converted[M]:
    """Fill the model, which has no memory yet, all tensors accounted for.

    names        what is read; other parameters start anew
    tied         repeated tensor -> the one that is read
    temperature  where none is read; None: the model has none
    """
    config = model.config
    if tokenizer.special != config.tokens or tokenizer.vocab_size != config.text.vocab_size:
        raise ValueError(
            f"{source} has {config.text.vocab_size} words and {config.tokens}, the vocabulary "
            f"{tokenizer.vocab_size} and {tokenizer.special}: give the one it was trained with"
        )
    kept, left_out = {}, Counter[str]()
    for name, tensor in tensors.items():
        if reason := reason_to_leave_out(name):
            left_out[reason] += 1
        else:
            kept[name] = tensor
    problems = []
    for repeat, name in tied.items():
        if repeat in kept and name not in kept:
            kept[name] = kept.pop(repeat)
        elif repeat in kept:
            left_out["tied duplicate"] += 1
            if not _equal(kept.pop(repeat), kept[name]):
                problems.append(f"{repeat} differs from {name}, to which it should be tied")
    own: Mapping[str, Tensor] = model.state_dict()
    shapes = foreign_shapes(own, names)
    problems += [f"missing {name}" for name in sorted(shapes.keys() - kept.keys())]
    problems += [f"extra {name}" for name in sorted(kept.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & kept.keys()):
        if tuple(kept[name].shape) != shapes[name]:
            problems.append(f"{name} is {tuple(kept[name].shape)}, expected {shapes[name]}")
        elif not kept[name].is_floating_point():
            problems.append(f"{name} is {kept[name].dtype}, expected numbers with a fraction")
    if problems:
        raise ValueError(f"{source}: {listing(problems)}")
    dtypes = sorted({str(tensor.dtype) for tensor in kept.values()} - {"torch.float32"})
    if dtypes:
        notes = [*notes, f"weights of {', '.join(dtypes)} became torch.float32"]
    values = from_official(kept, {ours: list(parts) for ours, parts in names.items()})
    generator = torch.Generator().manual_seed(0)
    for name in sorted(own.keys() - values.keys()):
        if name == "temperature" and temperature is not None:
            values[name] = torch.tensor(temperature)
        else:
            std = config.text.init_std if name.endswith(".weight") else 0.0
            values[name] = torch.zeros(own[name].shape).normal_(std=std, generator=generator)
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(values)
    return Converted(model, tokenizer, _report(kind, model, dict(left_out), notes))


def _without_memory(build: Callable[[], M]) -> M:
    with torch.device("meta"):
        return build()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _report(
    kind: OfficialKind | Architecture | Literal["BlipForQuestionAnswering"],
    model: Model,
    left_out: Mapping[str, int],
    notes: Sequence[str],
) -> ConversionReport:
    return ConversionReport(
        kind=kind,
        roles=tuple(roles_of(model)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        left_out=left_out,
        notes=tuple(notes),
    )


def _card(
    name: str,
    source: str,
    model: Model,
    report: ConversionReport,
    library: Literal["openblip", "transformers"],
) -> str:
    vision, text = model.config.vision, model.config.text
    left_out = [f"{number} tensors left out: {why}" for why, number in report.left_out.items()]
    lines = "\n".join(f"- {line}." for line in [*left_out, *report.notes])
    return f"""---
library_name: {library}
pipeline_tag: {pipeline_tag(model)}
tags: [blip]
---
# {name}

A BLIP converted by openblip from `{source}` ({report.kind}). Roles: {", ".join(report.roles)}.

| | |
|---|---|
| parameters | {report.num_parameters:,} |
| images | {vision.image_size_px} px in patches of {vision.patch_size_px} px |
| image encoder | {vision.num_layers} layers, {vision.num_heads} heads, width {vision.width} |
| text model | {text.num_layers} layers, {text.num_heads} heads, width {text.width} |
| vocabulary | {text.vocab_size:,} words |
| model id | `{model_id(model)}` |

## Conversion

{lines or "- Every tensor found its place."}

## Use and limits

Training data, evaluation, limits and licence are those of the source: see its own card.
"""
