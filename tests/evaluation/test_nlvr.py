"""Accuracy, consistency and predictions of sentences about two images."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from openblip.batching import read_image
from openblip.data.nlvr import NlvrPair
from openblip.evaluation.nlvr import (
    evaluate_nlvr,
    predictions_csv,
    read_all_pairs,
    score_nlvr,
)
from openblip.images import ImageDecodeError
from openblip.models.nlvr import Nlvr, NlvrConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer

NOWHERE = ((Path("a"),), (Path("b"),))


def pairs(labels: dict[str, bool | None]) -> list[NlvrPair]:
    return [NlvrPair(identifier, "a", label, NOWHERE) for identifier, label in labels.items()]


def test_measures_by_hand() -> None:
    # Two sentences of set 8, the first with two pairs of images, and one of set 9.
    labels = {"dev-8-0-0": True, "dev-8-1-0": False, "dev-8-0-1": True, "dev-9-0-0": False}
    told = {"dev-8-0-0": True, "dev-8-1-0": True, "dev-8-0-1": True, "dev-9-0-0": False}
    report = score_nlvr(pairs(labels), told)
    assert report.accuracy == 75.0
    assert report.consistency == pytest.approx(200 / 3)
    assert predictions_csv(told).splitlines()[3] == "dev-9-0-0,False"
    assert score_nlvr(pairs({"x": True}), {"x": True}).consistency is None
    unknown = score_nlvr(pairs({"test2-1-0-0": None}), {"test2-1-0-0": True})
    assert (unknown.accuracy, unknown.consistency) == (None, None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = []
    for number in range(5):
        names = [f"{number}-{side}.png" for side in "ab"]
        for side, name in enumerate(names):
            Image.new("RGB", (9, 9), (50 * number, 200 * side, 9)).save(tmp_path / name)
        sentence = "a red cat" if number % 2 else "all dogs are blue today"
        rows.append(
            {"identifier": f"dev-1-{number}-0", "sentence": sentence, "label": "True",
             "images": names}
        )  # fmt: skip
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "dev.jsonl"


def test_sentences_are_judged_in_batches_as_alone(data: Path) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red cat", "all dogs are blue today"], vocab_size=60)
    nlvr = Nlvr(
        NlvrConfig(
            VisionConfig(16, 8, 16, 1, 2, init_std=0.3),
            MedConfig(
                vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, ffn_width=16,
                max_positions=30, context_width=16, init_std=0.5, roles=frozenset({"pair"}),
            ),
            tokenizer.special,
            first_merge_layer=1,
        )
    ).eval()  # fmt: skip
    found = read_all_pairs(data)
    report = evaluate_nlvr(nlvr, tokenizer, found, batch_size=2)
    assert report == evaluate_nlvr(nlvr, tokenizer, found, batch_size=5)
    for pair in found:
        images = torch.stack([read_image(one, 16) for one in pair.read_images()])
        tokens = tokenizer.encode_batch([pair.sentence], max_tokens=30)
        with torch.no_grad():
            context = nlvr.project_context(nlvr.encode_image(images))
            logits = nlvr.truth_logits(
                nlvr.encode_pair(tokens.token_ids, tokens.text_mask, context)
            )
        assert report.predictions[pair.identifier] == bool(logits[0, 1] > logits[0, 0])
    assert report.accuracy == 100.0 * sum(report.predictions.values()) / 5
    (data.parent / "3-b.png").unlink()
    with pytest.raises(ImageDecodeError, match=r"3-b\.png"):
        evaluate_nlvr(nlvr, tokenizer, found)


def test_sentences_that_are_cut_are_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.train(["a red cat", "all dogs are blue today"], vocab_size=60)
    nlvr = Nlvr(
        NlvrConfig(
            VisionConfig(16, 8, 16, 1, 2),
            MedConfig(
                vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, ffn_width=16,
                max_positions=10, context_width=16, roles=frozenset({"pair"}),
            ),
            tokenizer.special,
        )
    )  # fmt: skip
    evaluate_nlvr(nlvr.eval(), tokenizer, read_all_pairs(data))
    assert "3 sentences are longer than 10 tokens and were cut" in caplog.text


def test_what_cannot_be_measured_is_named(data: Path) -> None:
    text = data.read_text()
    data.write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="dev-1-0-0 stands twice"):
        read_all_pairs(data)
    data.write_text(text + '{"identifier": "dev-1-9-0", "label": "True"}\n')
    with pytest.raises(ValueError, match="row dev-1-9-0 is unusable: no_sentence"):
        read_all_pairs(data)
    data.write_text("\n")
    with pytest.raises(ValueError, match="holds no sentence"):
        read_all_pairs(data)
