"""Released BLIP checkpoints: what kind one is, and which sizes it has."""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from openblip.convert_weights import listing, mlp_ratio_of
from openblip.models.blip import BlipConfig
from openblip.models.nlvr import FIRST_MERGE_LAYER, NlvrConfig
from openblip.models.text import ALL_ROLES, MedConfig, Role, SpecialTokens
from openblip.models.vision import VisionConfig

OfficialKind = Literal["pretrain", "caption", "retrieval", "itm", "base", "nlvr", "vqa"]
PARTS = frozenset({"text_encoder", "text_decoder", "vision_proj", "itm_head", "cls_head"})
HEAD_WIDTH = 64
_MERGE = re.compile(r"encoder\.layer\.(\d+)\.crossattention\.output\.merge_layer\.weight$")


def official_kind(names: Collection[str]) -> OfficialKind:
    """Return which of the released models has tensors of these names.

    Raises ValueError if none that can be converted has.
    """
    tops = {name.partition(".")[0] for name in names}
    match sorted(tops & PARTS):
        case ["itm_head", "text_decoder", "text_encoder", "vision_proj"]:
            return "pretrain"
        case ["text_decoder"]:
            return "caption"
        case ["itm_head", "text_encoder", "vision_proj"]:
            return "retrieval" if "temp" in tops else "itm"
        case ["text_encoder"]:
            return "base"
        case ["cls_head", "text_encoder"]:
            return "nlvr"
        case ["text_decoder", "text_encoder"]:
            return "vqa"
        case found:
            raise ValueError(
                f"a checkpoint with {', '.join(found) or 'none'} of {', '.join(sorted(PARTS))} is "
                "no pre-training, captioning, retrieval, ITM, base, NLVR2 or VQA model of BLIP"
            )


def roles_of(kind: OfficialKind) -> frozenset[Role]:
    match kind:
        case "pretrain":
            return ALL_ROLES
        case "caption":
            return frozenset({"decode"})
        case "retrieval" | "itm" | "base":
            return frozenset({"text", "pair"})
        case "nlvr":
            return frozenset({"pair"})
        case "vqa":
            return frozenset({"pair", "decode"})


def read_official_config(path: Path) -> BlipConfig:
    """Read a file of `official_config`'s values. Raises ValueError naming what is wrong."""
    try:
        return official_config(json.loads(path.read_text("utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def official_config(values: Mapping[str, Any]) -> BlipConfig:
    """Build a configuration with all roles from the constructor arguments of the original.

    values  image_size, vit (of its VisionTransformer), med_config (of its BERT), embed_dim and
            special_token_ids; other keys are other models' and are passed over
    Raises ValueError naming a key that is missing.
    """
    try:
        vit, med, ids = values["vit"], values["med_config"], values["special_token_ids"]
        return BlipConfig(
            vision=VisionConfig(
                image_size_px=values["image_size"],
                patch_size_px=vit["patch_size"],
                width=vit["embed_dim"],
                num_layers=vit["depth"],
                num_heads=vit["num_heads"],
                mlp_ratio=vit["mlp_ratio"],
                layer_norm_eps=vit["layer_norm_eps"],
            ),
            text=MedConfig(
                vocab_size=med["vocab_size"],
                width=med["hidden_size"],
                num_layers=med["num_hidden_layers"],
                num_heads=med["num_attention_heads"],
                ffn_width=med["intermediate_size"],
                max_positions=med["max_position_embeddings"],
                context_width=vit["embed_dim"],
                layer_norm_eps=med["layer_norm_eps"],
            ),
            tokens=SpecialTokens(
                pad=ids["pad"], cls=ids["cls"], sep=ids["sep"], dec=ids["dec_bos"], enc=ids["enc"]
            ),
            embedding_width=values["embed_dim"],
        )
    except KeyError as error:
        raise ValueError(f"the key {error} is missing") from error


def nlvr_config(config: BlipConfig, tensors: Mapping[str, Tensor]) -> NlvrConfig:
    """Add to the sizes of a model with the role `pair` in which layers NLVR2's tensors merge."""
    found = [_MERGE.search(name) for name in tensors]
    merging = [int(match[1]) for match in found if match]
    first = min(merging, default=max(FIRST_MERGE_LAYER, config.text.num_layers))
    return NlvrConfig(config.vision, config.text, config.tokens, first)


def config_from_tensors(tensors: Mapping[str, Tensor], tokens: SpecialTokens) -> BlipConfig:
    """Read every size from a checkpoint's tensors; the configuration has all roles.

    Heads leave no trace in a tensor; every released model has width / 64 of them.
    Raises ValueError for tensors that are missing or of another rank, and for other widths.
    """
    is_encoder = any(name.startswith("text_encoder.") for name in tensors)
    bert = "text_encoder" if is_encoder else "text_decoder.bert"
    blocks, layers = "visual_encoder.blocks", f"{bert}.encoder.layer"
    # The model of NLVR2 has two cross-attentions.
    is_nlvr = f"{layers}.0.crossattention.self0.key.weight" in tensors
    cross = f"{layers}.0.crossattention.{'self0' if is_nlvr else 'self'}"
    shapes = _shapes(
        tensors,
        {
            "visual_encoder.pos_embed": 3,
            "visual_encoder.patch_embed.proj.weight": 4,
            f"{blocks}.0.mlp.fc1.weight": 2,
            f"{bert}.embeddings.word_embeddings.weight": 2,
            f"{bert}.embeddings.position_embeddings.weight": 2,
            f"{layers}.0.intermediate.dense.weight": 2,
            f"{cross}.key.weight": 2,
        },
    )
    positions, patches, up, words, text_positions, text_up, key = shapes
    width, text_width = positions[2], words[1]
    for what, value in (("image encoder", width), ("text model", text_width)):
        if value % HEAD_WIDTH:
            raise ValueError(
                f"the {what} is {value} wide, not a multiple of {HEAD_WIDTH} as in the released "
                "models: give a configuration file, which states its number of heads"
            )
    projection = tensors.get("vision_proj.weight")
    return BlipConfig(
        vision=VisionConfig(
            image_size_px=math.isqrt(positions[1] - 1) * patches[3],
            patch_size_px=patches[3],
            width=width,
            num_layers=_num_layers(tensors, blocks),
            num_heads=width // HEAD_WIDTH,
            mlp_ratio=mlp_ratio_of(up[0], width),
        ),
        text=MedConfig(
            vocab_size=words[0],
            width=text_width,
            num_layers=_num_layers(tensors, layers),
            num_heads=text_width // HEAD_WIDTH,
            ffn_width=text_up[0],
            max_positions=text_positions[0],
            context_width=key[1],
        ),
        tokens=tokens,
        embedding_width=projection.shape[0] if projection is not None else 256,
    )


def _shapes(tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
    problems = [f"missing {name}" for name in ranks if name not in tensors]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {rank} axes"
        for name, rank in ranks.items()
        if name in tensors and tensors[name].ndim != rank
    ]
    if problems:
        raise ValueError(f"the sizes cannot be read from the tensors: {listing(problems)}")
    return [tuple(tensors[name].shape) for name in ranks]


def _num_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    start = len(prefix) + 1
    indices = {name[start:].partition(".")[0] for name in tensors if name.startswith(prefix)}
    return 1 + max(int(index) for index in indices if index.isdecimal())
