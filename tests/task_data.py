"""Data of other tasks, made of the drawn world's."""

import json
from dataclasses import replace
from pathlib import Path

from openblip.data.sinks import ShardWriter
from openblip.data.sources import list_shards, read_samples


def write_task_data(folder: Path, *, times_asked: int = 1) -> None:
    """Add `asked.tar`, whose questions are captions, and `pairs.jsonl` to a drawn world.

    Of `pairs.jsonl` every second sentence is said to be true of its picture and the one before.
    """
    samples = list(read_samples(*list_shards(folder / "web"), on_bad=lambda key, reason: None))
    rows = []
    with ShardWriter(folder / "asked.tar") as writer:
        for number, sample in enumerate(samples):
            qa = [{"question": c.text, "answers": c.text.split()} for c in sample.captions]
            writer.write(replace(sample, captions=(), meta={"qa": qa * times_asked}))
            (folder / f"{sample.key}.jpg").write_bytes(sample.image_bytes)
            images = [f"{one.key}.jpg" for one in (sample, samples[number - 1])]
            rows.append({"sentence": qa[0]["question"], "label": number % 2 == 0, "images": images})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
