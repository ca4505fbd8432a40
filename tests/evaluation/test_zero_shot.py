"""Classification by sentences: what a label's embedding is, and what is measured of folders."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from openblip.evaluation.zero_shot import evaluate_classification
from openblip.images import decode_image, eval_transform
from openblip.inference import Engine
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import Tokenizer

COLORS = ("red", "green", "blue", "dark_red", "white", "black")
TEMPLATES = ["a {} field", "all is {}"]


@pytest.fixture(scope="module")
def model() -> tuple[Blip, Tokenizer]:
    torch.manual_seed(0)
    texts = [template.replace("{}", color) for template in TEMPLATES for color in COLORS]
    tokenizer = Tokenizer.train(texts, vocab_size=80, min_frequency=1)
    config = BlipConfig(
        vision=VisionConfig(
            image_size_px=16, patch_size_px=8, width=32, num_layers=1, num_heads=2, init_std=0.2
        ),
        text=MedConfig(
            vocab_size=tokenizer.vocab_size, width=32, num_layers=1, num_heads=2, ffn_width=32,
            max_positions=40, context_width=32, init_std=0.2, roles=frozenset({"text"}),
        ),
        tokens=tokenizer.special,
        embedding_width=8,
    )  # fmt: skip
    return Blip(config).eval(), tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder per colour, of one or two images, and one file that is none."""
    for number, color in enumerate(COLORS):
        (tmp_path / "data" / color).mkdir(parents=True)
        for name in range(1 + number % 2):
            buffer = io.BytesIO()
            shade = Image.new("RGB", (20, 20), color.replace("_", ""))
            shade.putpixel((0, name), (9, 9, 9))
            shade.save(buffer, "PNG")
            (tmp_path / "data" / color / f"{name}.png").write_bytes(buffer.getvalue())
    (tmp_path / "data" / "red" / "notes.txt").write_text("no image")
    return tmp_path / "data"


def test_a_label_is_the_mean_of_its_sentences(model: tuple[Blip, Tokenizer]) -> None:
    labels = Engine.plain(*model).labels(["red", "blue"], TEMPLATES)
    assert labels.names == ("red", "blue")
    for name, embedding in zip(labels.names, labels.embedding, strict=True):
        texts = [template.replace("{}", name) for template in TEMPLATES]
        mean = Engine.plain(*model).embed_texts(texts).mean(dim=0)
        assert_close(embedding, mean / mean.norm())


def test_guesses_are_ranked_and_shares_add_up(model: tuple[Blip, Tokenizer]) -> None:
    engine = Engine.plain(*model)
    labels = engine.labels(["red", "blue", "green"], TEMPLATES)
    images = torch.randn(3, 3, 16, 16)
    for image, guesses in zip(images, engine.classify(images, labels), strict=True):
        cosines = [guess.similarity for guess in guesses]
        assert cosines == sorted(cosines, reverse=True)
        assert sum(guess.probability for guess in guesses) == pytest.approx(1.0)
        odds = guesses[0].probability / guesses[1].probability
        gap = (cosines[0] - cosines[1]) / model[0].temperature.item()
        assert torch.tensor(gap).exp().item() == pytest.approx(odds, rel=1e-3)
        own = labels.embedding[labels.names.index(guesses[0].label)]
        assert (engine.embed_images([image])[0] @ own).item() == pytest.approx(cosines[0], abs=1e-5)


def test_accuracies_of_folders_are_counted_by_hand(
    model: tuple[Blip, Tokenizer], folder: Path
) -> None:
    engine = Engine.plain(*model)
    report = evaluate_classification(engine, folder, templates=TEMPLATES, batch_size=2)
    names = sorted(color.replace("_", " ") for color in COLORS)
    labels = engine.labels(names, TEMPLATES)
    hits: dict[str, list[tuple[bool, bool]]] = {}
    for path in sorted(folder.rglob("*.png")):
        image = eval_transform(decode_image(path.read_bytes()), 16)
        [guesses] = engine.classify(image[None], labels)
        best = [guess.label for guess in guesses]
        name = path.parent.name.replace("_", " ")
        hits.setdefault(name, []).append((best[0] == name, name in best[:5]))
    everything = [hit for several in hits.values() for hit in several]
    assert report.num_images == len(everything) == 9
    assert report.num_classes == len(COLORS)
    assert report.top_1 == pytest.approx(100 * sum(one for one, _ in everything) / 9)
    assert report.top_5 == pytest.approx(100 * sum(five for _, five in everything) / 9)
    assert report.top_1 <= report.top_5
    for name, several in hits.items():
        expected = 100 * sum(one for one, _ in several) / len(several)
        assert report.top_1_by_class[name] == pytest.approx(expected)
    assert report.unusable == {"not_an_image": 1}


def test_what_cannot_be_used_is_named(model: tuple[Blip, Tokenizer], folder: Path) -> None:
    engine = Engine.plain(*model)
    with pytest.raises(ValueError, match="stand more than once: red"):
        engine.labels(["red", "blue", "red"], TEMPLATES)
    with pytest.raises(ValueError, match=r"need one \{\} .*\['all'\]"):
        engine.labels(["red"], ["a {}", "all"])
    with pytest.raises(ValueError, match="0 labels"):
        engine.labels([])
    with pytest.raises(ValueError, match=r"without a name .*\['dark_red'"):
        evaluate_classification(engine, folder, names={"red": "red", "black": "b", "blue": "u"})
    with pytest.raises(ValueError, match="holds no folder"):
        evaluate_classification(engine, folder / "red")
    with pytest.raises(ValueError, match="is no folder"):
        evaluate_classification(engine, folder / "red" / "0.png")
    (folder / "void").mkdir()
    with pytest.raises(ValueError, match=r"no file in .*void"):
        evaluate_classification(engine, folder)
