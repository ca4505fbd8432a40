"""How many images fit the memory that is free."""

from pathlib import Path

import torch

from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig

USED_SHARE = 0.5
"""Of the free memory: others need some too."""
MOST_IMAGES = {"cpu": 16, "cuda": 128}
"""Beyond these a batch is no faster."""
BYTES_PER_VALUE = 4
ACTIVATIONS = 12
"""Arrays of an image's states that are alive at once, the widest ones counted by their width."""


def fitting_batch(vision: VisionConfig, text: MedConfig, device: torch.device) -> int:
    """Return the number of images, 1 at least, whose states, keys and values fit `device`."""
    positions = 1 + vision.num_patches
    values = positions * (2 * text.num_layers * text.width + ACTIVATIONS * vision.width)
    fitting = int(USED_SHARE * free_bytes(device)) // (BYTES_PER_VALUE * values)
    return max(1, min(fitting, MOST_IMAGES.get(device.type, MOST_IMAGES["cuda"])))


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; of a system that does not tell, 2 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if device.type == "cpu" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2 << 30


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the memory did not suffice."""
    told = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in told
    )
