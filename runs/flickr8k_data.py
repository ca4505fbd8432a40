"""Cut Flickr8k into the three sets of a bootstrap loop, with noise of known kind in the web set.

    python runs/flickr8k_data.py DATA OUT

DATA holds photos/flickr8k-{train,val}-*.tar (images and five captions each) and
web-text/laion-alt-text.txt.gz. OUT receives

    web     5,000 training images with one caption each; half of the captions are another image's,
            or a line of web text: meta `noise` says which
    human   the other 1,000 training images with their five captions
    test    the 1,000 validation images with their five captions
"""

import gzip
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from openblip.data.samples import Caption, Sample
from openblip.data.shards import Shard
from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_samples

NUM_WEB = 5000
NOISE_RATE = 0.5
SAMPLES_PER_SHARD = 1000
SEED = 0


def main(data: Path, out: Path) -> None:
    train = [s for shard in shards(data / "photos", "train") for s in samples(shard)]
    test = [s for shard in shards(data / "photos", "val") for s in samples(shard)]
    with gzip.open(data / "web-text" / "laion-alt-text.txt.gz", "rt", encoding="utf-8") as file:
        web_lines = [line.strip() for line in file if line.strip()]
    rng = np.random.default_rng(SEED)
    web = [spoil(s, train, web_lines, rng) for s in train[:NUM_WEB]]
    for name, several in (("web", web), ("human", train[NUM_WEB:]), ("test", test)):
        write(out / name, several)
        print(f"{name}: {len(several)} images, {sum(len(s.captions) for s in several)} captions")


def shards(folder: Path, split: str) -> list[Shard]:
    found = [shard for shard in list_shards(folder) if f"-{split}-" in shard.name]
    if not found:
        raise SystemExit(f"{folder} holds no flickr8k-{split}-*.tar")
    return found


def samples(shard: Shard) -> Iterator[Sample]:
    def refuse(key: str, reason: str) -> None:
        raise SystemExit(f"{shard}: {key}: {reason}")

    return read_samples(shard, default_source="human", on_bad=refuse)


def spoil(
    sample: Sample, others: Sequence[Sample], web_lines: Sequence[str], rng: np.random.Generator
) -> Sample:
    """Leave one caption, or put one in its place that says nothing of the image."""
    text, noise = pick(sample, rng), "none"
    if rng.random() < NOISE_RATE:
        if rng.random() < 0.5:
            noise, other = "other_caption", sample
            while other.key == sample.key:
                other = others[int(rng.integers(len(others)))]
            text = pick(other, rng)
        else:
            noise, text = "web_text", web_lines[int(rng.integers(len(web_lines)))]
    return replace(sample, captions=(Caption(text, "web"),), meta={**sample.meta, "noise": noise})


def pick(sample: Sample, rng: np.random.Generator) -> str:
    return sample.captions[int(rng.integers(len(sample.captions)))].text


def write(folder: Path, several: Sequence[Sample]) -> None:
    for start in range(0, len(several), SAMPLES_PER_SHARD):
        with ShardWriter(folder / f"{start // SAMPLES_PER_SHARD:05d}.tar") as writer:
            for sample in several[start : start + SAMPLES_PER_SHARD]:
                writer.write(sample)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
