"""Grad-CAM of the ITM cross-attention: what runs is the model, and the gradients are right."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from openblip import explain as explaining
from openblip.explain import (
    Explanation,
    WordHeat,
    attention_to_image,
    default_layer,
    explain,
    explanation_figure,
    heat_maps,
    heat_picture,
)
from openblip.inference import Engine, tokenize
from openblip.kernels import is_x86
from openblip.models.blip import Blip, BlipConfig
from openblip.models.text import MedConfig, Role
from openblip.models.vision import VisionConfig
from openblip.tokenizer import MAX_TEXT_TOKENS, Tokenizer

TEXTS = ["a red cat on a mat", "two green birds above a house", "it's a dog"]
ROLES: frozenset[Role] = frozenset({"text", "pair"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=60, min_frequency=1)


def build(
    tokenizer: Tokenizer, num_layers: int = 3, roles: frozenset[Role] = ROLES, width: int = 32
) -> Blip:
    torch.manual_seed(0)
    std = 1.7 * width**-0.5  # states of the same scale, whatever the width
    config = BlipConfig(
        vision=VisionConfig(
            image_size_px=24, patch_size_px=8, width=width, num_layers=2, num_heads=2, init_std=std
        ),
        text=MedConfig(
            vocab_size=tokenizer.vocab_size, width=width, num_layers=num_layers, num_heads=4,
            ffn_width=2 * width, max_positions=40, context_width=width, init_std=std, roles=roles,
        ),
        tokens=tokenizer.special,
        embedding_width=8,
    )  # fmt: skip
    return Blip(config).eval()


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(build(tokenizer), tokenizer, dtype="float32")


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_the_probability_is_that_of_the_match(engine: Engine, image: Tensor) -> None:
    for layer in (0, 1):
        for text in TEXTS:
            [[judged]] = engine.match([image], [[text]])
            found = explain(engine, image, text, layer=layer)
            assert found.match_probability == pytest.approx(judged.match_probability, abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_what_is_explained_is_what_runs(tokenizer: Tokenizer, precision: str) -> None:
    """Wide enough for weights that are laid out; int8 is its own rounded weights."""
    if precision == "int8" and not is_x86():
        pytest.skip("int8 needs an x86 processor")
    blip = build(tokenizer, width=256)
    image = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(2))
    prepared = Engine(blip, tokenizer, dtype=precision)  # type: ignore[arg-type]
    [[judged]] = prepared.match([image], [[TEXTS[0]]])
    found = explain(prepared, image, TEXTS[0])
    tolerance = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.05}[precision]
    assert found.match_probability == pytest.approx(judged.match_probability, abs=tolerance)
    plain = explain(Engine.plain(blip, tokenizer), image, TEXTS[0])
    heats = [torch.stack([word.heat for word in one.words]).flatten() for one in (found, plain)]
    likeness = float(torch.corrcoef(torch.stack(heats))[0, 1])
    assert likeness > {"float32": 0.9999}.get(precision, 0.9)


def test_gradients_equal_finite_differences(
    engine: Engine, tokenizer: Tokenizer, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Move one attention probability a little: the match logit follows the gradient."""
    token_ids = tokenize(tokenizer, [TEXTS[0]]).token_ids
    context = engine.encode([image]).context
    blip = engine.backend.blip  # type: ignore[attr-defined]
    found = attention_to_image(blip, token_ids, context, 1)
    assert found.attention.shape == (4, token_ids.shape[1], 10)
    assert_close(found.attention.sum(dim=2), torch.ones(found.attention.shape[:2]))
    attend = explaining.attention_probabilities
    step = 0.02
    for place in [(0, 0, 0), (0, 2, 4), (1, 3, 9), (3, token_ids.shape[1] - 1, 1)]:
        logits = []
        for sign in (1, -1):

            def moved(*given: object, at: Sequence[int] = place, by: float = sign * step) -> Tensor:
                attention = attend(*given).detach()  # type: ignore[arg-type]
                attention[(0, *at)] += by
                return attention

            monkeypatch.setattr(explaining, "attention_probabilities", moved)
            probability = attention_to_image(blip, token_ids, context, 1).match_probability
            logits.append(math.log(probability / (1 - probability)))
        monkeypatch.setattr(explaining, "attention_probabilities", attend)
        slope = (logits[0] - logits[1]) / (2 * step)
        assert float(found.gradient[place]) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_heat_worked_by_hand() -> None:
    """Two heads, one token, [CLS] and two patches: what lowers the match in a head counts 0."""
    attention = torch.tensor([[[0.2, 0.3, 0.5]], [[0.1, 0.6, 0.3]]])
    gradient = torch.tensor([[[1.0, 2.0, -4.0]], [[0.0, -1.0, 1.0]]])
    assert_close(heat_maps(attention, gradient), torch.tensor([[0.1, 0.3, 0.15]]))


def test_a_map_is_that_of_a_words_pieces(
    engine: Engine, tokenizer: Tokenizer, image: Tensor
) -> None:
    """Pieces are averaged; neither [ENC] nor [SEP] nor the image's [CLS] is in the result."""
    text = "two dogmats, on a HOUSE (it's)!"
    found = explain(engine, image, text, layer=0)
    assert found.text == "two dogmats, on a house it's"
    assert [word.text for word in found.words] == found.text.split()
    tokens = tokenize(tokenizer, [text])
    seen = attention_to_image(
        engine.backend.blip,  # type: ignore[attr-defined]
        tokens.token_ids,
        engine.encode([image]).context,
        0,
    )
    maps = heat_maps(seen.attention, seen.gradient)[1:-1, 1:].view(-1, 3, 3)
    counts = [len(tokenizer.encode(word)) - 2 for word in found.text.split()]
    assert max(counts) > 1
    assert sum(counts) == len(maps)
    means = torch.stack([part.mean(dim=0) for part in maps.split(counts)])
    assert_close(torch.stack([word.heat for word in found.words]), means / means.max())
    assert max(float(word.heat.max()) for word in found.words) == pytest.approx(1.0)
    assert min(float(word.heat.min()) for word in found.words) >= 0.0


def test_a_text_that_is_too_long_is_explained_as_far_as_it_is_judged(
    engine: Engine, image: Tensor
) -> None:
    found = explain(engine, image, " ".join(["cat"] * 49))
    assert len(found.words) == MAX_TEXT_TOKENS - 2
    [[judged]] = engine.match([image], [[" ".join(["cat"] * 49)]])
    assert found.match_probability == pytest.approx(judged.match_probability, abs=1e-5)


def test_what_cannot_be_explained_is_said(
    engine: Engine, tokenizer: Tokenizer, image: Tensor
) -> None:
    with pytest.raises(ValueError, match="no word to explain"):
        explain(engine, image, " !! ")
    for layer in (-1, 2, 3):
        with pytest.raises(ValueError, match=f"layer {layer}: expected 0 to 1"):
            explain(engine, image, "cat", layer=layer)
    with pytest.raises(ValueError, match="one layer cannot be explained"):
        explain(Engine.plain(build(tokenizer, num_layers=1), tokenizer), image, "cat")
    captioner = build(tokenizer, roles=frozenset({"decode"}))
    with pytest.raises(ValueError, match="no role 'pair'"):
        explain(Engine.plain(captioner, tokenizer), image, "cat")


def test_the_default_layer_is_that_of_the_papers() -> None:
    assert default_layer(12) == 7
    assert [default_layer(number) for number in (2, 3, 4, 6, 24)] == [0, 1, 2, 3, 14]


@pytest.mark.parametrize("color", ["white", "black", "gray", "red"])
def test_a_hot_place_glows_and_a_cold_one_is_nearly_gray(color: str) -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    shown = np.asarray(heat_picture(Image.new("RGB", (80, 40), color), heat)).astype(int)
    assert shown.shape == (40, 80, 3)
    hot, cold = shown[15, 50], shown[38, 2]
    assert np.ptp(hot) > np.ptp(cold) + 60
    weaker = np.asarray(heat_picture(Image.new("RGB", (80, 40), color), heat / 4)).astype(int)
    assert np.abs(weaker[15, 50] - cold).sum() < np.abs(hot - cold).sum()


@pytest.mark.parametrize("size", [(32, 32), (1000, 700), (900, 30), (30, 900)])
@pytest.mark.parametrize("num_words", [1, 4, 11])
def test_a_figure_has_a_panel_for_the_image_and_each_word(
    size: tuple[int, int], num_words: int
) -> None:
    words = tuple(
        WordHeat("word" * (1 + 9 * (number == 2)), torch.rand(3, 3)) for number in range(num_words)
    )
    figure = explanation_figure(
        Image.new("RGB", size, "blue"), Explanation("so many words", words, 0.5)
    )
    shown = np.asarray(figure).astype(int)
    rows = math.ceil((num_words + 1) / explaining.MOST_COLUMNS)
    columns = math.ceil((num_words + 1) / rows)
    assert figure.width <= (explaining.PANEL[0] + 20) * columns + 20
    assert figure.height <= (explaining.PANEL[1] + 50) * rows + 20
    # The image itself comes first; the paper is white, and so is the end of the last row.
    assert (shown == (0, 0, 255)).all(axis=2).any()
    assert (shown[:8] == 255).all()
    if (num_words + 1) % columns:
        assert (shown[-30:, -80:] == 255).all()
