"""How fast a folder is captioned, beside the model alone; and whether the memory stays the same.

    python benchmarks/caption_folder.py PHOTOS [--model MODEL] [--images 200] [--batch-size 16]
                                        [--chunk 32] [--json FILE]

Images are those of PHOTOS, over and over. In turns a chunk goes from files to captions on disk, as
`openblip caption --out` does it, and a chunk whose images are prepared already through the model
alone. Without --model it is one of base size and random weights, at 384 px, with captions of 20
tokens. The memory is that of this process after each tenth.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from openblip.batching import bytes_of
from openblip.bench import decoding_of, random_model
from openblip.data.caption_rows import CaptionRows
from openblip.data.files import list_files, read_batches
from openblip.generation import Decoding
from openblip.hub import load
from openblip.inference import Engine

STATUS = Path("/proc/self/status")


def refuse(path: Path, reason: str) -> None:
    """Stop at a file that is no image: rates are of images."""
    raise ValueError(f"{path}: {reason}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = Engine(*(load(arguments.model) if arguments.model else random_model("base", 384)))
    decoding = Decoding() if arguments.model else decoding_of(3)
    size_px, batch_size = engine.image_size_px, arguments.batch_size
    images = [
        path for path in list_files([arguments.photos], on_bad=refuse) if path.suffix == ".jpg"
    ]
    files = itertools.cycle(images)
    first = list(itertools.islice(files, batch_size))
    [(_, prepared)] = read_batches(first, size_px, batch_size, on_bad=refuse)
    engine.caption(prepared, decoding=decoding)  # what is done once
    whole, alone, memory = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        rows = CaptionRows(Path(folder, "captions.jsonl"), {}, [], set())
        for start in range(0, arguments.images, arguments.chunk):
            chunk = list(itertools.islice(files, min(arguments.chunk, arguments.images - start)))
            begun = time.perf_counter()
            for names, batch in read_batches(chunk, size_px, batch_size, on_bad=refuse):
                written = engine.caption(batch, decoding=decoding)
                rows.append(
                    [
                        {
                            "path": str(name),
                            "captions": [
                                {"text": c.text, "mean_log_probability": c.mean_log_probability}
                                for c in several
                            ],
                        }
                        for name, several in zip(names, written, strict=True)
                    ]
                )
            whole.append(len(chunk) / (time.perf_counter() - begun))
            batches = list(read_batches(chunk, size_px, batch_size, on_bad=refuse))
            begun = time.perf_counter()
            for _, batch in batches:
                engine.caption(batch, decoding=decoding)
            alone.append(len(chunk) / (time.perf_counter() - begun))
            del batches
            memory.append(bytes_of("VmRSS", STATUS))
        rows.finish()
    shares = [a / b for a, b in zip(whole, alone, strict=True)]
    places = [round(i * (len(memory) - 1) / 10) for i in range(11)]
    result = {
        "images": arguments.images,
        "threads": torch.get_num_threads(),
        "images_per_s": statistics.median(whole),
        "model_only_per_s": statistics.median(alone),
        "share": statistics.median(shares),
        "memory_bytes": [memory[place] for place in places],
    }
    print(
        f"{result['images_per_s']:.3g} images/s, the model alone {result['model_only_per_s']:.3g}: "
        f"{result['share']:.1%} (median of {len(shares)} neighbouring chunks)"
    )
    print("GiB after each tenth: " + " ".join(f"{memory[p] / 2**30:.2f}" for p in places))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
