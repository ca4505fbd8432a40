"""A drawn world: two coloured objects, their relation and a background, with captions and noise.

Everything is known about it, so it says whether CapFilt works. Three sets, all drawn from one seed:
`web` (one caption per image, some of them wrong, each truth in the sample's meta; as on the web,
most tell less than a human would: they list the objects and not how they stand), `human` (clean,
several captions per image) and `test` (clean, held out: no scene of it is in the others).
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 220, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "big")
RELATIONS = ("left of", "above")
BACKGROUNDS = {"black": (15, 15, 15), "gray": (128, 128, 128), "white": (245, 245, 245)}

_ALT_WORDS = ("image", "photo", "banner", "stock", "download", "free", "wallpaper", "icon")

# Of each shape to the left, to the top, to the right and to the bottom of its centre, in radii.
_WIDE = 1.15 * math.cos(math.pi / 6)
_EXTENTS = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (0.88, 0.88, 0.88, 0.88),
    "triangle": (_WIDE, 1.15, _WIDE, 1.15 / 2),
    "cross": (1.0, 1.0, 1.0, 1.0),
}

NoiseKind = Literal["none", "other_caption", "wrong_attribute", "alt_text"]

_OVERSAMPLING = 4
_SAMPLES_PER_SHARD = 1000


@dataclass(frozen=True)
class Scene:
    """Two objects: the first stands `relation` the second."""

    first_color: str
    first_shape: str
    first_size: str
    second_color: str
    second_shape: str
    second_size: str
    relation: str
    background: str

    @property
    def objects(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Colour and shape of both."""
        return (
            (self.first_color, self.first_shape),
            (self.second_color, self.second_shape),
        )


CHOICES: dict[str, Sequence[str]] = {
    "first_color": tuple(COLORS),
    "first_shape": SHAPES,
    "first_size": SIZES,
    "second_color": tuple(COLORS),
    "second_shape": SHAPES,
    "second_size": SIZES,
    "relation": RELATIONS,
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of the three sets and how noisy the web is.

    noise_rate       share of web captions that are wrong, the three kinds in equal parts
    human_captions   captions per human image; test images have as many
    web_lists        share of web captions, true or not, that name the objects without relation
    human_lists      the same of human and test captions
    """

    image_size_px: int = 32
    num_web: int = 4000
    num_human: int = 800
    num_test: int = 500
    human_captions: int = 3
    noise_rate: float = 0.25
    web_lists: float = 0.9
    human_lists: float = 0.2
    seed: int = 0


def draw_world(config: WorldConfig, folder: Path) -> None:
    """Write `folder`/web, /human and /test as tar shards."""
    rng = np.random.default_rng(config.seed)
    web_scenes, human_scenes, test_scenes = _draw_scenes(config, rng)
    write_samples(folder / "web", _web_samples(web_scenes, config, rng))
    for name, scenes in (("human", human_scenes), ("test", test_scenes)):
        samples = []
        for index, scene in enumerate(scenes):
            texts = [
                _describe_or_list(scene, rng.random() < config.human_lists, rng)
                for _ in range(config.human_captions)
            ]
            captions = tuple(Caption(text, "human") for text in texts)
            image = draw_scene(scene, config.image_size_px, rng)
            samples.append(Sample(f"{name}_{index:06d}", image, captions))
        write_samples(folder / name, samples)


def trained_scenes(config: WorldConfig) -> set[Scene]:
    """Return what `draw_world` draws for web and human: what a model trained on them has seen."""
    web, human, _ = _draw_scenes(config, np.random.default_rng(config.seed))
    return {*web, *human}


def held_out_scenes(config: WorldConfig) -> list[Scene]:
    """Return what `draw_world` draws for test, in its order."""
    return _draw_scenes(config, np.random.default_rng(config.seed))[2]


@dataclass(frozen=True)
class Place:
    """Where an object stands: its centre, and half of its height, in shares of the image's side."""

    x: float
    y: float
    radius: float

    def box(self, shape: str) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of a shape that stands here, as shares of the side."""
        left, top, right, bottom = _EXTENTS[shape]
        x, y, radius = self.x, self.y, self.radius
        return x - left * radius, y - top * radius, x + right * radius, y + bottom * radius


def place_objects(scene: Scene, rng: np.random.Generator) -> tuple[Place, Place]:
    """Place both objects of a scene, a little off the middles of their quarters."""
    # Each object has a quarter of the image: two of a row, or two of a column.
    other_axis = (0.25, 0.75)[int(rng.integers(2))]
    places = []
    for size, along in ((scene.first_size, 0.25), (scene.second_size, 0.75)):
        x, y = (along, other_axis) if scene.relation == "left of" else (other_axis, along)
        shift_x, shift_y = rng.uniform(-0.03, 0.03, size=2)
        places.append(Place(x + shift_x, y + shift_y, 0.22 if size == "big" else 0.14))
    first, second = places
    return first, second


def draw_scene(scene: Scene, size_px: int, rng: np.random.Generator) -> bytes:
    """Draw a scene where `place_objects` puts its objects, and return it as JPEG."""
    return draw_placed(scene, place_objects(scene, rng), size_px)


def draw_placed(scene: Scene, places: tuple[Place, Place], size_px: int) -> bytes:
    """Draw a scene whose objects stand at known places, and return it as JPEG."""
    side = size_px * _OVERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for (color, shape), place in zip(scene.objects, places, strict=True):
        _draw_shape(draw, shape, COLORS[color], side * place.x, side * place.y, side * place.radius)
    image = image.resize((size_px, size_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of many true captions: objects always, sizes and background often."""
    first, second = _name_objects(scene, rng)
    relation, opposite = scene.relation, {"left of": "right of", "above": "below"}[scene.relation]
    body = f"{first} {relation} {second}" if rng.random() < 0.5 else f"{second} {opposite} {first}"
    return f"{body} on {scene.background}" if rng.random() < 0.4 else body


def list_objects(scene: Scene, rng: np.random.Generator) -> str:
    """Return a true caption that names the objects and not how they stand."""
    names = _name_objects(scene, rng)
    rng.shuffle(names)
    body = " and ".join(names)
    return f"{body} on {scene.background}" if rng.random() < 0.4 else body


def _name_objects(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return a name of each object, with its size or without."""
    sizes = (scene.first_size, scene.second_size)
    return [
        f"{size} {color} {shape}" if rng.random() < 0.4 else f"{color} {shape}"
        for (color, shape), size in zip(scene.objects, sizes, strict=True)
    ]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw any scene."""
    while True:
        scene = Scene(**{name: str(rng.choice(values)) for name, values in CHOICES.items()})
        # Two objects alike would make "left of" and "right of" both true.
        if scene.objects[0] != scene.objects[1]:
            return scene


def _draw_scenes(
    config: WorldConfig, rng: np.random.Generator
) -> tuple[list[Scene], list[Scene], list[Scene]]:
    """Draw the scenes of web, human and test."""
    test = list(dict.fromkeys(random_scene(rng) for _ in range(4 * config.num_test)))
    test = test[: config.num_test]
    held_out = set(test)
    web = _scenes_without(held_out, config.num_web, rng)
    return web, _scenes_without(held_out, config.num_human, rng), test


def _scenes_without(held_out: set[Scene], num: int, rng: np.random.Generator) -> list[Scene]:
    scenes: list[Scene] = []
    while len(scenes) < num:
        scene = random_scene(rng)
        if scene not in held_out:
            scenes.append(scene)
    return scenes


def _web_samples(
    scenes: Sequence[Scene], config: WorldConfig, rng: np.random.Generator
) -> list[Sample]:
    kinds: tuple[NoiseKind, ...] = ("other_caption", "wrong_attribute", "alt_text")
    samples = []
    for index, scene in enumerate(scenes):
        is_list = rng.random() < config.web_lists
        true_text = _describe_or_list(scene, is_list, rng)
        kind: NoiseKind = "none"
        text = true_text
        if rng.random() < config.noise_rate:
            kind = kinds[int(rng.integers(len(kinds)))]
            text = _spoil(kind, scene, is_list, scenes, rng)
        image = draw_scene(scene, config.image_size_px, rng)
        meta = {"noise": kind, "true_caption": true_text}
        samples.append(Sample(f"web_{index:06d}", image, (Caption(text, "web"),), meta))
    return samples


def _describe_or_list(scene: Scene, is_list: bool, rng: np.random.Generator) -> str:
    return list_objects(scene, rng) if is_list else describe(scene, rng)


def _spoil(
    kind: NoiseKind,
    scene: Scene,
    is_list: bool,
    scenes: Sequence[Scene],
    rng: np.random.Generator,
) -> str:
    """Return a text that is wrong for the scene in the way of `kind`."""
    match kind:
        case "other_caption":
            others = [s for s in scenes if not set(scene.objects) & set(s.objects)]
            if not others:
                raise ValueError(f"{len(scenes)} web images are too few for another's caption")
            return _describe_or_list(others[int(rng.integers(len(others)))], is_list, rng)
        case "wrong_attribute":
            # What a caption always tells, so that the text is wrong whichever template it takes.
            told = ("first_color", "first_shape", "second_color", "second_shape")
            while True:
                name = told[int(rng.integers(len(told)))]
                value = str(rng.choice([v for v in CHOICES[name] if v != getattr(scene, name)]))
                wrong = replace(scene, **{name: value})
                # No scene has two objects alike.
                if wrong.objects[0] != wrong.objects[1]:
                    return _describe_or_list(wrong, is_list, rng)
        case "alt_text":
            first, second = rng.choice(_ALT_WORDS, size=2, replace=False)
            templates = (
                f"img {int(rng.integers(10, 100))} jpg",
                f"{first} {second}",
                f"{first} for sale best price",
                f"click to enlarge {first}",
                f"{first} {second} hd",
            )
            return templates[int(rng.integers(len(templates)))]
        case _:
            raise AssertionError(kind)


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    color: tuple[int, int, int],
    x: float,
    y: float,
    radius: float,
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    match shape:
        case "circle":
            draw.ellipse(box, fill=color)
        case "square":
            inner = 0.88 * radius
            draw.rectangle((x - inner, y - inner, x + inner, y + inner), fill=color)
        case "triangle":
            angles = (-math.pi / 2, math.pi / 6, 5 * math.pi / 6)
            corners = [
                (x + 1.15 * radius * math.cos(a), y + 1.15 * radius * math.sin(a)) for a in angles
            ]
            draw.polygon(corners, fill=color)
        case "cross":
            arm = 0.36 * radius
            draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=color)
            draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=color)
        case _:
            raise AssertionError(shape)


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    for start in range(0, len(samples), _SAMPLES_PER_SHARD):
        with ShardWriter(folder / f"{start // _SAMPLES_PER_SHARD:05d}.tar") as writer:
            for sample in samples[start : start + _SAMPLES_PER_SHARD]:
                writer.write(sample)
