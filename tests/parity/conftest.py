"""Models of the reference folder, with every size read from its JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from openblip.convert import from_official, official_names
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import ALL_ROLES, MedConfig, Role, SpecialTokens
from openblip.models.vision import VisionConfig


@pytest.fixture(scope="session")
def reference_config(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "config.json").read_text())


@pytest.fixture(scope="session")
def official_config(reference_config: dict[str, Any]) -> BlipConfig:
    vit, med = reference_config["vit"], reference_config["med_config"]
    ids = reference_config["special_token_ids"]
    return BlipConfig(
        vision=VisionConfig(
            image_size_px=reference_config["image_size"],
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
        embedding_width=reference_config["embed_dim"],
    )


@pytest.fixture
def official_blip(
    reference: Path, official_config: BlipConfig
) -> Callable[[frozenset[Role]], Blip]:
    """Build the reference's pre-training model with some or all of the roles."""

    def build(roles: frozenset[Role] = ALL_ROLES) -> Blip:
        config = official_config.with_roles(roles)
        blip = Blip(config)
        tensors = load_file(reference / "pretrain_init.safetensors")
        blip.load_state_dict(from_official(tensors, official_names(config)))
        return blip.eval()

    return build
