"""A tiny captioner and filter, and a shard with everything in it that a shard may have."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.capfilt.captioner import Captioner
from openblip.capfilt.filter import Filter
from openblip.capfilt.models import Models
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter
from openblip.generation import Decoding
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, Role
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer

TEXTS = ["a red cat on a mat", "a blue dog", "two green birds above a house"]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def build(tokenizer: Tokenizer, role: Role, size_px: int, seed: int) -> Blip:
    torch.manual_seed(seed)
    roles: dict[Role, frozenset[Role]] = {
        "decode": frozenset({"decode"}),
        "pair": frozenset({"text", "pair"}),
    }
    config = BlipConfig(
        vision=VisionConfig(
            image_size_px=size_px, patch_size_px=8, width=32, num_layers=1, num_heads=2,
            init_std=0.4,
        ),
        text=MedConfig(
            vocab_size=tokenizer.vocab_size, width=32, num_layers=1, num_heads=2, ffn_width=32,
            max_positions=40, context_width=32, init_std=0.4, roles=roles[role],
        ),
        tokens=tokenizer.special,
        embedding_width=8,
    )  # fmt: skip
    return Blip(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=70, min_frequency=1)


@pytest.fixture(scope="session")
def captioner(tokenizer: Tokenizer) -> Captioner:
    decoding = Decoding(method="nucleus", min_tokens=1, max_tokens=5)
    return Captioner(build(tokenizer, "decode", 16, 0), tokenizer, decoding, ("a ",))


@pytest.fixture(scope="session")
def judge(tokenizer: Tokenizer) -> Filter:
    """Return a filter of another image size than the captioner's."""
    return Filter(build(tokenizer, "pair", 24, 1), tokenizer)


@pytest.fixture
def models(captioner: Captioner, judge: Filter) -> Models:
    return Models((captioner,), (judge,))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Write good samples, and behind them three that cannot be used."""
    path = tmp_path / "web" / "00000.tar"
    samples = [
        Sample("a", picture(0), (Caption(TEXTS[0]),), {"url": "http://a", "n": [1, {"x": None}]}),
        Sample("b", picture(1), (Caption(TEXTS[1]), Caption("A blue DOG!"))),
        Sample("c", picture(2, "PNG"), (Caption(TEXTS[2], "human"),), image_extension="png"),
        Sample("d", picture(3)),
        Sample("e", picture(4), (Caption("..."),)),
        Sample("f", picture(5), (Caption(TEXTS[0]),)),
        Sample("g", picture(6), (Caption("ein grüner Vogel"),)),
        Sample("broken", picture(7)[:200], (Caption(TEXTS[1]),)),
    ]
    with ShardWriter(path) as writer:
        for sample in samples:
            writer.write(sample)
    with tarfile.open(path, "a") as tar:
        for name, data in (
            ("bare.json", b'{"caption": "no image"}'),
            ("odd.jpg", picture(8)),
            ("odd.json", b"{"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path
