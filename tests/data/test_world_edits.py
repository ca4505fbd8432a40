from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openblip.data.samples import Sample
from openblip.data.sources import list_shards, read_samples
from openblip.data.world import (
    Scene,
    WorldConfig,
    draw_scene,
    draw_world,
    random_scene,
    trained_scenes,
)
from openblip.data.world_edits import EditsConfig, draw_edits, neighbours, tell, tell_change

SCENE = Scene("red", "circle", "small", "blue", "cross", "big", "left of", "black")


def read(folder: Path) -> list[Sample]:
    return [
        sample
        for shard in list_shards(folder)
        for sample in read_samples(shard, on_bad=lambda key, reason: pytest.fail(reason))
    ]


def test_a_change_is_told_if_the_object_can_be_named() -> None:
    blue = replace(SCENE, first_color="blue")
    assert tell_change(SCENE, blue) == "the same, but the circle is blue"
    assert tell_change(SCENE, replace(SCENE, second_shape="square")) == (
        "the same, but the blue one is a square"
    )
    assert tell_change(SCENE, replace(SCENE, second_size="small")) == (
        "the same, but the cross is small"
    )
    for other in (
        SCENE,
        replace(SCENE, relation="above"),
        replace(SCENE, background="gray"),
        replace(SCENE, first_color="blue", second_size="small"),
    ):
        assert tell_change(SCENE, other) is None
    # Two blue objects: which one is meant cannot be said by the colour.
    assert tell_change(blue, replace(blue, first_shape="square")) is None


def test_what_is_told_is_true_and_told_of_a_nameable_object() -> None:
    rng = np.random.default_rng(0)
    texts = {tell(SCENE, rng) for _ in range(200)}
    assert texts == {
        "the same, but the circle is red", "the same, but the circle is small",
        "the same, but the red one is a circle", "the same, but the cross is blue",
        "the same, but the cross is big", "the same, but the blue one is a cross",
    }  # fmt: skip
    # No word names one of two blue circles.
    assert tell(replace(SCENE, first_color="blue", second_shape="circle"), rng) is None


def test_neighbours_differ_in_one_thing() -> None:
    found = neighbours(SCENE)
    assert len(found) == len(set(found)) == 2 * (3 + 3 + 1) + 1 + 2
    assert SCENE not in found
    same_shape = replace(SCENE, second_shape="circle")
    assert replace(same_shape, first_color="blue") not in neighbours(same_shape)


def test_families_hold_every_answer(tmp_path: Path) -> None:
    draw_edits(EditsConfig(num_train=30, num_families=3, seed=4), tmp_path)
    train, test = read(tmp_path / "train"), read(tmp_path / "test")
    assert len(train) == 30
    assert len({sample.image_bytes for sample in test}) == len(test)
    for sample in train:
        assert "family" not in sample.meta
        assert 1 <= len(sample.captions) <= 2
        assert all(c.text.startswith("the same, but the ") for c in sample.captions)
    for number in range(3):
        family = [sample for sample in test if sample.meta["family"] == number]
        assert 15 <= len(family) <= 18
        assert family[0].meta["query"] is None
        queries = [sample.meta["query"] for sample in family if sample.meta["query"]]
        assert len(queries) == len(set(queries)) > 0


def test_no_original_and_no_answer_is_known_or_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[bytes, Scene] = {}

    def remember(scene: Scene, size_px: int, rng: np.random.Generator) -> bytes:
        image = draw_scene(scene, size_px, rng)
        drawn[image] = scene
        return image

    monkeypatch.setattr("openblip.data.world_edits.draw_scene", remember)
    rng = np.random.default_rng(7)
    known = {random_scene(rng) for _ in range(4000)}
    draw_edits(EditsConfig(num_train=200, num_families=4), tmp_path, known)
    train = {drawn[sample.image_bytes] for sample in read(tmp_path / "train")}
    test = read(tmp_path / "test")
    assert train.isdisjoint(drawn[sample.image_bytes] for sample in test)
    families = {sample.meta["family"]: sample for sample in reversed(test)}
    originals = {number: drawn[sample.image_bytes] for number, sample in families.items()}
    assert known.isdisjoint(originals.values())
    answers = [sample for sample in test if sample.meta["query"]]
    assert answers
    for sample in answers:
        scene = drawn[sample.image_bytes]
        assert scene not in known
        assert sample.meta["query"] == tell_change(originals[sample.meta["family"]], scene)


def test_trained_scenes_are_those_of_web_and_human(tmp_path: Path) -> None:
    config = WorldConfig(num_web=30, num_human=10, num_test=5, seed=3)
    drawn: list[Scene] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "openblip.data.world.draw_scene",
            lambda scene, size_px, rng: drawn.append(scene) or draw_scene(scene, size_px, rng),
        )
        draw_world(config, tmp_path)
    assert len(drawn) == 45
    assert trained_scenes(config) == set(drawn[:40])


def test_the_same_seed_draws_the_same_and_too_many_families_are_refused(tmp_path: Path) -> None:
    config = EditsConfig(num_train=5, num_families=1)
    draw_edits(config, tmp_path / "a")
    draw_edits(config, tmp_path / "b")
    for name in ("train/00000.tar", "test/00000.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    scene = random_scene(np.random.default_rng(0))
    assert scene == random_scene(np.random.default_rng(0))
    with pytest.raises(ValueError, match="not for 5000"):
        draw_edits(EditsConfig(num_families=5000), tmp_path / "c")
