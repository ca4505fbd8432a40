"""Models of the reference folder, with every size read from its JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from openblip.convert import from_official, official_names
from openblip.convert import official_config as build_config
from openblip.convert_official import nlvr_config
from openblip.models.blip import Blip, BlipConfig
from openblip.models.nlvr import NlvrConfig
from openblip.models.text import ALL_ROLES, Role


@pytest.fixture(scope="session")
def reference_config(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "config.json").read_text())


@pytest.fixture(scope="session")
def official_config(reference_config: dict[str, Any]) -> BlipConfig:
    return build_config(reference_config)


@pytest.fixture(scope="session")
def official_nlvr_config(reference: Path, reference_config: dict[str, Any]) -> NlvrConfig:
    values = reference_config | {"med_config": reference_config["nlvr_med_config"]}
    tensors = load_file(reference / "nlvr_init.safetensors")
    return nlvr_config(build_config(values).with_roles(frozenset({"pair"})), tensors)


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
