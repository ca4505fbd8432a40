from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from openblip.config import Recipe, RecipeError, dump_recipe, load_recipe


@dataclass(frozen=True)
class Decoding:
    method: Literal["greedy", "beam"] = "beam"
    num_beams: int = 3

    def __post_init__(self):
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; it must be at least 1")


class Optimizer(Recipe):
    learning_rate: float = 1e-3
    decay_all: bool = False


class Inner(Recipe):
    required: int
    optimizer: Optimizer = Optimizer(learning_rate=0.5)


class Example(Recipe):
    name: str = "run"
    steps: int = 10
    out: Path | None = None
    sizes: tuple[int, ...] = (1, 2)
    queue: int | Literal["off"] = 64
    optimizer: Optimizer = Optimizer(learning_rate=3e-4, decay_all=True)
    decoding: Decoding = Decoding(num_beams=5)
    weights: dict[str, float] = Field(default_factory=lambda: {"itc": 1.0})

    @model_validator(mode="after")
    def check(self):
        if self.steps > 1000 and self.name == "short":
            raise ValueError(f"steps is {self.steps}; a run named short takes at most 1000")
        return self


class NeedsInner(Recipe):
    inner: Inner


@pytest.fixture
def write(tmp_path: Path):
    def write_recipe(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def test_no_file_gives_the_defaults():
    assert load_recipe(Example, None) == Example()


def test_an_empty_file_gives_the_defaults(write):
    assert load_recipe(Example, write("# nothing yet\n")) == Example()


def test_file_values_and_types(write):
    recipe = load_recipe(
        Example,
        write(
            "name: off\nsteps: 57_600\nout: a/b\nsizes: [4, 5, 6]\noptimizer: {decay_all: false}"
        ),
    )
    assert recipe.name == "off"
    assert recipe.steps == 57_600
    assert recipe.out == Path("a/b")
    assert recipe.sizes == (4, 5, 6)


def test_a_part_that_is_given_in_part_keeps_the_other_defaults_of_its_owner():
    recipe = load_recipe(Example, None, ["optimizer.decay_all=false", "decoding.method=greedy"])
    assert recipe.optimizer == Optimizer(learning_rate=3e-4, decay_all=False)
    assert recipe.decoding == Decoding(method="greedy", num_beams=5)


def test_the_same_holds_inside_a_required_part(write):
    recipe = load_recipe(
        NeedsInner,
        write("inner: {required: 1, optimizer: {decay_all: true}}"),
        ["inner.required=2"],
    )
    assert recipe.inner == Inner(required=2, optimizer=Optimizer(learning_rate=0.5, decay_all=True))


def test_a_plain_mapping_is_replaced_as_a_whole():
    assert load_recipe(Example, None, ["weights={lm: 2}"]).weights == {"lm": 2.0}


def test_overrides_win_and_the_last_one_counts(write):
    recipe = load_recipe(
        Example,
        write("steps: 1"),
        ["steps=2", "steps=3", "out=null", "optimizer.learning_rate=1e-5", "name=a=b", "queue=off"],
    )
    assert (recipe.steps, recipe.out, recipe.name, recipe.queue) == (3, None, "a=b", "off")
    assert recipe.optimizer.learning_rate == 1e-5


def test_an_override_leaves_an_alias_of_the_same_part_alone(write):
    class Twice(Recipe):
        a: Optimizer = Optimizer()
        b: Optimizer = Optimizer()

    recipe = load_recipe(Twice, write("a: &x {learning_rate: 2}\nb: *x\n"), ["a.learning_rate=3"])
    assert (recipe.a.learning_rate, recipe.b.learning_rate) == (3.0, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"unknown key stepz \(value 3\); did you mean steps\?"),
        ("zzz: 3", "known keys: decoding, name, optimizer"),
        ("optimizer: {learning_rat: 3}", r"optimizer\.learning_rat .*did you mean learning_rate"),
        ("decoding: {beams: 3}", r"unknown key decoding\.beams .*did you mean num_beams"),
        ("steps: '5'", "steps is '5': it should be a valid integer"),
        ("steps: true", "steps is True: it should be a valid integer"),
        ("steps: 010", "steps is '010'"),
        ("steps: 1:30", "steps is '1:30'"),
        ("sizes: [1, x]", r"sizes\.1 is 'x'"),
        ("queue: 2.5", r"queue is 2\.5"),
        ("optimizer: 3", "optimizer is 3"),
        ("optimizer: {decay_all: yes}", r"optimizer\.decay_all is 'yes'"),
        ("optimizer: {learning_rate: .nan}", r"learning_rate is '\.nan'"),
        ("optimizer: {learning_rate: 1e999}", "learning_rate is inf"),
        ("decoding: {num_beams: 0}", "decoding: num_beams is 0; it must be at least 1"),
        ("decoding: {method: bean}", "decoding.method is 'bean': it should be 'greedy' or 'beam'"),
        ("name: short\nsteps: 2000", "recipe.yaml: steps is 2000; a run named short"),
        ("steps: 1\nsteps: 2", "line 2, column 1: the key 'steps' stands twice"),
        ("1: 2", "the key 1 is not text"),
        ("name: [", "line 1"),
        ("- a\n- b", "must be `key: value` lines"),
        ("name: !!binary aGk=", "values must be text"),
        ("weights: &x {a: *x}", "values must be text"),
        ("name: \0", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(Example, write(text))


def test_every_problem_is_named_at_once(write):
    with pytest.raises(RecipeError, match=r"steps is 'a'.*; unknown key b"):
        load_recipe(Example, write("steps: a\nb: 1"))


def test_a_missing_key_is_named(write):
    with pytest.raises(RecipeError, match=r"inner\.required is missing"):
        load_recipe(NeedsInner, write("inner: {}"))
    with pytest.raises(RecipeError, match="inner is missing"):
        load_recipe(NeedsInner, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "write key=value"),
        ("a..b=1", "write key=value"),
        ("=1", "write key=value"),
        ("steps.more=1", "unknown key|steps is"),
        ("steps=[", "the value of 'steps=\\['"),
    ],
)
def test_impossible_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(Example, None, [override])


def test_an_override_below_a_plain_value(write):
    with pytest.raises(RecipeError, match="steps is 5, which has no keys"):
        load_recipe(Example, write("steps: 5"), ["steps.more=1"])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml cannot be read: No such file"):
        load_recipe(Example, tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(Example, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(Example, tmp_path / "latin.yaml")


def test_recipes_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Example().steps = 3


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        [
            "yes",
            "3e-4",
            "null",
            "~",
            "",
            "010",
            "true",
            "1_0",
            "<<",
            ".5",
            "# a",
            "=",
            "\x85",
            "a\u2028b",
        ]
    ),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(0, 2**63),
)
def test_a_dump_reads_back_equal(tmp_path_factory, name, rate, steps):
    recipe = Example(
        name=name, steps=steps, out=Path("x"), optimizer=Optimizer(learning_rate=rate), queue="off"
    )
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(Example, path) == recipe
