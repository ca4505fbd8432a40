"""What all commands share: help without torch, exit codes, messages."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openblip import __version__

COMMANDS = [
    "", "quickstart", "draw", "bootstrap", "pretrain", "finetune", "finetune captioning",
    "finetune retrieval", "finetune reconstruction", "finetune vqa", "finetune nlvr",
    "capfilt", "capfilt run", "capfilt rethreshold", "capfilt report",
    "capfilt plan", "capfilt retry", "capfilt calibrate", "evaluate",
    "evaluate retrieval", "evaluate captioning", "evaluate classification", "evaluate video",
    "evaluate vqa", "evaluate nlvr", "caption", "match", "refine", "ask", "questions", "classify",
    "explain", "convert", "push", "bench", "serve", "index",
    "index add", "index delete", "index merge", "index compact", "index show", "index store",
    "search", "cluster", "export", "export onnx",
]  # fmt: skip

HELP_WITHOUT_TORCH = """
import sys
from typer.testing import CliRunner
from openblip.cli import app
for command in sys.argv[1:]:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0, (command, result.output)
    print(result.stdout)
    assert "torch" not in sys.modules, command
"""


def test_help_of_every_command_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_TORCH, *COMMANDS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(COMMANDS)
    # Every command that gives an answer gives it as JSON too; groups give none,
    # nor does a server.
    groups = {"", "finetune", "capfilt", "evaluate", "export", "index"}
    has_none = groups | {"serve"}
    assert done.stdout.count("--json") == len(set(COMMANDS) - has_none)


def test_the_list_of_commands_above_is_whole() -> None:
    import typer.main

    from openblip.cli import app

    found = {""}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found.add(name)
        found |= {f"{name} {inner}" for inner in getattr(command, "commands", {})}
    assert found == set(COMMANDS)


def test_help_comes_in_two_seconds() -> None:
    # The best of three: others may use the machine.
    times = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "openblip", "--help"], check=True, stdout=-3)
        times.append(time.monotonic() - start)
    assert min(times) < 2.0


def test_version(run) -> None:
    assert run("--version").out == f"openblip {__version__}\n"


@pytest.mark.parametrize("arguments", ["", "caption", "nonsense", "capfilt report --nonsense ."])
def test_a_wrong_call_is_told_apart(run, arguments: str) -> None:
    result = run(*arguments.split())
    assert result.code == 2
    assert "Traceback" not in result.err


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, tmp_path: Path) -> None:
    code = (
        "import openblip.capfilt.report as report, openblip.cli as cli\n"
        "report.write_capfilt_report = lambda folder: {}['absent']\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "capfilt", "report", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'absent'" in done.stderr


def test_ctrl_c_is_a_sentence_and_130(model: Path, world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: [{world / 'human'}]\ninit: {model}\nnum_steps: 1000000\nbatch_size: 4\n"
        "max_tokens: 20\nrandaugment_ops: 0\n"
    )
    arguments = ["finetune", "captioning", str(recipe), "--out", str(tmp_path / "new")]
    process = subprocess.Popen(
        [sys.executable, "-m", "openblip", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell that runs the tests in the background lets its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "new.log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.endswith("openblip: stopped by Ctrl-C\n")
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
