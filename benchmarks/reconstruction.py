"""Does text-guided reconstruction use the text, and does refining by a text find the picture?

    python benchmarks/reconstruction.py QUICKSTART OUT [--seed 42]

QUICKSTART is the folder of `openblip quickstart` with that seed: its bootstrapped model gets a
reconstruction head by recipes/world_reconstruction_cpu.yaml, trained on pictures with texts that
are true of them. Prints

(a) the reconstruction error of held-out pictures with their own text and with one of another
    picture, and the p-value of the difference (paired test, random signs);
(b) the R@1 of composed queries, original + "the same, but the circle is blue", among all pictures
    that differ from one of the originals in one thing; the query's own original is left out.

No original and no answer was seen in any training; of the other pictures to choose from some were.
What is in OUT already is not done again.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from openblip.batching import read_image
from openblip.checkpoint import load_checkpoint
from openblip.config import load_recipe
from openblip.data.samples import Sample
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import trained_scenes
from openblip.data.world_edits import EditsConfig, draw_edits
from openblip.finetune.reconstruction import ReconstructionRun, run_reconstruction
from openblip.inference import Engine, tokenize
from openblip.losses import reconstruction_errors
from openblip.models.blip import Blip
from openblip.models.reconstruction import draw_visible, is_hidden
from openblip.quickstart import WORLD
from openblip.tokenizer import Tokenizer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "world_reconstruction_cpu.yaml"
NUM_SIGNS = 10_000


@dataclass(frozen=True)
class Errors:
    """Mean reconstruction error with the right and with a shuffled text, and the p-value."""

    right: float
    shuffled: float
    num_pictures: int
    p_value: float


@dataclass(frozen=True)
class Composed:
    """R@1 in percent of the same queries, by how they were asked.

    embedding_sum  image and text embedding added: what needs no head
    """

    image_only: float
    text_only: float
    embedding_sum: float
    refined: float
    num_queries: int
    num_pictures: int


def main(quickstart: Path, out: Path, seed: int) -> tuple[Errors, Composed]:
    if not (out / "edits").exists():
        known = trained_scenes(replace(WORLD, seed=seed))
        draw_edits(EditsConfig(seed=seed), out / "edits", known)
    if not (out / "model").exists():
        places = [f"init={quickstart / 'bootstrapped'}", f"data=[{out / 'edits' / 'train'}]"]
        run = load_recipe(ReconstructionRun, RECIPE, [*places, f"seed={seed}"])
        run_reconstruction(run, out / "model")
    blip, tokenizer = load_checkpoint(out / "model")
    samples = [
        sample
        for shard in list_shards(out / "edits" / "test")
        for sample in read_samples(shard, on_bad=_refuse)
    ]
    size_px = blip.config.vision.image_size_px
    images = torch.stack([read_image(sample.image_bytes, size_px) for sample in samples])
    errors = measure_errors(blip, tokenizer, samples, images, seed)
    print(
        f"(a) error with the right text {errors.right:.4f}, with a shuffled one "
        f"{errors.shuffled:.4f}; {errors.num_pictures} pictures, p = {errors.p_value:.4f}"
    )
    composed = measure_composed(blip, tokenizer, samples, images)
    print(
        f"(b) R@1 image only {composed.image_only:.1f}, text only {composed.text_only:.1f}, "
        f"sum of both embeddings {composed.embedding_sum:.1f}, refined {composed.refined:.1f} %; "
        f"{composed.num_queries} queries, {composed.num_pictures} pictures"
    )
    return errors, composed


@torch.no_grad()
def measure_errors(
    blip: Blip, tokenizer: Tokenizer, samples: Sequence[Sample], images: Tensor, seed: int
) -> Errors:
    """Compare the errors of originals and answers, the same patches hidden, over two texts."""
    rows = [i for i, s in enumerate(samples) if _is_held_out(samples, i) and s.captions]
    tokens = tokenize(tokenizer, [samples[i].captions[0].text for i in rows])
    text_states = blip.encode_text(tokens.token_ids, tokens.text_mask)
    image_states = blip.encode_image(images[rows])
    rng = np.random.default_rng(seed)
    # Every text moves on to another picture.
    order = torch.from_numpy(rng.permutation(len(rows)))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    torch.manual_seed(seed)
    config = blip.config.reconstruction
    assert config is not None
    num_patches = blip.config.vision.num_patches
    num_visible = config.num_visible(num_patches)
    visible = draw_visible(len(rows), num_patches, num_visible, torch.device("cpu"))
    right, shuffled = (
        reconstruction_errors(
            blip.reconstruct(images[rows], visible, text_states[texts], tokens.text_mask[texts]),
            image_states,
            is_hidden(visible, num_patches),
        )
        for texts in (torch.arange(len(rows)), other)
    )
    difference = (shuffled - right).double().numpy()
    signs = rng.choice([-1.0, 1.0], size=(NUM_SIGNS, len(rows)))
    num_as_large = int(((signs @ difference) >= difference.sum()).sum())
    p_value = (1 + num_as_large) / (1 + NUM_SIGNS)
    return Errors(float(right.mean()), float(shuffled.mean()), len(rows), p_value)


def measure_composed(
    blip: Blip, tokenizer: Tokenizer, samples: Sequence[Sample], images: Tensor
) -> Composed:
    """Rank all pictures for every query by the cosine of their embeddings."""
    answers = [i for i, sample in enumerate(samples) if sample.meta["query"]]
    originals = [_original(samples, i) for i in answers]
    texts = [str(samples[i].meta["query"]) for i in answers]
    engine = Engine.plain(blip, tokenizer)
    pictures = engine.embed_images(images)
    image_only = pictures[originals]
    text_only = engine.embed_texts(texts)
    refined = engine.refine(list(images[originals]), texts)

    def recall(queries: Tensor) -> float:
        scores = queries @ pictures.T
        scores[torch.arange(len(answers)), torch.tensor(originals)] = -torch.inf
        return 100.0 * float((scores.argmax(dim=1) == torch.tensor(answers)).float().mean())

    return Composed(
        recall(image_only),
        recall(text_only),
        recall(F.normalize(image_only + text_only, dim=1)),
        recall(refined),
        len(answers),
        len(samples),
    )


def _original(samples: Sequence[Sample], index: int) -> int:
    """Return the place of the original of a sample's family, its first."""
    family = samples[index].meta["family"]
    return next(i for i, sample in enumerate(samples) if sample.meta["family"] == family)


def _is_held_out(samples: Sequence[Sample], index: int) -> bool:
    return bool(samples[index].meta["query"]) or _original(samples, index) == index


def _refuse(key: str, reason: str) -> None:
    raise ValueError(f"sample {key} is unusable: {reason}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.quickstart, arguments.out, arguments.seed)
