"""The drawn world for composed retrieval: a picture and "the same, but the circle is blue".

Two sets, drawn from one seed. `train` has pictures with such texts, which are true of them; there
is no pair of a picture before and after a change. `test` has families: an original and every
picture that differs from it in one thing, drawn at the same places. Those that a text names are
the answers of queries. No scene of `test` is in `train`, and no original or answer is among scenes
that the caller names as known.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from openblip.data.samples import Caption, Sample
from openblip.data.world import (
    CHOICES,
    Scene,
    draw_scene,
    random_scene,
    write_samples,
)


@dataclass(frozen=True)
class EditsConfig:
    """Sizes of both sets.

    num_train     pictures to train on, with at most two texts each
    num_families  originals to test with, each with some 17 pictures that differ in one thing
    """

    image_size_px: int = 32
    num_train: int = 3000
    num_families: int = 60
    seed: int = 0


def draw_edits(config: EditsConfig, folder: Path, known: Collection[Scene] = ()) -> None:
    """Write `folder`/train and /test as tar shards.

    A test sample's only caption is a text that is true of it. Its meta names its `family` and, if
    it is an answer, the `query` that leads to it from the original, the family's first; else None.

    known  scenes of other trainings, never an original or an answer
    """
    rng = np.random.default_rng(config.seed)
    known = set(known)
    families = _draw_families(config.num_families, known, rng)
    held_out = {scene for family in families for scene in family}
    train: list[Sample] = []
    while len(train) < config.num_train:
        scene = random_scene(rng)
        texts = dict.fromkeys(tell(scene, rng) for _ in range(2))
        if scene not in held_out and None not in texts:
            image = draw_scene(scene, config.image_size_px, rng)
            captions = tuple(Caption(text, "human") for text in texts if text)
            train.append(Sample(f"train_{len(train):06d}", image, captions))
    test: list[Sample] = []
    for number, family in enumerate(families):
        for member, scene in enumerate(family):
            # The same random numbers put the objects of a family at the same places.
            places = np.random.default_rng([config.seed, number])
            image = draw_scene(scene, config.image_size_px, places)
            text = tell(scene, rng)
            captions = (Caption(text, "human"),) if text else ()
            query = None if scene in known else tell_change(family[0], scene)
            meta = {"family": number, "query": query}
            test.append(Sample(f"test_{number:03d}_{member:02d}", image, captions, meta))
    write_samples(folder / "train", train)
    write_samples(folder / "test", test)


def neighbours(scene: Scene) -> list[Scene]:
    """Return every scene that differs in one thing."""
    return [
        other
        for name, values in CHOICES.items()
        for value in values
        if value != getattr(scene, name)
        and (other := replace(scene, **{name: value})).objects[0] != other.objects[1]
    ]


def tell(scene: Scene, rng: np.random.Generator) -> str | None:
    """Return a composed text that is true of a scene; None if no object can be named by one word.

    An object is named by its shape, and its colour or size told, or by its colour, and its shape
    told; what names it must be unlike that of the other object.
    """
    told = [_tell(scene, which, what) for which in ("first", "second") for what in _TOLD]
    texts = [text for text in told if text is not None]
    return texts[int(rng.integers(len(texts)))] if texts else None


def tell_change(before: Scene, after: Scene) -> str | None:
    """Return the composed text that leads from one scene to another.

    None if they differ in anything but one property of one object, or if it cannot be named.
    """
    changed = [name for name in CHOICES if getattr(before, name) != getattr(after, name)]
    if len(changed) != 1 or "_" not in changed[0]:
        return None
    which, _, what = changed[0].partition("_")
    # What names the object is what did not change; it must name it before and after.
    return _tell(after, which, what) if _tell(before, which, what) else None


_TOLD = ("color", "shape", "size")
_MAX_REFUSED = 3000


def _tell(scene: Scene, which: str, what: str) -> str | None:
    other = "second" if which == "first" else "first"
    name = "color" if what == "shape" else "shape"
    own = getattr(scene, f"{which}_{name}")
    if own == getattr(scene, f"{other}_{name}"):
        return None
    value = getattr(scene, f"{which}_{what}")
    if what == "shape":
        return f"the same, but the {own} one is a {value}"
    return f"the same, but the {own} is {value}"


def _draw_families(
    number: int, known: Collection[Scene], rng: np.random.Generator
) -> list[Sequence[Scene]]:
    """Draw originals that are not known with their neighbours, so that no scene comes twice."""
    families: list[Sequence[Scene]] = []
    taken: set[Scene] = set()
    num_refused = 0
    while len(families) < number:
        original = random_scene(rng)
        family = [original, *neighbours(original)]
        if original not in known and taken.isdisjoint(family):
            taken.update(family)
            families.append(family)
            num_refused = 0
        elif (num_refused := num_refused + 1) == _MAX_REFUSED:
            raise ValueError(
                f"the drawn world has room for about {len(families)} families, not for {number}"
            )
    return families
