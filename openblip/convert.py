"""Released BLIP weights <-> openblip's names.

The released checkpoints repeat every shared tensor under each name that uses it; openblip keeps it
once. Queries, keys and values are separate there and stacked here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from openblip.models.blip import BlipConfig

OFFICIAL_IGNORED = ("position_ids", "_m.", "image_queue", "text_queue", "queue_ptr", "ptr_queue")
"""Parts of official names that no model needs: buffers, momentum twins, queues."""


def _vision_names(num_layers: int) -> dict[str, str]:
    """Map our names of the image encoder to official ones; nothing is stacked here."""
    names = {
        "vision.class_token": "visual_encoder.cls_token",
        "vision.position_embedding": "visual_encoder.pos_embed",
        "vision.patch_weight": "visual_encoder.patch_embed.proj.weight",
        "vision.patch_bias": "visual_encoder.patch_embed.proj.bias",
    }
    modules = {"vision.norm": "visual_encoder.norm"}
    for i in range(num_layers):
        for ours, theirs in {
            "attention_norm": "norm1",
            "qkv": "attn.qkv",
            "output": "attn.proj",
            "mlp_norm": "norm2",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        }.items():
            modules[f"vision.layers.{i}.{ours}"] = f"visual_encoder.blocks.{i}.{theirs}"
    return names | _both(modules)


def _both(modules: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def _bert_parts(bert: str, config: BlipConfig, kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """Map our names of a MED, as one official BERT holds it, to the names that are stacked in them.

    bert   prefix of the official BERT
    kinds  which self-attention it holds: `bidirectional` or `causal`
    """
    names: dict[str, list[str]] = {
        "text.word_embedding.weight": [f"{bert}.embeddings.word_embeddings.weight"],
        "text.position_embedding.weight": [f"{bert}.embeddings.position_embeddings.weight"],
    }
    modules = {"text.embedding_norm": [f"{bert}.embeddings.LayerNorm"]}
    for i in range(config.text.num_layers):
        ours, theirs = f"text.layers.{i}", f"{bert}.encoder.layer.{i}"
        for kind in kinds:
            attention = f"{theirs}.attention"
            modules[f"{ours}.{kind}.qkv"] = [
                f"{attention}.self.{part}" for part in ("query", "key", "value")
            ]
            modules[f"{ours}.{kind}.output.linear"] = [f"{attention}.output.dense"]
            modules[f"{ours}.{kind}.output.norm"] = [f"{attention}.output.LayerNorm"]
        if config.text.has_cross:
            cross = f"{theirs}.crossattention"
            modules[f"{ours}.cross.query"] = [f"{cross}.self.query"]
            modules[f"{ours}.cross.key_value"] = [f"{cross}.self.key", f"{cross}.self.value"]
            modules[f"{ours}.cross.output.linear"] = [f"{cross}.output.dense"]
            modules[f"{ours}.cross.output.norm"] = [f"{cross}.output.LayerNorm"]
        modules[f"{ours}.up"] = [f"{theirs}.intermediate.dense"]
        modules[f"{ours}.down.linear"] = [f"{theirs}.output.dense"]
        modules[f"{ours}.down.norm"] = [f"{theirs}.output.LayerNorm"]
    for ours, parts in modules.items():
        for suffix in ("weight", "bias"):
            names[f"{ours}.{suffix}"] = [f"{part}.{suffix}" for part in parts]
    return names


def official_names(
    config: BlipConfig, *, encoder: str = "text_encoder", decoder: str = "text_decoder"
) -> dict[str, list[str]]:
    """Map every parameter of `config`'s model to the official tensors that it stacks.

    encoder, decoder  official prefixes of the two BERTs
    Returns           our name -> official names, stacked along the first axis
    """
    roles = config.text.roles
    names = {k: [v] for k, v in _vision_names(config.vision.num_layers).items()}
    if "decode" in roles:
        names |= _bert_parts(f"{decoder}.bert", config, ("causal",))
        head = f"{decoder}.cls.predictions"
        names["text.lm_head.bias"] = [f"{head}.bias"]
        for suffix in ("weight", "bias"):
            names[f"text.lm_head.linear.{suffix}"] = [f"{head}.transform.dense.{suffix}"]
            names[f"text.lm_head.norm.{suffix}"] = [f"{head}.transform.LayerNorm.{suffix}"]
    if config.text.has_bidirectional:
        names |= _bert_parts(encoder, config, ("bidirectional",))
    if "text" in roles:
        names["temperature"] = ["temp"]
        names |= {
            k: [v]
            for k, v in _both(
                {"image_projection": "vision_proj", "text_projection": "text_proj"}
            ).items()
        }
    if "pair" in roles:
        names |= {k: [v] for k, v in _both({"match_head": "itm_head"}).items()}
    return names


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
