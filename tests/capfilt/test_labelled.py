import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openblip.capfilt.filter import Filter
from openblip.capfilt.labelled import judge_labelled, read_label
from openblip.inference import Engine

TEXTS = ["a red cat on a mat", "a blue dog", "two green birds above a house"]


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", " 1 "])
def test_what_says_that_a_pair_matches(value: object) -> None:
    assert read_label(value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "0"])
def test_what_says_that_it_does_not(value: object) -> None:
    assert read_label(value) is False


@pytest.mark.parametrize("value", [None, 2, -1, 0.5, "", "yes", [], [1], {}])
def test_what_says_nothing(value: object) -> None:
    assert read_label(value) is None


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_every_caption_has_its_samples_label(
    judge: Filter, tmp_path: Path, batch_size: int
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    rows = [
        {"image": "0.jpg", "captions": TEXTS[:2], "label": True},
        {"image": "1.jpg", "captions": [{"text": TEXTS[2], "source": "human"}], "label": False},
        {"image": "2.jpg", "captions": [], "label": True},
        {"image": "2.jpg", "captions": ["!"], "label": True},
        {"image": "2.jpg", "caption": TEXTS[0], "label": 0},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = judge_labelled(path, judge, batch_size)
    assert pairs.labels == (True, True, False, False)
    assert pairs.bad == {"empty_caption": 1, "missing_caption": 1}
    texts = [TEXTS[:2], [TEXTS[2]], [TEXTS[0]]]
    images = [picture(number) for number in range(3)]
    engine = Engine(judge.blip, judge.tokenizer, dtype="float32")
    expected = [one.match_probability for several in engine.match(images, texts) for one in several]
    assert pairs.probabilities == pytest.approx(expected, abs=1e-6)


def test_labels_of_a_table_without_types(judge: Filter, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption,label\n0.jpg,a cat,1\n1.jpg,a cat,FALSE\n", encoding="utf-8")
    assert judge_labelled(path, judge).labels == (True, False)


def test_a_filter_that_has_a_temperature_is_refused(judge: Filter, tmp_path: Path) -> None:
    warm = Filter(judge.blip, judge.tokenizer, temperature=2.0)
    with pytest.raises(ValueError, match="judged without one"):
        judge_labelled(tmp_path / "pairs.jsonl", warm)


def test_pairs_are_judged_as_captions_are(judge: Filter, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(picture(0))
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"image": "0.jpg", "caption": TEXTS[0], "label": 1}) + "\n")
    images = judge.engine.batcher.prepare(picture(0))[None]
    [[probability]] = judge.probabilities(images, [[TEXTS[0]]])
    assert judge_labelled(path, judge).probabilities == (probability,)
