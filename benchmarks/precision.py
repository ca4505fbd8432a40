"""What lower precisions cost: a trained captioner and filter, asked in float32, bfloat16 and int8.

    python benchmarks/precision.py CAPTIONER FILTER DATA [--images 1000] [--json FILE]

DATA holds images with human captions that neither model was trained on. Per precision: recalls of
retrieval by ITC and after re-ranking, CIDEr and BLEU-4 of beam search, and against float32 the mean
absolute difference of match probabilities (of every image's first caption and of another image's),
the mean cosine of the embeddings, and the share of equal greedy tokens and captions.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch

from openblip.cli_output import table
from openblip.data.samples import Sample
from openblip.data.sources import list_shards, read_samples
from openblip.evaluation.captioning import evaluate_captioning
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.generation import Decoding
from openblip.hub import load
from openblip.inference import Engine
from openblip.kernels import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
GREEDY = Decoding(method="greedy")
SHORTLIST = 64
PROMPT = "a picture of"


def read(data: Path, number: int) -> list[Sample]:
    """Return the first samples of a data set."""

    def refuse(key: str, reason: str) -> None:
        raise ValueError(f"sample {key} is unusable: {reason}")

    samples = (one for shard in list_shards(data) for one in read_samples(shard, on_bad=refuse))
    return list(islice(samples, number))


def measure(captioner: Engine, judge: Engine, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the scores of a precision, and what is compared with those of float32."""
    images = [sample.image_bytes for sample in samples]
    own = [sample.captions[0].text for sample in samples]
    other = own[1:] + own[:1]
    retrieval = evaluate_retrieval(judge, samples, shortlist=SHORTLIST)
    captioning = evaluate_captioning(captioner, samples, prompt=PROMPT, decoding=Decoding())
    assert captioning.scores is not None
    judged = judge.match_probabilities(
        images, [list(both) for both in zip(own, other, strict=True)]
    )
    written = captioner.caption(images, decoding=GREEDY, prompt=PROMPT)
    reranked, itc = retrieval.reranked.to_json(), retrieval.itc.to_json()
    return {
        "scores": {
            **{f"itc_{name}": itc[name] for name in ("tr_at_1", "tr_at_10", "ir_at_1", "ir_at_10")},
            **{name: reranked[name] for name in ("tr_at_1", "tr_at_10", "ir_at_1", "ir_at_10")},
            "cider": captioning.scores.cider,
            "bleu_4": captioning.scores.bleu_4,
        },
        "probabilities": torch.stack(judged),
        "image_embedding": judge.embed_images(images),
        "text_embedding": judge.embed_texts(own),
        "captions": [one.text for [one] in written],
    }


def compare(exact: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Return the differences of a precision from float32."""
    pairs = list(zip(exact["captions"], found["captions"], strict=True))
    words = [(a.split(), b.split()) for a, b in pairs]
    equal = sum(x == y for a, b in words for x, y in zip_longest(a, b))
    total = sum(max(len(a), len(b)) for a, b in words)
    return {
        "match_probability_mean_difference": float(
            (exact["probabilities"] - found["probabilities"]).abs().mean()
        ),
        "match_probability_largest_difference": float(
            (exact["probabilities"] - found["probabilities"]).abs().max()
        ),
        "image_embedding_cosine": _cosine(exact["image_embedding"], found["image_embedding"]),
        "text_embedding_cosine": _cosine(exact["text_embedding"], found["text_embedding"]),
        "equal_words": equal / total,
        "equal_captions": sum(a == b for a, b in pairs) / len(pairs),
    }


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum(dim=1).mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("captioner")
    parser.add_argument("filter")
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    samples = read(arguments.data, arguments.images)
    captioner, judge = load(arguments.captioner), load(arguments.filter)
    found = {
        name: measure(Engine(*captioner, dtype=name), Engine(*judge, dtype=name), samples)
        for name in PRECISIONS
    }
    result = {
        name: found[name]["scores"] | compare(found["float32"], found[name]) for name in PRECISIONS
    }
    rows = [["", *PRECISIONS]]
    rows += [[key, *(f"{result[name][key]:.5g}" for name in PRECISIONS)] for key in result["int8"]]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
