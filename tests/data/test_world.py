import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from openblip.data import world
from openblip.data.samples import Sample
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    WorldConfig,
    describe,
    draw_placed,
    draw_scene,
    draw_world,
    list_objects,
    place_objects,
)
from openblip.images import decode_image

CONFIG = WorldConfig(num_web=600, num_human=40, num_test=30, seed=5)
OPPOSITES = {"left of": "right of", "above": "below"}
CHOICES = {
    "color": tuple(COLORS),
    "shape": tuple(SHAPES),
    "size": tuple(SIZES),
    "relation": tuple(RELATIONS),
    "background": tuple(BACKGROUNDS),
}

scenes = st.builds(
    Scene,
    **{
        field.name: st.sampled_from(CHOICES[field.name.rpartition("_")[2]])
        for field in fields(Scene)
    },
).filter(
    lambda scene: (scene.first_color, scene.first_shape) != (scene.second_color, scene.second_shape)
)
seeds = st.integers(0, 2**31)


def one_of(words: Sequence[str]) -> str:
    return f"({'|'.join(map(re.escape, words))})"


NOUN = f"(?:{one_of(CHOICES['size'])} )?{one_of(CHOICES['color'])} {one_of(CHOICES['shape'])}"
PLACE = f"(?: on {one_of(CHOICES['background'])})?"
CAPTION = re.compile(f"{NOUN} {one_of([*OPPOSITES, *OPPOSITES.values()])} {NOUN}{PLACE}")
LIST = re.compile(f"{NOUN} and {NOUN}{PLACE}")


def is_true(text: str, scene: Scene) -> bool:
    """Say whether all that a caption tells is so in the scene; other texts tell nothing true."""
    nouns = (
        (scene.first_size, scene.first_color, scene.first_shape),
        (scene.second_size, scene.second_color, scene.second_shape),
    )
    if listed := LIST.fullmatch(text):
        first, second = listed.groups()[:3], listed.groups()[3:6]
        return listed[7] in (None, scene.background) and any(
            _fits(first, one) and _fits(second, other) for one, other in (nouns, nouns[::-1])
        )
    told = CAPTION.fullmatch(text)
    if told is None:
        return False
    first, relation, second = told.groups()[:3], told[4], told.groups()[4:7]
    background = told[8]
    if relation != scene.relation:
        if OPPOSITES[scene.relation] != relation:
            return False
        first, second = second, first
    return (
        _fits(first, nouns[0])
        and _fits(second, nouns[1])
        and background in (None, scene.background)
    )


def tells(text: str) -> bool:
    """Say whether a text speaks of a scene, truly or not."""
    return bool(CAPTION.fullmatch(text) or LIST.fullmatch(text))


def _fits(told: Sequence[str | None], noun: tuple[str, str, str]) -> bool:
    return all(said in (None, so) for said, so in zip(told, noun, strict=True))


def read(folder: Path) -> list[Sample]:
    def refuse(key: str, reason: str) -> None:
        raise AssertionError(f"{key}: {reason}")

    return [s for shard in list_shards(folder) for s in read_samples(shard, on_bad=refuse)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Sample, Scene]]]:
    """Draw a world; return its samples with the scenes that were drawn for them."""
    folder, record = tmp_path_factory.mktemp("world"), list[Scene]()
    draw: Callable[..., bytes] = world.draw_scene

    def recording(scene: Scene, *arguments: Any) -> bytes:
        record.append(scene)
        return draw(scene, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "draw_scene", recording)
        draw_world(CONFIG, folder)
    sets, start = {}, 0
    for name in ("web", "human", "test"):
        samples = read(folder / name)
        sets[name] = list(zip(samples, record[start : start + len(samples)], strict=True))
        start += len(samples)
    assert start == len(record)
    return sets


@given(scenes, seeds)
def test_a_description_tells_nothing_untrue(scene: Scene, seed: int) -> None:
    assert is_true(describe(scene, np.random.default_rng(seed)), scene)


@given(scenes, seeds)
def test_a_list_of_objects_tells_nothing_untrue(scene: Scene, seed: int) -> None:
    text = list_objects(scene, np.random.default_rng(seed))
    assert LIST.fullmatch(text)
    assert is_true(text, scene)


@given(scenes, scenes, seeds)
def test_a_description_of_other_objects_is_untrue(a: Scene, b: Scene, seed: int) -> None:
    assume((a.first_color, a.first_shape) != (b.first_color, b.first_shape))
    assert not is_true(describe(a, np.random.default_rng(seed)), b)


def test_descriptions_vary(drawn: dict[str, list[tuple[Sample, Scene]]]) -> None:
    _, scene = drawn["web"][0]
    texts = {describe(scene, np.random.default_rng(seed)) for seed in range(100)}
    assert len(texts) > 5
    assert any(scene.background in text for text in texts)
    assert not all(scene.background in text for text in texts)


def pixels_of(color: str, image: np.ndarray) -> np.ndarray:
    """Return rows and columns (2, N) of the pixels that are nearest to this colour of all."""
    palette = np.array([COLORS[color], *COLORS.values(), *BACKGROUNDS.values()])
    distance = np.linalg.norm(image[:, :, None].astype(float) - palette, axis=-1)
    return np.array(np.nonzero((distance[:, :, 0] < 60) & (distance.argmin(axis=-1) == 0)))


@settings(max_examples=60)
@given(scenes.filter(lambda scene: scene.first_color != scene.second_color), seeds)
def test_objects_are_where_the_caption_says(scene: Scene, seed: int) -> None:
    data = draw_scene(scene, 64, np.random.default_rng(seed))
    image = np.asarray(decode_image(data))
    first, second = (pixels_of(c, image) for c in (scene.first_color, scene.second_color))
    assert min(first.shape[1], second.shape[1]) >= 8
    axis = {"left of": 1, "above": 0}[scene.relation]
    between = image.shape[0] / 2
    assert np.median(first[axis]) < between < np.median(second[axis])


@settings(max_examples=60)
@given(scenes.filter(lambda scene: scene.first_color != scene.second_color), seeds)
def test_an_object_fills_its_box(scene: Scene, seed: int) -> None:
    size_px = 128
    places = place_objects(scene, np.random.default_rng(seed))
    data = draw_scene(scene, size_px, np.random.default_rng(seed))
    assert data == draw_placed(scene, places, size_px)
    image = np.asarray(decode_image(data))
    for (color, shape), place in zip(scene.objects, places, strict=True):
        rows, columns = pixels_of(color, image)
        drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        box = [size_px * edge for edge in place.box(shape)]
        # Corners of a triangle are fainter than a pixel.
        assert drawn == pytest.approx(box, abs=5 if shape == "triangle" else 2)


@settings(max_examples=30)
@given(scenes, seeds)
def test_a_big_object_is_bigger(scene: Scene, seed: int) -> None:
    scene = replace(scene, second_color=next(c for c in COLORS if c != scene.first_color))
    small, big = (
        pixels_of(
            scene.first_color,
            np.asarray(
                decode_image(
                    draw_scene(replace(scene, first_size=size), 64, np.random.default_rng(seed))
                )
            ),
        ).shape[1]
        for size in ("small", "big")
    )
    assert big > 1.5 * small


@given(scenes, st.integers(16, 64))
@settings(max_examples=20)
def test_an_image_has_the_size_that_was_asked_for(scene: Scene, size_px: int) -> None:
    image = decode_image(draw_scene(scene, size_px, np.random.default_rng(0)))
    assert image.size == (size_px, size_px)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    config = WorldConfig(num_web=30, num_human=5, num_test=5, seed=3)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_world(replace(config, seed=seed), tmp_path / name)
    a, b, c = (
        [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.tar"))] for name in "abc"
    )
    assert a == b
    assert a != c


def test_the_three_sets_are_whole(drawn: dict[str, list[tuple[Sample, Scene]]]) -> None:
    sizes = {name: len(pairs) for name, pairs in drawn.items()}
    assert sizes == {"web": CONFIG.num_web, "human": CONFIG.num_human, "test": CONFIG.num_test}
    keys = [sample.key for pairs in drawn.values() for sample, _ in pairs]
    assert len(set(keys)) == len(keys)


def test_no_scene_of_the_test_set_is_elsewhere(
    drawn: dict[str, list[tuple[Sample, Scene]]],
) -> None:
    web, human, held_out = ({scene for _, scene in drawn[name]} for name in drawn)
    assert len(held_out) == CONFIG.num_test
    assert not held_out & (web | human)


def test_human_captions_are_true(drawn: dict[str, list[tuple[Sample, Scene]]]) -> None:
    for name in ("human", "test"):
        for sample, scene in drawn[name]:
            assert len(sample.captions) == CONFIG.human_captions
            assert all(caption.source == "human" for caption in sample.captions)
            assert all(is_true(caption.text, scene) for caption in sample.captions)
            assert "noise" not in sample.meta


def test_the_planted_truth_of_web_captions_is_right(
    drawn: dict[str, list[tuple[Sample, Scene]]],
) -> None:
    for sample, scene in drawn["web"]:
        [caption] = sample.captions
        assert caption.source == "web"
        assert is_true(str(sample.meta["true_caption"]), scene)
        is_clean = sample.meta["noise"] == "none"
        assert is_true(caption.text, scene) == is_clean, (caption.text, scene)
        if is_clean:
            assert caption.text == sample.meta["true_caption"]


def test_each_kind_of_noise_is_what_it_says(
    drawn: dict[str, list[tuple[Sample, Scene]]],
) -> None:
    texts = defaultdict(list)
    for sample, scene in drawn["web"]:
        texts[sample.meta["noise"]].append((sample.captions[0].text, scene))
    assert all(tells(text) for text, _ in texts["other_caption"])
    assert not any(tells(text) for text, _ in texts["alt_text"])
    names = [field.name for field in fields(Scene)]
    for text, scene in texts["wrong_attribute"]:
        nearly = (
            replace(scene, **{name: value})
            for name in names
            for value in CHOICES[name.rpartition("_")[2]]
        )
        assert any(is_true(text, other) for other in nearly), (text, scene)


def test_each_kind_of_noise_has_its_share(drawn: dict[str, list[tuple[Sample, Scene]]]) -> None:
    counts = Counter(sample.meta["noise"] for sample, _ in drawn["web"])
    kinds = counts.keys() - {"none"}
    assert len(kinds) >= 3
    for kind, expected in {
        "none": 1 - CONFIG.noise_rate,
        **dict.fromkeys(kinds, CONFIG.noise_rate / len(kinds)),
    }.items():
        deviation = (expected * (1 - expected) / CONFIG.num_web) ** 0.5
        assert abs(counts[kind] / CONFIG.num_web - expected) < 4 * deviation, counts


def test_captions_are_lists_as_often_as_asked(
    drawn: dict[str, list[tuple[Sample, Scene]]],
) -> None:
    for name, expected in (
        ("web", CONFIG.web_lists),
        ("human", CONFIG.human_lists),
        ("test", CONFIG.human_lists),
    ):
        texts = [s.meta.get("true_caption", s.captions[0].text) for s, _ in drawn[name]]
        share = sum(bool(LIST.fullmatch(text)) for text in texts) / len(texts)
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / len(texts)) ** 0.5, name


def test_without_noise_every_web_caption_is_true(tmp_path: Path) -> None:
    config = WorldConfig(num_web=50, num_human=2, num_test=2, noise_rate=0.0)
    draw_world(config, tmp_path)
    assert {sample.meta["noise"] for sample in read(tmp_path / "web")} == {"none"}


def test_a_long_set_is_cut_into_shards(tmp_path: Path) -> None:
    draw_world(WorldConfig(image_size_px=8, num_web=1001, num_human=1, num_test=1), tmp_path)
    assert len(list_shards(tmp_path / "web")) > 1
    assert len(read(tmp_path / "web")) == 1001
