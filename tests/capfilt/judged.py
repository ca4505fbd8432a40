"""A shard of pictures, and what CapFilt would have made of it, without a model."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.manifest import Manifest
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.data.samples import Sample
from openblip.data.sinks import ShardWriter, write_json_atomically


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def write_judged(
    folder: Path, name: str, images: Sequence[JudgedImage], *, seconds: float = 2.0
) -> Path:
    """Write pictures into `web/`, and their judged captions into `capfilt/`; return the latter."""
    shard = folder / "web" / f"{name}.tar"
    kept, dropped, lines = Counter[str](), dict[str, Counter[str]](), []
    with ShardWriter(shard) as writer:
        for index, image in enumerate(images):
            web = tuple(caption for caption in image.captions if caption.source == "web")
            writer.write(Sample(image.key, picture(index), web, image.meta))
            captions = [caption.to_json() for caption in image.captions]
            lines.append({"key": image.key, "captions": captions, "meta": image.meta})
            for caption in image.captions:
                if caption.drop_reason is None:
                    kept[caption.source] += 1
                else:
                    dropped.setdefault(caption.source, Counter())[caption.drop_reason] += 1
    manifest = Manifest(
        shard=str(shard), input_checksum="1", output_checksum="2", captioner="c0ffee",
        filter="f117e7", settings=CapfiltRecipe().model_dump(mode="json"), version="0",
        num_images=len(images), bad={"truncated": 2}, kept=dict(kept),
        dropped={source: dict(reasons) for source, reasons in dropped.items()},
        seconds={"total": seconds},
    )  # fmt: skip
    out = folder / "capfilt"
    out.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / f"{name}.captions.jsonl").write_text(text, encoding="utf-8")
    write_json_atomically(out / f"{name}.json", manifest.to_json())
    return out
