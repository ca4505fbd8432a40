"""Cut NLVR's pictures of three boxes into two images each.

    python runs/nlvr_data.py DATA OUT

DATA holds nlvr/nlvr1-*.tar (a PNG and a JSON of id, sentence and label for each sentence). OUT
receives train.jsonl and test.jsonl (every fifth sentence), in the form that NLVR2's models are
trained on, and images/ with the left and the right half of each picture.
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image

from openblip.data.sources import list_shards, read_samples

TEST_EVERY = 5


def main(data: Path, out: Path) -> None:
    samples = [
        sample
        for shard in list_shards(data / "nlvr")
        if shard.name.startswith("nlvr1-")
        for sample in read_samples(shard, on_bad=refuse)
    ]
    if not samples:
        raise SystemExit(f"{data / 'nlvr'} holds no nlvr1-*.tar")
    (out / "images").mkdir(parents=True)
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for number, sample in enumerate(samples):
        picture = Image.open(io.BytesIO(sample.image_bytes)).convert("RGB")
        middle = picture.width // 2
        names = [f"images/{sample.key}-{side}.png" for side in ("left", "right")]
        picture.crop((0, 0, middle, picture.height)).save(out / names[0])
        picture.crop((middle, 0, picture.width, picture.height)).save(out / names[1])
        row = {key: sample.meta[key] for key in ("sentence", "label")} | {"images": names}
        rows["train" if number % TEST_EVERY else "test"].append(json.dumps(row))
    for name, lines in rows.items():
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} sentences")


def refuse(key: str, reason: str) -> None:
    raise SystemExit(f"{key}: {reason}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
