"""What docs/capfilt.md tells of settings and commands is what there is, and all of it."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openblip.capfilt import keep
from openblip.capfilt.images import ImageChecks
from openblip.capfilt.keep import KeepRule
from openblip.capfilt.recipe import CapfiltRecipe
from openblip.cli import app
from openblip.config import Recipe, load_recipe
from openblip.generation import Decoding

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "capfilt.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}openblip (.+?)(?:\s+#.*)?$", TEXT, re.MULTILINE)
SUBCOMMANDS = {"run", "plan", "retry", "rethreshold", "report", "calibrate"}


def table(first_header: str) -> list[list[str]]:
    """Return the rows of the table whose first column has this header."""
    lines = TEXT.split(f"\n| {first_header} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_settings_has_every_key_and_no_other() -> None:
    parts: dict[str, type[Recipe]] = {"keep": KeepRule, "images": ImageChecks}
    there = {key for key in CapfiltRecipe.model_fields if key not in parts}
    there |= {f"{part}.{key}" for part, recipe in parts.items() for key in recipe.model_fields}
    told = [name.strip("`") for name, *_ in table("key")]
    assert sorted(told) == sorted(there)


def test_all_keys_of_the_decoding_are_told() -> None:
    [row] = [row for row in table("key") if row[0] == "`decoding`"]
    told = re.findall(r"`(\w+)`", row[1])
    assert sorted(told) == sorted(field.name for field in fields(Decoding))


def test_the_reasons_of_the_rule_are_told_in_its_order() -> None:
    told = [name for row in table("reason") for name in re.findall(r"`(\w+)`", row[0])]
    assert told == [
        keep.NOT_ASKED_FOR, keep.EMPTY, keep.DISSIMILAR, keep.UNMATCHED, keep.BELOW_SHARE,
        keep.DUPLICATE, keep.NEAR_DUPLICATE, keep.SECOND_CHOICE, keep.OUTRANKED, keep.TOO_COMMON,
    ]  # fmt: skip


def test_the_recipe_that_is_shown_is_one(tmp_path: Path) -> None:
    [shown] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    file = tmp_path / "mine.yaml"
    file.write_text(shown, encoding="utf-8")
    assert load_recipe(CapfiltRecipe, file).keep.threshold == 0.7


def test_the_code_that_is_shown_compiles() -> None:
    shown = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(shown) == 2
    for code in shown:
        compile(code, "docs/capfilt.md", "exec")


def test_every_command_of_capfilt_is_shown() -> None:
    assert {shlex.split(c)[1] for c in COMMANDS if c.startswith("capfilt ")} == SUBCOMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_its_options_and_settings_exist(command: str) -> None:
    words = shlex.split(command)
    names = words[: 2 if words[0] == "capfilt" else 1]
    result = CliRunner().invoke(app, [*names, "--help"])
    assert result.exit_code == 0, result.output
    known = re.findall(r"^ +(--[\w-]+)", result.output, re.MULTILINE)
    for option, value in zip(words, [*words[1:], ""], strict=True):
        if option.startswith("--"):
            assert option in known
        if option == "--set":
            rule = KeepRule if names[1] == "rethreshold" else CapfiltRecipe
            load_recipe(rule, None, [value])
