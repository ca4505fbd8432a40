"""transformers' BLIP folders: their configuration, weights and processor files, read and written.

transformers itself is never imported: its files are plain JSON and safetensors.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from openblip.convert_weights import mlp_ratio_of, read_tensors
from openblip.images import MEAN, STD
from openblip.models.blip import INITIAL_TEMPERATURE, BlipConfig
from openblip.models.text import MedConfig, Role, SpecialTokens
from openblip.models.vision import VisionConfig

Architecture = Literal["BlipForConditionalGeneration", "BlipForImageTextRetrieval"]
ROLES_OF: dict[Architecture, frozenset[Role]] = {
    "BlipForConditionalGeneration": frozenset({"decode"}),
    "BlipForImageTextRetrieval": frozenset({"text", "pair"}),
}

# transformers may leave values out of a config.json that are its defaults; these are not ours.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 384, "patch_size": 16, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
}  # fmt: skip
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 512, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02, "bos_token_id": 30522, "pad_token_id": 0, "sep_token_id": 102,
}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a transformers BLIP, its defaults filled in.

    Raises ValueError if there is none, if it is another model's, or if it asks for what openblip
    does not compute.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: expected a transformers BLIP folder")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "blip":
        found = values.get("model_type") if isinstance(values, dict) else None
        raise ValueError(f"{path}: model_type is {found!r}, expected 'blip'")
    values["vision_config"] = _VISION_DEFAULTS | (values.get("vision_config") or {})
    values["text_config"] = _TEXT_DEFAULTS | (values.get("text_config") or {})
    for part in ("vision_config", "text_config"):
        if values[part]["hidden_act"] != "gelu":
            raise ValueError(
                f"{path}: {part}.hidden_act is {values[part]['hidden_act']!r}, expected 'gelu'"
            )
    for name in ("image_size", "patch_size"):
        if not isinstance(values["vision_config"][name], int):
            found = values["vision_config"][name]
            raise ValueError(f"{path}: vision_config.{name} is {found!r}, expected the side in px")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, sharded or not; safetensors are preferred to pickles.

    Raises ValueError if there are none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{index} is no index of weights: {error!r}") from error
            # The index comes from elsewhere: it names files of this folder, never a path.
            return {
                key: tensor
                for shard in shards
                for key, tensor in read_tensors(folder / Path(shard).name).items()
            }
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def answers_questions(values: Mapping[str, Any]) -> bool:
    """Say whether `read_config`'s values are those of a BlipForQuestionAnswering."""
    return values.get("architectures") == ["BlipForQuestionAnswering"]


def architecture_of(names: Collection[str]) -> Architecture:
    """Return which model has tensors of these names. Raises ValueError if we know none."""
    tops = {name.partition(".")[0] for name in names}
    match sorted(tops & {"text_decoder", "text_encoder", "vision_proj", "itm_head"}):
        case ["text_decoder"]:
            return "BlipForConditionalGeneration"
        case ["itm_head", "text_encoder", "vision_proj"]:
            return "BlipForImageTextRetrieval"
        case ["text_decoder", "text_encoder"]:
            raise ValueError("a transformers folder of a BlipForQuestionAnswering is a VQA model")
        case _:
            raise ValueError(
                f"a transformers folder with {', '.join(sorted(tops))} can not be converted: "
                f"expected {' or '.join(ROLES_OF)}"
            )


def config_from_transformers(
    values: Mapping[str, Any], roles: frozenset[Role], tokens: SpecialTokens
) -> BlipConfig:
    """Translate `read_config`'s values.

    tokens  of the tokenizer; transformers' own config does not know [CLS] and [ENC]
    Raises ValueError if a captioning model's special tokens are not the tokenizer's.
    """
    vision, text, carried = values["vision_config"], values["text_config"], _carried(values)
    if "decode" in roles:
        theirs = tuple(text[f"{name}_token_id"] for name in ("bos", "sep", "pad"))
        if theirs != (tokens.dec, tokens.sep, tokens.pad):
            raise ValueError(
                f"config.json has bos, sep, pad = {theirs}, the vocabulary has [DEC], [SEP], [PAD]"
                f" = {(tokens.dec, tokens.sep, tokens.pad)}: give the model's own vocabulary"
            )
    return BlipConfig(
        vision=VisionConfig(
            image_size_px=vision["image_size"],
            patch_size_px=vision["patch_size"],
            width=vision["hidden_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_ratio=mlp_ratio_of(vision["intermediate_size"], vision["hidden_size"]),
            layer_norm_eps=vision["layer_norm_eps"],
            drop_path=carried["drop_path"],
            # transformers' own 1e-10 is of its position embeddings alone: a model that was
            # initialised with it throughout would not learn.
            init_std=carried["vision_init_std"],
            position_init_std=carried["position_init_std"],
        ),
        text=MedConfig(
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            ffn_width=text["intermediate_size"],
            max_positions=text["max_position_embeddings"],
            context_width=vision["hidden_size"],
            layer_norm_eps=text["layer_norm_eps"],
            dropout=float(text["hidden_dropout_prob"]),
            init_std=text["initializer_range"],
            roles=roles,
        ),
        tokens=tokens,
        embedding_width=values.get("image_text_hidden_size", 256),
    )


def temperature_of(values: Mapping[str, Any]) -> float:
    """Return the temperature that openblip wrote into a config.json, else the initial one."""
    return float(_carried(values)["temperature"])


def notes_on(values: Mapping[str, Any], roles: frozenset[Role]) -> list[str]:
    """Return what a user must know about a model that comes from transformers."""
    vision, text, notes = values["vision_config"], values["text_config"], []
    if vision["layer_norm_eps"] != VisionConfig.layer_norm_eps:
        notes.append(
            f"the image encoder's LayerNorm eps is {vision['layer_norm_eps']}, as transformers has "
            f"it; the original's is {VisionConfig.layer_norm_eps}"
        )
    if text["attention_probs_dropout_prob"] != text["hidden_dropout_prob"]:
        notes.append(
            f"attention dropout {text['attention_probs_dropout_prob']} became "
            f"{text['hidden_dropout_prob']}, the dropout of the other layers"
        )
    if vision["attention_dropout"]:
        notes.append(f"attention dropout {vision['attention_dropout']} of the images is left out")
    if "text" in roles and "temperature" not in (values.get("openblip") or {}):
        notes.append(f"transformers keeps no temperature: it is {INITIAL_TEMPERATURE}, the initial")
    if "pair" in roles:
        # transformers passes the processor's ids on, [CLS] first, like the demo of the original;
        # training put [ENC] there, and so does `Blip.encode_pair`.
        notes.append(
            "match probabilities differ from transformers', which judges pairs with [CLS] first; "
            "openblip puts [ENC] there, as in training"
        )
    return notes


def config_to_transformers(
    config: BlipConfig, architecture: Architecture, temperature: float | None
) -> dict[str, Any]:
    """Return the config.json of a transformers model.

    temperature  None where the model has none; with all else that transformers does not know it
                 goes into a key of our own, which transformers keeps and ignores
    """
    vision, text = config.vision, config.text
    carried: dict[str, float] = {
        "drop_path": vision.drop_path,
        "vision_init_std": vision.init_std,
        "position_init_std": vision.position_init_std,
    }
    if temperature is not None:
        carried["temperature"] = temperature
    return {
        "architectures": [architecture],
        "model_type": "blip",
        "dtype": "float32",
        "image_text_hidden_size": config.embedding_width,
        "initializer_range": text.init_std,
        "tie_word_embeddings": True,
        "openblip": carried,
        "text_config": {
            "model_type": "blip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "encoder_hidden_size": text.context_width,
            "intermediate_size": text.ffn_width,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.max_positions,
            "hidden_act": "gelu",
            "layer_norm_eps": text.layer_norm_eps,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            "initializer_range": text.init_std,
            "bos_token_id": config.tokens.dec,
            "eos_token_id": config.tokens.sep,
            "pad_token_id": config.tokens.pad,
            "sep_token_id": config.tokens.sep,
            "is_decoder": True,
        },
        "vision_config": {
            "model_type": "blip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size_px,
            "patch_size": vision.patch_size_px,
            "hidden_act": "gelu",
            "layer_norm_eps": vision.layer_norm_eps,
            "initializer_range": vision.init_std,
        },
    }


def processor_files(config: BlipConfig) -> dict[str, dict[str, Any]]:
    """Return the JSON files from which transformers builds a BlipProcessor, by name."""
    size = config.vision.image_size_px
    return {
        "preprocessor_config.json": {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "BlipProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "processor_class": "BlipProcessor",
            "do_lower_case": True,
            "model_max_length": config.text.max_positions,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "bos_token": "[DEC]",
            "additional_special_tokens": ["[ENC]"],
        },
    }


def _carried(values: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "drop_path": VisionConfig.drop_path,
        "vision_init_std": VisionConfig.init_std,
        "position_init_std": VisionConfig.position_init_std,
        "temperature": INITIAL_TEMPERATURE,
    }
    return defaults | (values.get("openblip") or {})
