"""Do the heat maps of `openblip explain` point at what a word names?

    python benchmarks/pointing.py MODEL... [--scenes 300] [--seed 0] [--world-seed 42]

MODEL is one of `openblip quickstart`, of the seed --world-seed. Draws scenes that it was not
trained on, whose objects share no colour and no shape, and explains a caption of each. The game:
of the maps of an object's colour and shape, together, the hottest patch scores if its middle lies
in the object's box. A guess takes any patch. Prints, for each layer that can be looked into, the
share of objects that score; the share whose hottest patch lies in the box of the other object; and
the share of a guess.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from openblip.data.world import (
    Place,
    Scene,
    draw_placed,
    list_objects,
    place_objects,
    random_scene,
    trained_scenes,
)
from openblip.explain import Explanation, explain
from openblip.hub import load
from openblip.images import decode_image
from openblip.inference import Engine
from openblip.quickstart import WORLD


@dataclass(frozen=True)
class Pointing:
    """Shares of objects whose map is hottest in their own box, in the other's, and by a guess."""

    accuracy: float
    other: float
    guess: float
    num_objects: int


@dataclass(frozen=True)
class Puzzle:
    """A drawn scene with a caption of it."""

    scene: Scene
    places: tuple[Place, Place]
    image: Image.Image
    text: str


def draw_puzzles(num: int, size_px: int, seed: int, world_seed: int) -> list[Puzzle]:
    """Draw scenes whose objects share no colour and no shape, and that no training has seen."""
    known = trained_scenes(replace(WORLD, seed=world_seed))
    rng = np.random.default_rng(seed)
    puzzles: list[Puzzle] = []
    while len(puzzles) < num:
        scene = random_scene(rng)
        (color, shape), (other_color, other_shape) = scene.objects
        if scene in known or color == other_color or shape == other_shape:
            continue
        places = place_objects(scene, rng)
        image = decode_image(draw_placed(scene, places, size_px))
        puzzles.append(Puzzle(scene, places, image, list_objects(scene, rng)))
    return puzzles


def play(engine: Engine, puzzles: Sequence[Puzzle], layer: int | None = None) -> Pointing:
    """Play the pointing game with both objects of every scene."""
    own = other = 0
    guesses = []
    for puzzle in puzzles:
        explanation = explain(engine, puzzle.image, puzzle.text, layer=layer)
        boxes = [
            place.box(shape)
            for place, (_, shape) in zip(puzzle.places, puzzle.scene.objects, strict=True)
        ]
        for number, names in enumerate(puzzle.scene.objects):
            heat = heat_of(explanation, names)
            side = len(heat)
            row, column = divmod(int(heat.argmax()), side)
            own += is_inside(row, column, side, boxes[number])
            other += is_inside(row, column, side, boxes[1 - number])
            hits = [is_inside(r, c, side, boxes[number]) for r in range(side) for c in range(side)]
            guesses.append(sum(hits) / len(hits))
    num = 2 * len(puzzles)
    return Pointing(own / num, other / num, sum(guesses) / num, num)


def heat_of(explanation: Explanation, names: Sequence[str]) -> torch.Tensor:
    """Return the mean map of some words."""
    return torch.stack([word.heat for word in explanation.words if word.text in names]).mean(dim=0)


def is_inside(row: int, column: int, side: int, box: tuple[float, float, float, float]) -> bool:
    """Say whether the middle of a patch lies in a box."""
    x, y = (column + 0.5) / side, (row + 0.5) / side
    left, top, right, bottom = box
    return bool(left <= x <= right and top <= y <= bottom)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world-seed", type=int, default=42)
    arguments = parser.parse_args()
    print("model\tlayer\taccuracy\tother\tguess\tobjects")
    for name in arguments.models:
        engine = Engine(*load(name))
        puzzles = draw_puzzles(
            arguments.scenes, engine.image_size_px, arguments.seed, arguments.world_seed
        )
        for layer in range(engine.config.text.num_layers - 1):
            found = play(engine, puzzles, layer)
            print(
                f"{name}\t{layer}\t{found.accuracy:.3f}\t{found.other:.3f}\t{found.guess:.3f}\t"
                f"{found.num_objects}",
                flush=True,
            )


if __name__ == "__main__":
    main()
