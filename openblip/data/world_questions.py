"""Questions about the drawn world, of which every answer is known.

They ask for the colour, shape and size of an object, whether there is one, where it stands, how
many there are, and for the background. Nothing is asked that the picture does not decide: an object
is named by what the other one does not have.

Two sets, drawn from one seed: `train`, and `test` with the scenes that the caller holds out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openblip.data.samples import Sample
from openblip.data.world import (
    CHOICES,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    draw_scene,
    random_scene,
    write_samples,
)

QUESTIONS_PER_IMAGE = 4

_OPPOSITES = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
_NOTHING = "nothing"


@dataclass(frozen=True)
class QuestionsConfig:
    """Pictures to train on, each with QUESTIONS_PER_IMAGE questions as all of them have."""

    image_size_px: int = 32
    num_train: int = 4000
    seed: int = 0


@dataclass(frozen=True)
class AskedQuestion:
    """A question about a scene and its only answer; `kind` is one of `KINDS`."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class _Thing:
    """An object of a scene. `place` is where it stands, seen from the other one."""

    color: str
    shape: str
    size: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def draw_questions(config: QuestionsConfig, folder: Path, held_out: Sequence[Scene]) -> None:
    """Write `folder`/train and /test as tar shards; questions stand under `qa` of a sample's JSON.

    held_out  the scenes of `test`, each drawn once; no picture of `train` shows one of them
    """
    rng = np.random.default_rng(config.seed)
    refused = set(held_out)
    train: list[Scene] = []
    while len(train) < config.num_train:
        scene = random_scene(rng)
        if scene not in refused:
            train.append(scene)
    for name, scenes in (("train", train), ("test", held_out)):
        samples = []
        for index, scene in enumerate(scenes):
            image = draw_scene(scene, config.image_size_px, rng)
            key = f"{name}_{index:06d}"
            asked = [ask(scene, rng) for _ in range(QUESTIONS_PER_IMAGE)]
            qa = [
                {
                    "question_id": f"{key}_{number}_{one.kind}",
                    "question": one.question,
                    "answer": one.answer,
                }
                for number, one in enumerate(asked)
            ]
            samples.append(Sample(key, image, (), {"qa": qa}))
        write_samples(folder / name, samples)


def ask(scene: Scene, rng: np.random.Generator) -> AskedQuestion:
    """Draw a question of any kind that the scene can be asked."""
    kinds = list(KINDS)
    while True:
        kind = kinds[int(rng.integers(len(kinds)))]
        made = KINDS[kind](scene, rng)
        if made is not None:
            return AskedQuestion(kind, *made)


def _things(scene: Scene) -> tuple[_Thing, _Thing]:
    relation = scene.relation
    return (
        _Thing(scene.first_color, scene.first_shape, scene.first_size, relation),
        _Thing(scene.second_color, scene.second_shape, scene.second_size, _OPPOSITES[relation]),
    )


def _one_and_other(scene: Scene, rng: np.random.Generator) -> tuple[_Thing, _Thing]:
    first, second = _things(scene)
    return (first, second) if rng.random() < 0.5 else (second, first)


def _pick(rng: np.random.Generator, *texts: str) -> str:
    return texts[int(rng.integers(len(texts)))]


def _name(one: _Thing, other: _Thing, rng: np.random.Generator) -> str:
    """Return a name that is not the other's too: by colour and shape, or by one of both."""
    names = [one.name]
    if one.shape != other.shape:
        names.append(one.shape)
    if one.color != other.color:
        names.append(f"{one.color} one")
    return _pick(rng, *names)


def _color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    one, other = _one_and_other(scene, rng)
    if one.shape == other.shape:
        return None
    word = _pick(rng, "color", "colour")
    return f"what {word} is the {one.shape}?", one.color


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    one, other = _one_and_other(scene, rng)
    if one.color == other.color:
        return None
    texts = (f"what shape is the {one.color} one?", f"what shape is {one.color}?")
    return _pick(rng, *texts, f"which shape is {one.color}?"), one.shape


def _size(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    one, other = _one_and_other(scene, rng)
    name = _name(one, other, rng)
    size = _pick(rng, *SIZES)
    is_it = "yes" if one.size == size else "no"
    return (
        (f"how big is the {name}?", one.size)
        if rng.random() < 0.5
        else (f"is the {name} {size}?", is_it)
    )


def _is_there(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    there = {(one.color, one.shape) for one in _things(scene)}
    colors, shapes = ({thing[place] for thing in there} for place in (0, 1))
    is_there = bool(rng.random() < 0.5)
    if rng.random() < 0.3:
        known, all_of = _pick_set(rng, (colors, tuple(COLORS)), (shapes, SHAPES))
        word = _pick(rng, *(one for one in all_of if (one in known) == is_there))
        thing = f"something {word}" if word in COLORS else f"a {word}"
    else:
        # Half of the absent ones are wrong in one word only.
        near = [
            (color, shape)
            for color in COLORS
            for shape in SHAPES
            if (color in colors or shape in shapes) and (color, shape) not in there
        ]
        absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in there]
        pool = sorted(there) if is_there else near if rng.random() < 0.5 else absent
        color, shape = pool[int(rng.integers(len(pool)))]
        thing = f"a {color} {shape}"
    return f"is there {thing}?", "yes" if is_there else "no"


def _pick_set(
    rng: np.random.Generator, *pairs: tuple[set[str], Sequence[str]]
) -> tuple[set[str], Sequence[str]]:
    return pairs[int(rng.integers(len(pairs)))]


def _place(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask what stands beside an object, now and then where there is nothing."""
    one, other = _one_and_other(scene, rng)
    name = _name(one, other, rng)
    if rng.random() < 0.25:
        return f"what is {_pick(rng, *_absent_places(other))} the {name}?", _NOTHING
    if rng.random() < 0.5:
        return f"what is {other.place} the {name}?", other.name
    what = _pick(rng, "shape", "color")
    return f"which {what} is {other.place} the {name}?", getattr(other, what)


def _is_placed(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    one, other = _one_and_other(scene, rng)
    names = _name(one, other, rng), _name(other, one, rng)
    is_so = rng.random() < 0.5
    place = one.place if is_so else _pick(rng, *_absent_places(one))
    return f"is the {names[0]} {place} the {names[1]}?", "yes" if is_so else "no"


def _absent_places(one: _Thing) -> list[str]:
    return [place for place in _OPPOSITES if place != one.place]


def _background(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    word = _pick(rng, "color", "colour")
    return f"what {word} is the background?", scene.background


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    things = _things(scene)
    what = _pick(rng, "color", "shape")
    word = _pick(rng, *CHOICES[f"first_{what}"])
    number = sum(getattr(one, what) == word for one in things)
    plural = f"{word} ones" if what == "color" else f"{word}es" if word[-1] == "s" else f"{word}s"
    return f"how many {plural} are there?", str(number)


KINDS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "is_there": _is_there,
    "place": _place,
    "is_placed": _is_placed,
    "background": _background,
    "count": _count,
}
"""What is asked for -> a question and its answer; None where the picture does not decide it."""
