"""BLIP, maintained: vision-language pre-training that captions, filters and improves its own data.

Public names are imported on first use: `import openblip` and `openblip --help` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openblip.hub import load as load
    from openblip.hub import load_engine as load_engine
    from openblip.hub import load_vqa as load_vqa
    from openblip.inference import Engine as Engine
    from openblip.models.blip import Blip as Blip
    from openblip.models.vqa import Vqa as Vqa

__version__ = "0.1.0"

_HOME_OF = {
    "Blip": "openblip.models.blip",
    "Engine": "openblip.inference",
    "Vqa": "openblip.models.vqa",
    "load": "openblip.hub",
    "load_engine": "openblip.hub",
    "load_vqa": "openblip.hub",
}
__all__ = ["Blip", "Engine", "Vqa", "__version__", "load", "load_engine", "load_vqa"]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'openblip' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
