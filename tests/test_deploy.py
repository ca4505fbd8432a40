"""What the files of deploy/ name is there: paths, commands, options. They are not run here."""

import configparser
import json
import re
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from openblip.cli import app

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def check_command(words: list[str]) -> None:
    """Check that a command of openblip and its options exist."""
    result = CliRunner().invoke(app, [words[0], "--help"])
    assert result.exit_code == 0, result.output
    known = set(re.findall(r"--[\w-]+", result.output))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_dockerfile_copies_what_there_is_and_starts_the_server() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE)
              for path in line.split()]  # fmt: skip
    assert copied
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path.removeprefix('./')}" in ignored
    [entry] = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    assert json.loads(entry) == ["openblip"]
    start = re.findall(r"^CMD (.+)$", text, re.MULTILINE)[-1]
    check_command(json.loads(start))
    assert re.search(r"^USER openblip$", text, re.MULTILINE)
    extras = re.search(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(
        re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(",")
    )


def test_compose_builds_that_image_and_starts_the_server() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    ours = services["openblip"]
    assert (DEPLOY / ours["build"]["context"] / ours["build"]["dockerfile"]).is_file()
    check_command(ours["command"])
    assert all(port.startswith("127.0.0.1:") for one in services.values() for port in one["ports"])


def test_the_unit_starts_the_server_and_stops_it_kindly() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((DEPLOY / "openblip.service").read_text())
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert Path(program).name == "openblip"
    check_command(words)
    assert service["KillSignal"] == "SIGTERM"
    assert service["Restart"] == "on-failure"
