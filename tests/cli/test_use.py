"""Commands that use a model: caption, match, evaluate, convert."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openblip.checkpoint import load_checkpoint, save_checkpoint, with_roles
from openblip.data.sources import list_shards, read_samples
from openblip.evaluation.caption_metrics import score_captions
from openblip.models.blip import Blip
from openblip.models.reconstruction import ReconstructionConfig


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """Return a folder: three images in two levels, and all that may be wrong with a file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    [shard] = list_shards(world / "human")
    samples = list(read_samples(shard, on_bad=lambda key, reason: None))[:3]
    for name, sample in zip(("a.jpg", "b.jpg", "more/c.jpg"), samples, strict=True):
        (folder / name).write_bytes(sample.image_bytes)
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "cut.jpg").write_bytes(samples[0].image_bytes[:-200])
    (folder / "link.jpg").symlink_to(folder / "gone.jpg")
    return folder


GOOD = ["a.jpg", "b.jpg", "more/c.jpg"]
BAD = {
    "damaged/cut.jpg": "truncated", "empty.png": "empty", "link.jpg": "not_a_file",
    "notes.txt": "not_an_image",
}  # fmt: skip


def test_a_folder_is_captioned_but_for_what_is_named(run, model: Path, photos: Path) -> None:
    result = run("caption", photos, "--model", model, "--max-tokens", 8, "--batch-size", 2)
    assert result.code == 0
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert [path for path, _ in lines] == [str(photos / name) for name in GOOD]
    for name, reason in BAD.items():
        assert f"not captioned: {photos / name}: {reason}" in result.err
    assert "4 of 7 files were not captioned" in result.err


def test_captions_as_json(run, model: Path, photos: Path) -> None:
    arguments = ("caption", photos, "--model", model, "--max-tokens", 8, "--json")
    result = run(*arguments, "--captions", 2, "--method", "nucleus", "--strict")
    assert result.code == 1
    assert [image["path"] for image in result.json["images"]] == [str(photos / n) for n in GOOD]
    for image in result.json["images"]:
        assert len(image["captions"]) == 2
        for caption in image["captions"]:
            assert isinstance(caption["text"], str)
            assert caption["mean_log_probability"] < 0.0
    failed = {item["path"]: item["reason"] for item in result.json["failed"]}
    assert failed.keys() == {str(photos / name) for name in BAD}
    assert all(failed[str(photos / name)].startswith(reason) for name, reason in BAD.items())
    # A caption depends on its file and the seed, not on what else is there.
    alone = run(
        "caption", photos / "b.jpg", "--model", model, "--max-tokens", 8, "--json",
        "--captions", 2, "--method", "nucleus", "--strict",
    )  # fmt: skip
    assert alone.code == 0
    texts = [[one["text"] for one in image["captions"]] for image in result.json["images"]]
    assert [one["text"] for one in alone.json["images"][0]["captions"]] == texts[1]
    other = run(*arguments, "--captions", 2, "--method", "nucleus", "--seed", 7).json["images"]
    assert [[one["text"] for one in image["captions"]] for image in other] != texts


def test_the_process_prints_nothing_but_json_on_stdout(model: Path, photos: Path) -> None:
    """In a real process, where logging and progress have the real streams."""
    odd = photos / b"odd\xff.jpg".decode("utf-8", "surrogateescape")
    odd.write_bytes((photos / "a.jpg").read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "openblip", "caption", str(photos), "--model", str(model), "--json"],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    paths = [image["path"] for image in json.loads(done.stdout)["images"]]
    assert str(odd) in paths
    assert len(paths) == 4
    assert b"notes.txt: not_an_image" in done.stderr


def test_captions_reach_a_file_while_a_terminal_shows_progress(model: Path, photos: Path) -> None:
    terminal, end = os.openpty()
    arguments = ["caption", str(photos), "--model", str(model), "--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "openblip", *arguments], stdout=subprocess.PIPE, stderr=end
    )
    os.close(end)
    assert done.returncode == 0
    assert [line.split(b"\t")[0].decode() for line in done.stdout.splitlines()] == [
        str(photos / name) for name in GOOD
    ]
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert "captions" in shown
    assert "7/7" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", "{photos}/absent", "--model", "{model}"), "no file or folder at"),
        (("caption", "{photos}", "--model", "{photos}"), "is no checkpoint: it lacks config.json"),
        (("caption", "{photos}", "--model", "no such/model name"), "no such/model name"),
        (("caption", "{photos}", "--model", "{model}", "--top-p", "2"), "top_p 2.0 must be in"),
        (("caption", "{photos}", "--model", "{model}", "--captions", "4"), "beam gives 1 to 3"),
        (("match", "{photos}/absent.jpg", "a", "--model", "{model}"), "absent.jpg: No such file"),
        (("match", "{photos}/damaged/cut.jpg", "a", "--model", "{model}"), "cut.jpg: truncated"),
        (("evaluate", "retrieval", "{model}", "{photos}/more/c.jpg"), "is no data set"),
        (
            ("evaluate", "captioning", "{model}", "{photos}"),
            "sample a is unusable: it has no caption",
        ),
        (
            ("evaluate", "captioning", "{model}", "{photos}/damaged"),
            "sample cut is unusable: truncated",
        ),
        (("convert", "{photos}/absent.pth", "{photos}/new"), "absent.pth"),
        (("convert", "{model}", "{model}"), "exists"),
        (("convert", "{model}", "{photos}/new"), "expected 'blip'"),
        (
            ("convert", "{model}", "{photos}/new", "--architecture", "BlipForImageTextRetrieval"),
            "is for --to transformers alone",
        ),
        (
            ("convert", "{model}", "{photos}/new", "--to", "transformers", "--config", "{photos}"),
            "leave --config, --vocabulary out",
        ),
        (("convert", "{model}", "{photos}/new", "--to", "transformers"), "choose an architecture"),
    ],
)
def test_what_the_user_can_put_right(
    run, model: Path, photos: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run(
        *(a.replace("{photos}", str(photos)).replace("{model}", str(model)) for a in arguments)
    )
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("openblip: ")
    assert result.out == ""


def test_match_judges_every_text(run, model: Path, photos: Path) -> None:
    texts = ["a red circle", "a blue square above a green cross"]
    result = run("match", photos / "a.jpg", *texts, "--model", model, "--json")
    assert result.code == 0
    assert [one["text"] for one in result.json["texts"]] == texts
    for one in result.json["texts"]:
        assert 0.0 < one["match_probability"] < 1.0
        assert -1.0 <= one["similarity"] <= 1.0
    shown = run("match", photos / "a.jpg", *texts, "--model", model).out.splitlines()
    assert shown[0].split() == ["match_probability", "similarity", "text"]
    first = result.json["texts"][0]
    assert shown[1].split(maxsplit=2) == [
        f"{first['match_probability']:.4f}", f"{first['similarity']:.4f}", texts[0],
    ]  # fmt: skip
    long = run("match", photos / "a.jpg", "red " * 40, "--model", model)
    assert "1 texts are longer than 35 tokens and were cut" in long.err


@pytest.fixture
def refiner(model: Path, tmp_path: Path) -> Path:
    """Return the same model with a reconstruction head of random weights."""
    blip, tokenizer = load_checkpoint(model)
    torch.manual_seed(1)
    with_head = Blip(replace(blip.config, reconstruction=ReconstructionConfig()))
    with_head.load_state_dict(with_head.state_dict() | blip.state_dict())
    save_checkpoint(tmp_path / "refiner", with_head, tokenizer, "# refiner\n")
    return tmp_path / "refiner"


def test_refine_gives_an_embedding(run, refiner: Path, photos: Path) -> None:
    arguments = ("refine", photos / "a.jpg", "the circle is blue", "--model", refiner)
    result = run(*arguments, "--json")
    assert result.code == 0
    embedding = result.json["image_embedding"]
    assert math.hypot(*embedding) == pytest.approx(1.0, abs=1e-5)
    assert result.json.keys() == {
        "image", "text", "similarity_to_image", "similarity_to_text", "similarity_to_text_before",
        "image_embedding",
    }  # fmt: skip
    assert run(*arguments).out.count("similarity") == 3


def test_refine_tells_what_it_cannot_use(run, model: Path, refiner: Path, photos: Path) -> None:
    for image, which, message in (
        ("a.jpg", model, "no reconstruction head"),
        ("notes.txt", refiner, "notes.txt: "),
    ):
        result = run("refine", photos / image, "blue", "--model", which)
        assert result.code == 2
        assert message in result.err


def test_evaluate_retrieval(run, model: Path, world: Path) -> None:
    result = run("evaluate", "retrieval", model, world / "test", "--shortlist", 4, "--json")
    assert result.code == 0
    assert (result.json["num_images"], result.json["num_texts"]) == (8, 24)
    assert result.json["shortlist"] == 4
    text = run("evaluate", "retrieval", model, world / "test", "--shortlist", 4).out
    assert f"{result.json['reranked']['tr_at_1']:.2f}" in text
    assert "8 images, 24 texts, shortlist 4" in text


def test_evaluate_captioning_and_its_coco_results(
    run, model: Path, world: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "results.json"
    result = run(
        "evaluate", "captioning", model, world / "test", "--beam", 2, "--prompt", "",
        "--predictions", file, "--json",
    )  # fmt: skip
    assert result.code == 0
    predictions = json.loads(file.read_text())
    assert {one["image_id"]: one["caption"] for one in predictions} == result.json["captions"]
    [shard] = list_shards(world / "test")
    references = {
        sample.key: [caption.text for caption in sample.captions]
        for sample in read_samples(shard, on_bad=lambda key, reason: None)
    }
    expected = score_captions(result.json["captions"], references).to_json()
    assert result.json["scores"] == pytest.approx(expected)
    assert all(math.isfinite(value) for value in result.json["scores"].values())


def test_a_released_checkpoint_converts(run, reference: Path, tmp_path: Path) -> None:
    arguments = ("--config", reference / "config.json", "--json")
    source = reference / "pretrain_init.safetensors"
    result = run("convert", source, tmp_path / "model", *arguments)
    assert result.code == 0
    assert result.json["kind"] == "pretrain"
    assert set(result.json["left_out"]) >= {"momentum twin", "queue", "tied duplicate"}
    load_checkpoint(tmp_path / "model")
    again = run("convert", source, tmp_path / "again", "--config", reference / "config.json")
    for reason, number in result.json["left_out"].items():
        assert f"left out: {number} ({reason})" in again.out


@pytest.mark.parametrize("roles", [{"decode"}, {"text", "pair"}])
def test_transformers_there_and_back_is_bit_equal(
    run, model: Path, tmp_path: Path, roles: set[str]
) -> None:
    blip, tokenizer = load_checkpoint(model)
    part = with_roles(blip, frozenset(roles))  # type: ignore[arg-type]
    save_checkpoint(tmp_path / "ours", part, tokenizer, "")
    assert run("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "transformers").code == 0
    assert run("convert", tmp_path / "theirs", tmp_path / "back").code == 0
    before = load_file(tmp_path / "ours" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
