"""Retrieval and captioning evaluation of samples, on a tiny random model."""

import io

import pytest
import torch
from PIL import Image

from openblip.data.samples import Caption, Sample
from openblip.evaluation.captioning import evaluate_captioning, predictions
from openblip.evaluation.retrieval import evaluate_retrieval
from openblip.generation import Decoding
from openblip.images import ImageDecodeError
from openblip.inference import Engine
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer

GREEDY = Decoding(method="greedy", min_tokens=1, max_tokens=6)


def jpeg(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(buffer, "JPEG")
    return buffer.getvalue()


SAMPLES = [
    Sample(f"{color}", jpeg(color), (Caption(f"a {color} field"), Caption(f"all {color}")))
    for color in ("red", "green", "blue")
]


@pytest.fixture(scope="module")
def model() -> tuple[Blip, Tokenizer]:
    torch.manual_seed(0)
    texts = [caption.text for sample in SAMPLES for caption in sample.captions]
    tokenizer = Tokenizer.train(texts, vocab_size=60, min_frequency=1)
    config = BlipConfig(
        vision=VisionConfig(
            image_size_px=16, patch_size_px=8, width=32, num_layers=1, num_heads=2, init_std=0.2
        ),
        text=MedConfig(
            vocab_size=tokenizer.vocab_size, width=32, num_layers=1, num_heads=2, ffn_width=32,
            max_positions=40, context_width=32, init_std=0.2,
        ),
        tokens=tokenizer.special,
        embedding_width=8,
    )  # fmt: skip
    return Blip(config).eval(), tokenizer


def test_every_caption_is_a_text_of_its_own(model: tuple[Blip, Tokenizer]) -> None:
    report = evaluate_retrieval(Engine.plain(*model), SAMPLES, shortlist=2)
    assert (report.num_images, report.num_texts, report.shortlist) == (3, 6, 2)
    assert report.itc.ir_at_5 == 100.0  # of three images
    assert report.to_json()["reranked"] == report.reranked.to_json()


def test_every_image_is_captioned_by_its_key(model: tuple[Blip, Tokenizer]) -> None:
    reports = [
        evaluate_captioning(Engine(*model, batch_size=size), SAMPLES, prompt="a", decoding=GREEDY)
        for size in (1, 32)
    ]
    assert reports[0] == reports[1]
    assert list(reports[0].captions) == ["red", "green", "blue"]
    scores = reports[0].scores
    assert scores is not None
    assert reports[0].to_json()["scores"] == scores.to_json()


def test_a_test_set_is_captioned_for_a_server_and_not_scored(model: tuple[Blip, Tokenizer]) -> None:
    bare = [Sample(key, jpeg("red")) for key in ("7", "007", "a7")]
    report = evaluate_captioning(Engine.plain(*model), bare, prompt="a", decoding=GREEDY)
    assert report.scores is None
    assert report.to_json() == {"captions": dict(report.captions)}
    written = predictions(bare, report.captions)
    assert [one["image_id"] for one in written] == [7, "007", "a7"]
    assert [one["caption"] for one in written] == list(report.captions.values())


def test_what_cannot_be_measured_is_refused(model: tuple[Blip, Tokenizer]) -> None:
    bare, broken = Sample("bare", jpeg("red")), Sample("broken", b"", (Caption("a"),))
    with pytest.raises(ValueError, match="image 3 has no text"):
        evaluate_retrieval(Engine.plain(*model), [*SAMPLES, bare], shortlist=2)
    with pytest.raises(ValueError, match="bare"):
        evaluate_captioning(Engine.plain(*model), [*SAMPLES, bare], prompt="", decoding=GREEDY)
    with pytest.raises(ImageDecodeError):
        evaluate_retrieval(Engine.plain(*model), [*SAMPLES, broken], shortlist=2)
    with pytest.raises(ImageDecodeError):
        evaluate_captioning(Engine.plain(*model), [broken], prompt="", decoding=GREEDY)
    with pytest.raises(ValueError, match="no sample"):
        evaluate_retrieval(Engine.plain(*model), [], shortlist=2)
    with pytest.raises(ValueError, match="no "):
        evaluate_captioning(Engine.plain(*model), [], prompt="", decoding=GREEDY)
