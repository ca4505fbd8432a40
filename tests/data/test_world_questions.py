from pathlib import Path

import numpy as np
import pytest

from openblip.data.sources import list_shards, read_samples
from openblip.data.world import Scene, WorldConfig, held_out_scenes, random_scene
from openblip.data.world_questions import (
    KINDS,
    QUESTIONS_PER_IMAGE,
    QuestionsConfig,
    ask,
    draw_questions,
)

SCENE = Scene("red", "circle", "small", "blue", "cross", "big", "left of", "black")


def answers(scene: Scene, number: int = 4000) -> dict[str, set[str]]:
    """Return every question that is asked of a scene, with all of its answers."""
    rng, found = np.random.default_rng(0), {}
    for _ in range(number):
        one = ask(scene, rng)
        found.setdefault(one.question, set()).add(one.answer)
    return found


def test_every_question_has_one_answer_and_it_is_the_true_one() -> None:
    found = answers(SCENE)
    assert all(len(several) == 1 for several in found.values())
    told = {question: next(iter(several)) for question, several in found.items()}
    for question, answer in {
        "what color is the circle?": "red", "what colour is the cross?": "blue",
        "what shape is the red one?": "circle", "which shape is blue?": "cross",
        "how big is the circle?": "small", "is the blue cross big?": "yes",
        "is the red one big?": "no", "is there a red circle?": "yes", "is there a red cross?": "no",
        "is there something green?": "no", "is there a circle?": "yes", "is there a square?": "no",
        "what is left of the cross?": "red circle", "what is left of the circle?": "nothing",
        "what is right of the circle?": "blue cross", "what is above the cross?": "nothing",
        "which color is right of the red one?": "blue",
        "which shape is left of the blue cross?": "circle",
        "is the circle left of the cross?": "yes", "is the circle right of the cross?": "no",
        "is the cross right of the red one?": "yes", "is the cross below the circle?": "no",
        "what color is the background?": "black", "how many circles are there?": "1",
        "how many crosses are there?": "1", "how many red ones are there?": "1",
        "how many squares are there?": "0",
    }.items():  # fmt: skip
        assert told[question] == answer, question


def test_nothing_is_asked_that_two_objects_could_answer() -> None:
    alike = answers(Scene("red", "circle", "small", "red", "cross", "big", "above", "gray"))
    assert all(len(several) == 1 for several in alike.values())
    assert not any("red one?" in question or "is red" in question for question in alike)
    assert alike["how many red ones are there?"] == {"2"}
    assert alike["what is above the cross?"] == {"red circle"}
    alike = answers(Scene("red", "circle", "small", "blue", "circle", "big", "above", "gray"))
    assert not any(question.endswith("is the circle?") for question in alike)


def test_all_kinds_are_asked_and_yes_and_no_are_alike_often() -> None:
    rng = np.random.default_rng(0)
    asked = [ask(random_scene(rng), rng) for _ in range(4000)]
    assert {one.kind for one in asked} == set(KINDS)
    for kind in ("is_there", "is_placed"):
        said = [one.answer for one in asked if one.kind == kind]
        assert set(said) == {"yes", "no"}
        assert said.count("yes") / len(said) == pytest.approx(0.5, abs=0.06)


def test_both_sets_are_written_the_same_with_the_same_seed(tmp_path: Path) -> None:
    held_out = held_out_scenes(WorldConfig(num_web=30, num_human=3, num_test=5))
    assert len(held_out) == 5
    for name in ("a", "b"):
        draw_questions(QuestionsConfig(num_train=7, seed=3), tmp_path / name, held_out)
    for name, number in (("train", 7), ("test", 5)):
        a, b = (tmp_path / folder / name / "00000.tar" for folder in ("a", "b"))
        assert a.read_bytes() == b.read_bytes()
        [shard] = list_shards(a)
        samples = list(read_samples(shard, on_bad=lambda key, reason: pytest.fail(reason)))
        assert len(samples) == number
        for sample in samples:
            assert len(sample.meta["qa"]) == QUESTIONS_PER_IMAGE
            assert sample.captions == ()
