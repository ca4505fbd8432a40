"""CapFilt beside transformers, and the engines beside the bare function.

    python benchmarks/capfilt.py peers   [--images 8] [--rounds 3] [--dtype float32] [--size base]
    python benchmarks/capfilt.py engines [--units 24] [--unit-images 32] [--rounds 3]
    both with [--json FILE]

`peers`: a shard of photos goes from JPEG bytes to judged captions on disk. transformers does it in
the two ways that its users do: one image at a time, and in batches; it encodes an image for its
caption and for each of the two texts that are judged, and writes nothing. Random weights of base
size at 384 px, greedy captions of 20 tokens, one web caption of 13 tokens on average; images are
prepared by the same function. Both sides' match probabilities are compared first.

`engines`: images a second of one worker with one thread, from its first finished unit to its last,
so without the start: `process_shard` in a loop, and the pool's and Ray's worker. A tiny model, so
that what an engine adds has nowhere to hide.
"""

import argparse
import copy
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openblip.batching import read_image
from openblip.bench import PROMPT, decoding_of, random_model, ratio_of
from openblip.bench_peer import TOLERANCE, Peer
from openblip.capfilt.captioner import Captioner
from openblip.capfilt.engines import run_pool
from openblip.capfilt.filter import Filter
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.manifest import OutputPaths, manifests, read_judged
from openblip.capfilt.models import Models
from openblip.capfilt.ray_engine import run_ray
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.capfilt.shard import process_shard
from openblip.capfilt.units import Unit, list_units, whole
from openblip.capfilt.work import Job, Queue, RunProgress
from openblip.checkpoint import save_checkpoint
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter
from openblip.data.sources import read_samples
from openblip.inference import tokenize
from openblip.kernels import Precision
from openblip.models.blip import Blip
from openblip.tokenizer import Tokenizer
from openblip.training.log import ProgressLine

NUM_THREADS = 1


def photo(rng: np.random.Generator) -> bytes:
    """Return a JPEG of the size and the smoothness of the web's."""
    rough = rng.integers(0, 255, (15, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shard(path: Path, num_images: int, seed: int) -> Path:
    """Write photos, each with a caption of made-up words."""
    rng = np.random.default_rng(seed)
    with ShardWriter(path) as writer:
        for number in range(num_images):
            length = int(np.clip(rng.normal(11, 3), 4, 18))
            text = " ".join(f"w{word}" for word in rng.integers(20, 190, length))
            writer.write(Sample(f"{path.stem}_{number}", photo(rng), (Caption(text),)))
    return path


def recipe_of(precision: Precision, batch_size: int) -> CapfiltRecipe:
    """Return greedy captions of a fixed length, all of which are kept."""
    return CapfiltRecipe(
        decoding=decoding_of(1), prompts=(PROMPT,), keep=KeepRule(threshold=0.0),
        batch_size=batch_size, dtype=precision,
    )  # fmt: skip


def models_of(blip: Blip, judge: Blip, tokenizer: Tokenizer, precision: Precision) -> Models:
    """Return a captioner and a filter."""
    recipe = recipe_of(precision, 1)
    captioner = Captioner(blip, tokenizer, recipe.decoding, recipe.prompts, dtype=precision)
    return Models((captioner,), (Filter(judge, tokenizer, precision),))


@dataclass
class TransformersUser:
    """What is written today: caption images, then judge two texts of each."""

    peer: Peer
    tokenizer: Tokenizer
    samples: list[Sample]

    def run(self, batch_size: int) -> list[list[float]]:
        """Return the match probabilities of each image's web text and new caption."""
        judged = []
        for start in range(0, len(self.samples), batch_size):
            part = self.samples[start : start + batch_size]
            images = torch.stack([read_image(s.image_bytes, self.peer.size_px) for s in part])
            new = [self.tokenizer.decode(ids) for ids in self.peer.caption(images, 1)]
            web = self._probabilities(images, [s.captions[0].text for s in part])
            written = self._probabilities(images, new)
            judged += [list(pair) for pair in zip(web, written, strict=True)]
        return judged

    @torch.no_grad()
    def _probabilities(self, images: torch.Tensor, texts: list[str]) -> list[float]:
        tokens = tokenize(self.tokenizer, texts)
        ids = tokens.token_ids.clone()
        ids[:, 0] = self.peer.tokens.enc
        pixels = images.to(self.peer.dtype)
        logits = self.peer.judge(ids, pixels, attention_mask=tokens.text_mask)[0]
        return logits.float().softmax(dim=1)[:, 1].tolist()


def measure_peers(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure ours with two image encoders and with one, and transformers in both ways."""
    precision: Precision = arguments.dtype
    blip, tokenizer = random_model(arguments.size, 384)
    other = copy.deepcopy(blip)
    with torch.no_grad():  # another image encoder by name, and the same by numbers
        other.vision.norm.bias += 1e-7
    apart = models_of(blip, other, tokenizer, precision)
    together = models_of(blip, blip, tokenizer, precision)
    peer = Peer(blip, tokenizer)
    peer.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    shard = write_shard(folder / "web.tar", arguments.images, 0)
    samples = list(read_samples(shard, on_bad=lambda key, reason: None))
    user = TransformersUser(peer, tokenizer, samples)
    recipe = recipe_of(precision, arguments.batch_size)
    number = iter(range(10**6))

    def ours(models: Models) -> Path:
        out = folder / f"out_{next(number)}"
        process_shard(shard, out, models, recipe)
        return out

    if precision == "float32":
        theirs = user.run(arguments.batch_size)
        for models in (apart, together):
            judged = read_judged(OutputPaths.of("web", ours(models)).captions)
            for image, expected in zip(judged, theirs, strict=True):
                for caption, probability in zip(image.captions, expected, strict=True):
                    assert caption.match_probability is not None
                    if abs(caption.match_probability - probability) > TOLERANCE:
                        raise ValueError(f"{image.key}: {caption} and transformers: {probability}")
    ways: dict[str, Callable[[], object]] = {
        "openblip, an image encoder each": lambda: ours(apart),
        "openblip, one image encoder": lambda: ours(together),
        "transformers, one image at a time": lambda: user.run(1),
        f"transformers, batches of {arguments.batch_size}": lambda: user.run(arguments.batch_size),
    }
    times = interleaved(ways, arguments.rounds)
    rows = []
    for ours_name in [*ways][:2]:
        for peer_name in [*ways][2:]:
            rows.append(
                {
                    "ours": ours_name, "peer": peer_name,
                    "images_per_s": arguments.images / statistics.median(times[ours_name]),
                    "peer_images_per_s": arguments.images / statistics.median(times[peer_name]),
                    "ratio": ratio_of(times[ours_name], times[peer_name]),
                }
            )  # fmt: skip
    print(f"{'ours':32} {'peer':36} {'images/s':>9} {'peer':>7} {'ratio':>6}")
    for row in rows:
        print(
            f"{row['ours']:32} {row['peer']:36} {row['images_per_s']:9.3f} "
            f"{row['peer_images_per_s']:7.3f} {row['ratio']:6.2f}"
        )
    return {"dtype": precision, "threads": torch.get_num_threads(), "rows": rows, "seconds": times}


def measure_engines(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one worker of each engine, and the bare function."""
    torch.set_num_threads(NUM_THREADS)
    blip, tokenizer = random_model("tiny", 224)
    save_checkpoint(folder / "model", blip, tokenizer, "Random weights.")
    for number in range(arguments.units):
        write_shard(folder / "web" / f"{number:05d}.tar", arguments.unit_images, number)
    units = list_units(folder / "web", most_samples=10**6, most_bytes=1 << 40)
    recipe = recipe_of("float32", 32)
    number = iter(range(10**6))

    def rate(run: Callable[[Job], None]) -> float:
        out = folder / f"out_{next(number)}"
        run(Job((str(folder / "model"),), (str(folder / "model"),), recipe, out, NUM_THREADS))
        ends = sorted(path.stat().st_mtime_ns for path in manifests(out))
        return (len(ends) - 1) * arguments.unit_images / ((ends[-1] - ends[0]) / 1e9)

    rates: dict[str, list[float]] = {"bare function": [], "pool": [], "ray": []}
    for _ in range(arguments.rounds):
        rates["bare function"].append(rate(lambda job: bare(job, units)))
        rates["pool"].append(rate(lambda job: run_on(job, units, run_pool)))
        rates["ray"].append(rate(lambda job: run_on(job, units, run_ray)))
    rows = {
        name: {
            "images_per_s": statistics.median(values),
            "share_of_bare": statistics.median(
                value / base for value, base in zip(values, rates["bare function"], strict=True)
            ),
        }
        for name, values in rates.items()
    }
    for name, row in rows.items():
        print(f"{name:14} {row['images_per_s']:8.1f} images/s  {row['share_of_bare']:6.1%} of bare")
    return {"units": arguments.units, "unit_images": arguments.unit_images, "rows": rows}


def bare(job: Job, units: list[Unit]) -> None:
    """Call the function on unit after unit."""
    models = job.load()
    for unit in units:
        process_shard(whole(unit.shard), job.output, models, job.recipe)


def run_on(job: Job, units: list[Unit], run: Callable[[Queue, RunProgress, int], None]) -> None:
    """Let an engine with one worker do the units."""
    queue = Queue(units, job)
    with ProgressLine("units", None, is_silent=True) as line:
        run(queue, RunProgress(line, queue), 1)


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way, which take turns; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["peers", "engines"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", choices=["base", "tiny"], default="base")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--units", type=int, default=24)
    parser.add_argument("--unit-images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measure = measure_peers if arguments.part == "peers" else measure_engines
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
