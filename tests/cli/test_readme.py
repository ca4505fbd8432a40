"""What the README shows can be typed: commands, options, files."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openblip.cli import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}openblip (.+?)(?:\s+#.*)?$", TEXT, re.MULTILINE)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_options_exist(command: str) -> None:
    words = shlex.split(command)
    names = [words[0]]
    if words[0] in {"finetune", "capfilt", "evaluate"}:
        names.append(words[1])
    if words[0] == "index":
        names.append("add")  # what it does unless told otherwise
    result = CliRunner().invoke(app, [*names, "--help"])
    assert result.exit_code == 0, result.output
    for option in (word for word in words if word.startswith("--")):
        assert option in result.output


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"\b(?:recipes|docs|runs|tests)/[\w./-]+\w", TEXT)
    assert named
    # `make demo` writes runs/quickstart; before that it is not there.
    made = "runs/quickstart/"
    assert not [n for n in named if not n.startswith(made) and not (ROOT / n).exists()]
