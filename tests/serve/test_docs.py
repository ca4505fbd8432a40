"""What docs/serving.md tells of endpoints, options, statuses and metrics is what there is."""

import re
from pathlib import Path

from typer.testing import CliRunner

from openblip.cli import app
from openblip.serve import errors
from openblip.serve.settings import ServerSettings

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def first_cells(first_header: str) -> list[str]:
    """Return the first column of the table whose first header this is."""
    lines = TEXT.split(f"\n| {first_header} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [line.strip("|").split("|")[0].strip(" `") for line in lines]


def test_every_endpoint_is_told(running) -> None:
    paths = running.client.get("/openapi.json").json()["paths"]
    for path in paths:
        assert path.split("/{")[0] in TEXT, path


def test_the_fields_of_the_commands_are_those_of_the_endpoints(running) -> None:
    document = running.client.get("/openapi.json").json()
    commands = re.findall(r"^ {4}curl .*?:8000(/v1/\w+)(.*)$", TEXT, re.MULTILINE)
    assert len(commands) >= 10
    for path, options in commands:
        if fields := re.findall(r"-F (\w+)=", options):
            body = document["paths"][path]["post"]["requestBody"]["content"]
            [name] = {one["schema"]["$ref"].rsplit("/", 1)[1] for one in body.values()}
            assert set(fields) <= set(document["components"]["schemas"][name]["properties"]), path


def test_the_options_and_their_defaults_are_those_of_the_command() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], terminal_width=200).stdout
    for option in first_cells("option"):
        assert option.split()[0] in shown, option
    settings = ServerSettings()
    for option, default in (
        ("--max-active N", settings.max_active),
        ("--burst N", settings.burst),
        ("--max-upload-mb N", settings.max_upload_bytes // 10**6),
        ("--answer-timeout S", round(settings.answer_timeout_s)),
        ("--drain-timeout S", round(settings.drain_timeout_s)),
    ):
        assert f"| `{option}` | {default} |" in TEXT


def test_all_statuses_are_told() -> None:
    assert {int(one) for one in first_cells("status")} == {*errors._CODES, 500}


def test_all_metrics_are_told(running) -> None:
    there = set(re.findall(r"^# HELP (\S+)", running.client.get("/metrics").text, re.MULTILINE))
    told = set(first_cells("name"))
    assert told == {name for name in there if not name.endswith("_created")}
