"""`openblip capfilt calibrate`, on a tiny model that knows nothing."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from openblip.capfilt.calibration import read_temperature
from openblip.capfilt.filter import Filter
from openblip.checkpoint import load_checkpoint, model_id
from openblip.data.sources import list_shards, read_samples

BAD = [
    {"image": "absent.png", "caption": "a cat", "label": True},
    {"caption": "a cat", "label": True},
    {"image_base64": "bm8gaW1hZ2U=", "caption": "a cat", "label": True},
    {"image": "0.png", "caption": "a cat"},
    {"image": "0.png", "caption": "a cat", "label": "maybe"},
    {"image": "0.png", "caption": "a cat", "label": 2},
    {"image": "0.png", "label": 1},
    {"image": "0.png", "captions": ["...", "a circle"], "label": 0},
]


@pytest.fixture(scope="module")
def labels(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write true pairs, wrong pairs, and what cannot be used."""
    folder = tmp_path_factory.mktemp("labels")
    [shard] = list_shards(world / "human")
    samples = list(read_samples(shard, on_bad=print))
    lines = []
    for number, (sample, other) in enumerate(zip(samples, samples[1:] + samples[:1], strict=True)):
        (folder / f"{number}.png").write_bytes(sample.image_bytes)
        image = {"image": f"{number}.png"}
        if number % 2:
            image = {"image_base64": base64.b64encode(sample.image_bytes).decode()}
        captions = [caption.text for caption in sample.captions]
        lines.append({**image, "captions": captions, "label": True})
        lines.append({**image, "caption": other.captions[0].text, "label": 0})
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *BAD]) + "no json\n"
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder / "pairs.jsonl"


@pytest.fixture
def judge(model: Path, tmp_path: Path) -> Path:
    """Return a copy of the model that may be written into."""
    return Path(shutil.copytree(model, tmp_path / "filter"))


def test_calibrate_measures_writes_a_page_and_saves(
    run, labels: Path, judge: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "report"
    result = run("capfilt", "calibrate", "--filter", judge, "--labels", labels, "--out", out,
                 "--save", "--json")  # fmt: skip
    assert result.code == 0, result.err
    bad = {
        "bad_json": 1, "bad_label": 2, "empty_caption": 1, "missing_caption": 1, "missing_image": 2,
        "missing_label": 1, "not_an_image": 1,
    }  # fmt: skip
    assert result.json["bad"] == bad
    assert f"not used: {', '.join(f'{k} {n}' for k, n in bad.items())}\n" in result.err
    assert result.json["num_wrong"] == 17
    assert result.json["num_matching"] >= 16
    blip, tokenizer = load_checkpoint(judge)
    name = model_id(blip)
    assert result.json["model"] == name
    temperature = read_temperature(judge, name)
    assert temperature == result.json["temperature"]
    assert Filter(blip, tokenizer, temperature=temperature).model.startswith(name)
    report = json.loads((out / "calibration.json").read_text())
    assert report == {key: result.json[key] for key in report}
    page = (out / "calibration.html").read_text(encoding="utf-8")
    assert "ROC curve" in page
    assert "missing label" in page
    assert "<script" not in page
    assert page.count("<svg") == 4


def test_calibrate_tells_it_as_text_and_writes_nothing_unasked(
    run, labels: Path, judge: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run("capfilt", "calibrate", "--filter", judge, "--labels", labels, "--precision", 0.1)
    assert result.code == 0, result.err
    assert sorted(tmp_path.rglob("*")) == before
    shown = result.out
    assert "17 wrong" in shown
    assert "threshold for precision 0.1" in shown
    assert "temperature" in shown
    assert "saved" not in shown
    again = run("capfilt", "calibrate", "--filter", judge, "--labels", labels, "--precision", 0.1)
    assert again.out == shown


def test_a_wanted_precision_out_of_reach_is_said(
    run, labels: Path, judge: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in labels.read_text().splitlines()[:32]]
    # One picture and one text, labelled both ways, are beyond any filter.
    same = [{**lines[0], "captions": ["a cat"], "label": n % 2} for n in range(20)]
    path = labels.with_name("same.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in same), encoding="utf-8")
    out = tmp_path / "report"
    result = run("capfilt", "calibrate", "--filter", judge, "--labels", path, "--out", out)
    assert result.code == 0, result.err
    assert "note: No threshold reaches a precision of 0.95: the highest is 0.5000" in result.out
    assert result.out.endswith(f"open {out / 'calibration.html'}\n")
    assert "threshold for precision" not in result.out
    page = (out / "calibration.html").read_text(encoding="utf-8")
    assert "No threshold reaches a precision of 0.95." in page
    assert "Every pair could be used." in page


def test_too_few_pairs_are_refused_and_nothing_is_written(
    run, labels: Path, judge: Path, tmp_path: Path
) -> None:
    path = labels.with_name("few.jsonl")
    path.write_text("\n".join(labels.read_text().splitlines()[:6]), encoding="utf-8")
    out = tmp_path / "report"
    result = run("capfilt", "calibrate", "--filter", judge, "--labels", path, "--save",
                 "--out", out)  # fmt: skip
    assert result.code == 2
    assert "3 wrong pairs: at least 10 of each are needed" in result.err
    assert not out.exists()
    assert not (judge / "calibration.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--filter", "owner/model", "--save"), "owner/model is no local folder"),
        (("--filter", "{judge}", "--out", "{judge}"), "holds a model: choose another folder"),
        (("--filter", "{judge}", "--labels", "{judge}/absent.jsonl"), "is no data set"),
        (("--filter", "{judge}", "--precision", "0"), "the precision is 0.0"),
    ],
)
def test_calibrate_says_what_is_wrong(
    run, labels: Path, judge: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [one.replace("{judge}", str(judge)) for one in arguments]
    result = run("capfilt", "calibrate", "--labels", labels, *given)
    assert result.code == 2
    assert message in result.err
    assert not (judge / "calibration.json").exists()
