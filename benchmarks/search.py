"""Search in large indexes: exact, by faiss, and re-ranking by ITM.

    python benchmarks/search.py --model MODEL --data SOURCE [--images 1000000] [--rounds 20]
        [--kinds faiss-ivf] [--candidates 128] [--threads 2] [--json FILE]

Embeddings of the images of SOURCE by MODEL are tiled with noise of a tenth of their spread, made of
unit norm again, until there are enough; MODEL's width is brought to 256 by a random rotation, which
keeps cosines. Queries are embeddings of the same images with fresh noise. So the vectors lie in
clusters, as those of real collections do, but in as many as SOURCE has images.

Recall is of exact search's first ten. Re-ranking judges candidates for one text of 13 tokens with
random weights of base size at 384 px, whose image states are at hand; SOURCE has no part in it.
Medians; the first round is not counted.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from openblip.batching import Encoded
from openblip.bench import random_model
from openblip.data.sources import list_shards, read_samples
from openblip.hub import load_engine
from openblip.images import ImageDecodeError, decode_image, eval_transform
from openblip.inference import Engine, tokenize
from openblip.search.index import COLUMNS, Index
from openblip.search.stores import Store, StoreKind, build_store, open_store
from openblip.search.writer import IndexWriter

WIDTH = 256
NOISE = 0.1
NUM_QUERIES = 64
NUM_FOUND = 10
SEGMENT_ROWS = 100_000


def embeddings_of(model: str, data: str) -> Tensor:
    """Return embeddings (N, E) of the images of a data set."""
    engine = load_engine(model)
    pixels = []
    for shard in list_shards(data):
        for sample in read_samples(shard, on_bad=lambda key, reason: None):
            try:
                pixels.append(
                    eval_transform(decode_image(sample.image_bytes), engine.image_size_px)
                )
            except ImageDecodeError:
                continue
    return F.normalize(engine.embed_images(torch.stack(pixels)).float(), dim=1)


def widened(embeddings: Tensor) -> Tensor:
    """Return embeddings (N, 256) of the same cosines."""
    width = embeddings.shape[1]
    if width == WIDTH:
        return embeddings
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    return embeddings @ rotation[:width]


def tiled(real: Tensor, number: int, seed: int) -> Tensor:
    """Return (number, 256): real embeddings in turn, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(real), (number,), generator=generator)
    spread = real.std(dim=0).norm()
    noise = torch.randn(number, WIDTH, generator=generator) * (NOISE * spread / WIDTH**0.5)
    return F.normalize(real[places] + noise, dim=1)


def write_index(folder: Path, real: Tensor, number: int) -> Index:
    """Write an index without images."""
    with IndexWriter(folder, model="none", model_id="none", embedding_width=WIDTH) as writer:
        for first in range(0, number, SEGMENT_ROWS):
            rows = min(SEGMENT_ROWS, number - first)
            blank: dict[str, Any] = {
                field.name: "" if pa.types.is_string(field.type) else 0 for field in COLUMNS
            }
            blank |= {"captions": "[]", "meta": "{}"}
            made = [{**blank, "key": str(first + row)} for row in range(rows)]
            writer.add(made, tiled(real, rows, seed=first + 2))
    return Index.open(folder)


def median_ms(work: Callable[[int], object], rounds: int) -> float:
    """Return the median time of a call with the number of its round, ms."""
    work(0)
    times = []
    for number in range(rounds):
        start = time.perf_counter()
        work(number)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as soon as it is measured, and return it."""
    recall, built = row.get("recall"), row.get("built_s")
    print(
        f"{row['what']:28} {row['ms']:9.2f} "
        f"{'' if recall is None else format(recall, '.3f'):>9} "
        f"{'' if built is None else format(built, '.1f'):>9}",
        flush=True,
    )
    return row


def measure_search(
    index: Index, queries: Tensor, kinds: list[StoreKind], rounds: int
) -> list[dict[str, Any]]:
    """Measure exact search and stores."""
    exact = [set(index.top(query, NUM_FOUND)[0]) for query in queries]
    milliseconds = median_ms(lambda n: index.top(queries[n % len(queries)], NUM_FOUND), rounds)
    rows = [shown({"what": f"exact, {len(index):,} x {WIDTH}", "ms": milliseconds, "recall": 1.0})]
    for kind in kinds:
        start = time.perf_counter()
        build_store(index, kind)
        built = time.perf_counter() - start
        store = open_store(index, kind)
        found = [set(store.top(index, query, NUM_FOUND, None)[0]) for query in queries]
        hits = sum(len(own & true) for own, true in zip(found, exact, strict=True))

        def one(number: int, store: Store = store) -> object:
            return store.top(index, queries[number % len(queries)], NUM_FOUND, None)

        recall = hits / sum(map(len, exact))
        milliseconds = median_ms(one, rounds)
        rows.append(shown({"what": kind, "ms": milliseconds, "recall": recall, "built_s": built}))
    return rows


def measure_rerank(candidates: int, rounds: int) -> list[dict[str, Any]]:
    """Measure ITM of a text with many images whose states are at hand, in float32 and bfloat16."""
    rows = []
    model, tokenizer = random_model("base", 384)
    tokens = tokenize(tokenizer, [" ".join(f"w{number}" for number in range(20, 31))])
    batch = 16
    num_states = model.config.vision.num_patches + 1
    for dtype in (torch.float32, torch.bfloat16):
        name = "float32" if dtype == torch.float32 else "bfloat16"
        engine = Engine.plain(model.to(dtype), tokenizer)
        states = torch.randn(batch, num_states, model.config.vision.width).to(dtype)

        def judge(_: int) -> None:
            for start in range(0, candidates, batch):
                own = min(batch, candidates - start)
                engine.backend.match_logits(  # noqa: B023
                    tokens.token_ids.expand(own, -1), tokens.text_mask.expand(own, -1),
                    range(own), Encoded(states[:own], engine.backend).context,  # noqa: B023
                )  # fmt: skip

        with torch.inference_mode():
            milliseconds = median_ms(judge, rounds)
        rows.append(shown({"what": f"re-rank {candidates}, {name}", "ms": milliseconds}))
    return rows


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument(
        "--kinds", nargs="*", choices=("faiss-ivf", "faiss-hnsw"), default=["faiss-ivf"]
    )
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rerank-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()[0]
    real = widened(embeddings_of(options.model, options.data))
    print(f"{len(real)} real embeddings, {options.threads} threads, load {load_before:.1f}")
    print(f"{'':28} {'ms':>9} {'recall@10':>9} {'built, s':>9}", flush=True)
    rows = []
    if options.images:
        with tempfile.TemporaryDirectory() as folder:
            index = write_index(Path(folder) / "index", real, options.images)
            queries = tiled(real, NUM_QUERIES, seed=1)
            rows += measure_search(index, queries, options.kinds, options.rounds)
    if options.candidates:
        rows += measure_rerank(options.candidates, options.rerank_rounds)
    if options.json is not None:
        told = {"load": load_before, "num_real": len(real), "rows": rows}
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
