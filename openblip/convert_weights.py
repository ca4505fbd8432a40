"""Weights of other BLIPs: reading their files, and their names for our parameters.

The released checkpoints and transformers' folders repeat every shared tensor under each name that
uses it; openblip keeps it once. Queries, keys and values of their text models are separate, ours
are stacked.
"""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openblip.models.blip import BlipConfig
from openblip.models.nlvr import NlvrConfig
from openblip.models.text import MedConfig
from openblip.models.vqa import VqaConfig

QUEUES = {"image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue"}

_OFFICIAL_VISION = {
    "class_token": "visual_encoder.cls_token",
    "position_embedding": "visual_encoder.pos_embed",
    "patch_weight": "visual_encoder.patch_embed.proj.weight",
    "patch_bias": "visual_encoder.patch_embed.proj.bias",
    "norm": "visual_encoder.norm",
    "layers": "visual_encoder.blocks",
    "attention_norm": "norm1",
    "qkv": "attn.qkv",
    "output": "attn.proj",
    "mlp_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
# The stacking of `qkv` and the order of its heads are the same in all three.
_TRANSFORMERS_VISION = {
    "class_token": "vision_model.embeddings.class_embedding",
    "position_embedding": "vision_model.embeddings.position_embedding",
    "patch_weight": "vision_model.embeddings.patch_embedding.weight",
    "patch_bias": "vision_model.embeddings.patch_embedding.bias",
    "norm": "vision_model.post_layernorm",
    "layers": "vision_model.encoder.layers",
    "attention_norm": "layer_norm1",
    "qkv": "self_attn.qkv",
    "output": "self_attn.projection",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a `.safetensors` file, or a file of torch.save that holds tensors and plain values.

    The tensors may lie under the key `model`, as in the released files.
    Raises ValueError for a file that cannot be read, or that pickles anything else.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from error
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, and loading that could run its "
            "code: get the weights as .safetensors, or from someone you trust"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values = values["model"]
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} holds no tensors by name")
    strangers = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(f"{path}: not tensors: {listing(strangers)}")
    return values


def listing(problems: list[str]) -> str:
    """Join the first eight problems and count the others."""
    rest = len(problems) - 8
    return "; ".join(problems[:8]) + (f"; and {rest} more" if rest > 0 else "")


def mlp_ratio_of(hidden: int, width: int) -> float:
    """Return the ratio for which int(width * ratio) is `hidden`, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def reason_to_leave_out(name: str) -> str | None:
    """Return why no model needs a tensor of a checkpoint, or None if one may."""
    top = name.partition(".")[0]
    if top in QUEUES:
        return "queue"
    if top.endswith("_m"):
        return "momentum twin"
    if name.endswith("position_ids"):
        return "position_ids buffer"
    return None


def official_names(
    config: BlipConfig, *, encoder: str = "text_encoder", decoder: str = "text_decoder"
) -> dict[str, list[str]]:
    """Map every parameter of `config`'s model to the official tensors that it stacks.

    encoder, decoder  official prefixes of the two BERTs
    Returns           our name -> official names, stacked along the first axis
    """
    roles = config.text.roles
    names = _vision_names(config.vision.num_layers, _OFFICIAL_VISION)
    if "decode" in roles:
        names |= _bert_parts(f"{decoder}.bert", config.text, "causal")
        names |= _lm_head_names(f"{decoder}.cls.predictions")
    if config.text.has_bidirectional:
        names |= _bert_parts(encoder, config.text, "bidirectional")
    if "text" in roles:
        names["temperature"] = ["temp"]
        names |= _both({"image_projection": ["vision_proj"], "text_projection": ["text_proj"]})
    if "pair" in roles:
        names |= _both({"match_head": ["itm_head"]})
    return names


def nlvr_names(config: NlvrConfig, *, encoder: str = "text_encoder") -> dict[str, list[str]]:
    """Map every parameter of an NLVR2 model as `official_names` does."""

    def cross_parts(layer: int, ours: str, theirs: str) -> dict[str, list[str]]:
        parts = {f"{ours}.norm": [f"{theirs}.output.LayerNorm"]}
        for number, side in enumerate(("first", "second")):
            attention = f"{theirs}.self{number}"
            parts[f"{ours}.{side}.query"] = [f"{attention}.query"]
            parts[f"{ours}.{side}.key_value"] = [f"{attention}.key", f"{attention}.value"]
            parts[f"{ours}.{side}_output"] = [f"{theirs}.output.dense{number}"]
        if layer >= config.first_merge_layer:
            parts[f"{ours}.merge"] = [f"{theirs}.output.merge_layer"]
        return parts

    names = _vision_names(config.vision.num_layers, _OFFICIAL_VISION)
    names |= _bert_parts(encoder, config.text, "bidirectional", cross_parts=cross_parts)
    return names | _both({f"classifier.{n}": [f"cls_head.{n}"] for n in (0, 2)})


def vqa_names(config: VqaConfig) -> dict[str, list[str]]:
    """Map every parameter of a VQA model as `official_names` does."""
    names = _vision_names(config.vision.num_layers, _OFFICIAL_VISION)
    names |= _bert_parts("text_encoder", config.question, "bidirectional", med="question")
    names |= _bert_parts("text_decoder.bert", config.answer, "causal", med="answer")
    return names | _lm_head_names("text_decoder.cls.predictions", med="answer")


def transformers_vqa_names(config: VqaConfig) -> dict[str, list[str]]:
    """Map our names to those of transformers' BlipForQuestionAnswering."""
    return vqa_names(config) | _vision_names(config.vision.num_layers, _TRANSFORMERS_VISION)


def tied_vqa_names() -> dict[str, str]:
    """Map as `tied_names` does, for a VQA model: its two BERTs share nothing."""
    head = "text_decoder.cls.predictions"
    word_embedding = "text_decoder.bert.embeddings.word_embeddings.weight"
    return {f"{head}.decoder.weight": word_embedding, f"{head}.decoder.bias": f"{head}.bias"}


def transformers_names(config: BlipConfig) -> dict[str, list[str]]:
    """Map our names to transformers' as `official_names` does; it has no temperature."""
    names = {
        ours: parts
        for ours, parts in official_names(config).items()
        if ours != "temperature" and not ours.startswith("vision.")
    }
    return names | _vision_names(config.vision.num_layers, _TRANSFORMERS_VISION)


def tied_names(config: BlipConfig) -> dict[str, str]:
    """Map every name of a repeated tensor to the one that is read, official or transformers'.

    Source: BLIP `tie_encoder_decoder_weights`, which ties all but the self-attentions.
    """
    if "decode" not in config.text.roles:
        return {}
    names, head = official_names(config), "text_decoder.cls.predictions"
    [word_embedding] = names["text.word_embedding.weight"]
    tied = {f"{head}.decoder.weight": word_embedding, f"{head}.decoder.bias": f"{head}.bias"}
    for ours, repeats in _bert_parts("text_decoder.bert", config.text, "causal").items():
        tied |= {a: b for a, b in zip(repeats, names[ours], strict=True) if a != b}
    return tied


def from_official(
    tensors: Mapping[str, Tensor], names: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Stack official tensors into ours. Raises ValueError listing what is missing."""
    missing = sorted({part for parts in names.values() for part in parts} - set(tensors))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")
    return {
        ours: torch.cat([tensors[part] for part in parts]) if len(parts) > 1 else tensors[parts[0]]
        for ours, parts in names.items()
    }


def foreign_shapes(
    own: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """Return the shape that each tensor must have that `from_official` stacks into ours."""
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, parts in names.items():
        shape = tuple(own[ours].shape)
        if len(parts) > 1:
            shape = (shape[0] // len(parts), *shape[1:])
        shapes |= dict.fromkeys(parts, shape)
    return shapes


def to_official(tensors: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """Split ours into official tensors, each once; the inverse of `from_official`."""
    official: dict[str, Tensor] = {}
    for ours, parts in names.items():
        for part, piece in zip(
            parts,
            tensors[ours].chunk(len(parts)) if len(parts) > 1 else [tensors[ours]],
            strict=True,
        ):
            official[part] = piece
    return official


def _vision_names(num_layers: int, table: Mapping[str, str]) -> dict[str, list[str]]:
    names = {
        f"vision.{ours}": [table[ours]]
        for ours in ("class_token", "position_embedding", "patch_weight", "patch_bias")
    }
    modules = {"vision.norm": [table["norm"]]}
    for i in range(num_layers):
        for ours in ("attention_norm", "qkv", "output", "mlp_norm", "up", "down"):
            modules[f"vision.layers.{i}.{ours}"] = [f"{table['layers']}.{i}.{table[ours]}"]
    return names | _both(modules)


def _one_image_parts(layer: int, ours: str, theirs: str) -> dict[str, list[str]]:
    """Map the modules of a layer's cross-attention."""
    return {
        f"{ours}.query": [f"{theirs}.self.query"],
        f"{ours}.key_value": [f"{theirs}.self.key", f"{theirs}.self.value"],
        f"{ours}.output.linear": [f"{theirs}.output.dense"],
        f"{ours}.output.norm": [f"{theirs}.output.LayerNorm"],
    }


def _bert_parts(
    bert: str,
    config: MedConfig,
    kind: Literal["bidirectional", "causal"],
    *,
    med: str = "text",
    cross_parts: Callable[[int, str, str], dict[str, list[str]]] = _one_image_parts,
) -> dict[str, list[str]]:
    """Map our names of a MED, as one official BERT holds it, to the names that are stacked in them.

    bert         prefix of the official BERT
    kind         which self-attention it holds
    med          our prefix of the MED
    cross_parts  modules of a layer's cross-attention, of its number and the two prefixes
    """
    names: dict[str, list[str]] = {
        f"{med}.word_embedding.weight": [f"{bert}.embeddings.word_embeddings.weight"],
        f"{med}.position_embedding.weight": [f"{bert}.embeddings.position_embeddings.weight"],
    }
    modules = {f"{med}.embedding_norm": [f"{bert}.embeddings.LayerNorm"]}
    for i in range(config.num_layers):
        ours, theirs = f"{med}.layers.{i}", f"{bert}.encoder.layer.{i}"
        attention = f"{theirs}.attention"
        modules[f"{ours}.{kind}.qkv"] = [
            f"{attention}.self.{part}" for part in ("query", "key", "value")
        ]
        modules[f"{ours}.{kind}.output.linear"] = [f"{attention}.output.dense"]
        modules[f"{ours}.{kind}.output.norm"] = [f"{attention}.output.LayerNorm"]
        if config.has_cross:
            modules |= cross_parts(i, f"{ours}.cross", f"{theirs}.crossattention")
        modules[f"{ours}.up"] = [f"{theirs}.intermediate.dense"]
        modules[f"{ours}.down.linear"] = [f"{theirs}.output.dense"]
        modules[f"{ours}.down.norm"] = [f"{theirs}.output.LayerNorm"]
    return names | _both(modules)


def _lm_head_names(head: str, *, med: str = "text") -> dict[str, list[str]]:
    modules = {
        f"{med}.lm_head.linear": [f"{head}.transform.dense"],
        f"{med}.lm_head.norm": [f"{head}.transform.LayerNorm"],
    }
    return {f"{med}.lm_head.bias": [f"{head}.bias"]} | _both(modules)


def _both(modules: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {
        f"{ours}.{suffix}": [f"{part}.{suffix}" for part in parts]
        for ours, parts in modules.items()
        for suffix in ("weight", "bias")
    }
