"""`openblip explain`: a picture, a table and JSON that say the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from openblip.checkpoint import load_tokenizer, save_checkpoint
from openblip.models.blip import Blip

from .conftest import MODEL


@pytest.fixture(scope="module")
def deep(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of two layers of text."""
    tokenizer = load_tokenizer(model)
    config = MODEL.build_config(tokenizer)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deep") / "model"
    blip = Blip(replace(config, text=replace(config.text, num_layers=2)))
    save_checkpoint(folder, blip, tokenizer, "# tiny\n")
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    return path


def test_a_figure_and_a_table(run, deep: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.png"
    result = run("explain", picture, "A red circle.", out, "--model", deep)
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["a", "red", "circle"]
    assert "2 x 2 patches" in lines[4]
    assert lines[5] == f"open {out}"
    assert Image.open(out).format == "PNG"
    told = run("explain", picture, "A red circle.", "--model", deep, "--json").json
    assert told["text"] == "a red circle"
    assert told["file"] is None
    assert (told["rows"], told["columns"]) == (2, 2)
    assert [word["text"] for word in told["words"]] == ["a", "red", "circle"]
    highest = max(heat for word in told["words"] for row in word["heat"] for heat in row)
    assert highest == pytest.approx(1.0)
    [judged] = run("match", picture, "A red circle.", "--model", deep, "--json").json["texts"]
    assert told["match_probability"] == pytest.approx(judged["match_probability"], abs=0.02)
    for name, kind in (("out.jpg", "JPEG"), ("out.webp", "WEBP")):
        assert run("explain", picture, "red", tmp_path / name, "--model", deep).code == 0
        assert Image.open(tmp_path / name).format == kind


def test_what_cannot_be_is_named(
    run, deep: Path, model: Path, picture: Path, tmp_path: Path
) -> None:
    def error(*arguments: object) -> str:
        result = run("explain", *arguments)
        assert (result.code, result.out) == (2, "")
        return str(result.err)

    assert "must end in .png" in error(picture, "red", tmp_path / "out.gif", "--model", deep)
    assert "name a picture to write" in error(picture, "red", "--model", deep)
    assert "no word to explain" in error(picture, "!", tmp_path / "o.png", "--model", deep)
    assert "expected 0 to 0" in error(
        picture, "red", tmp_path / "o.png", "--model", deep, "--layer", 1
    )
    assert "of one layer" in error(picture, "red", tmp_path / "o.png", "--model", model)
    (tmp_path / "no.png").write_bytes(b"no image")
    assert "not_an_image" in error(tmp_path / "no.png", "red", tmp_path / "o.png", "--model", deep)
    assert not (tmp_path / "o.png").exists()


def test_a_long_text_is_cut_and_said_so(run, deep: Path, picture: Path, tmp_path: Path) -> None:
    result = run("explain", picture, "red " * 40, tmp_path / "o.png", "--model", deep)
    assert result.code == 0
    assert "longer than 35 tokens" in result.err
