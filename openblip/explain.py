"""Where a model looks at each word of a text: Grad-CAM of the ITM cross-attention.

Source: Grad-CAM of Selvaraju et al. 2017, on the cross-attention as ALBEF (Li et al. 2021) grounds
words in images, which LAVIS does with BLIP. Where they take the gradient of the logit of a match,
this takes that of its distance from the other logit: what the probability is made of.

Letters: L tokens, N patches, H heads, D text width.
"""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from openblip.backend import TorchBackend
from openblip.batching import ImageLike
from openblip.captions import clean_caption
from openblip.inference import Engine
from openblip.kernels import plain
from openblip.models.blip import Blip, with_first
from openblip.models.context import Context
from openblip.models.text import CrossAttention, MedLayer

PANEL = (320, 240)
"""Most pixels of a picture in a figure, across and down."""
MOST_COLUMNS = 5
_GAP, _TEXT_HEIGHT, _FONT_SIZE, _NARROWEST = 16, 38, 18, 96
_INK, _PAPER = (34, 34, 34), (255, 255, 255)
# From cold to hot: dark violet, red, orange, yellow. Lightness grows all along, so that the order
# is seen without colours too.
_COLORS = np.array([(20, 11, 52), (132, 32, 107), (229, 92, 48), (255, 214, 60)])
_GRAY, _FADED = 96.0, 0.45
_COVER = 0.5
"""Share of the colour in the hottest places; the picture stays visible through it."""


@dataclass(frozen=True)
class WordHeat:
    """A word, and how much each patch of the image speaks for it.

    heat  (rows, columns) of patches, in [0, 1]; the highest of all words of the text is 1
    """

    text: str
    heat: Tensor


@dataclass(frozen=True)
class Explanation:
    """What a text's match with an image rests on, word by word."""

    text: str
    words: tuple[WordHeat, ...]
    match_probability: float


def explain(
    engine: Engine, image: ImageLike, text: str, *, layer: int | None = None
) -> Explanation:
    """Find what in an image speaks for each word of a text.

    text   cleaned, and cut at 35 tokens, as texts are that are matched
    layer  number of the cross-attention that is looked into; by default `default_layer`
    Raises ValueError for a text without words; for a model that does not match, has one layer of
    text or does not run in PyTorch; for a layer that cannot be looked into; and ImageDecodeError.
    """
    backend = engine.backend
    if not isinstance(backend, TorchBackend):
        raise ValueError("matches are explained by a model in PyTorch alone")
    blip = backend.blip
    blip.require("pair")
    num_layers = len(blip.text.layers)
    if num_layers < 2:
        raise ValueError("a text model of one layer cannot be explained: it judges by [ENC] alone")
    chosen = default_layer(num_layers) if layer is None else layer
    if not 0 <= chosen < num_layers - 1:
        raise ValueError(
            f"layer {layer}: expected 0 to {num_layers - 2}; in the last one only [ENC] counts, "
            "and no word"
        )
    cleaned = clean_caption(text)
    token_ids = engine.tokenize([text]).token_ids.to(backend.device)
    words = engine.tokenizer.words_of_text(cleaned, max_tokens=token_ids.shape[1])
    if not words:
        raise ValueError(f"the text {text!r} has no word to explain")
    context = engine.encode([image]).context
    seen = attention_to_image(blip, token_ids, context, chosen)
    grid = math.isqrt(engine.config.vision.num_patches)
    # [CLS] of the image, which stands for all of it, is no place.
    maps = heat_maps(seen.attention, seen.gradient)[:, 1:].view(-1, grid, grid).cpu()
    heats = torch.stack([maps[places].mean(dim=0) for _, places in words])
    highest = float(heats.max())
    if highest > 0:
        heats = heats / highest
    return Explanation(
        " ".join(word for word, _ in words),
        tuple(WordHeat(word, heat) for (word, _), heat in zip(words, heats, strict=True)),
        seen.match_probability,
    )


def default_layer(num_layers: int) -> int:
    """Return the layer that is looked into: of twelve, from 0, number 7, as LAVIS does with BLIP.

    Of others the one at the same depth, but never the last: the match is read from [ENC] there,
    and what the words look at is lost.
    """
    return max(0, min(7 * num_layers // 12, num_layers - 2))


@dataclass(frozen=True)
class ImageAttention:
    """How much the tokens of a text look at an image, and what it does for their match.

    attention  (H, L, 1 + N) probabilities of one layer
    gradient   (H, L, 1 + N) of the match logit, minus the one of no match, by them
    """

    attention: Tensor
    gradient: Tensor
    match_probability: float


def attention_to_image(
    blip: Blip, token_ids: Tensor, context: Context, layer: int
) -> ImageAttention:
    """Judge a text beside an image, and keep what one layer's cross-attention does.

    blip       as `Blip`, or as `kernels.prepare` made it
    token_ids  (1, L), no padding; context of one image
    Only the layers from `layer` on are computed in float32 and with gradients.
    """
    token_ids = with_first(token_ids, blip.config.tokens.enc)
    visible = torch.ones(1, 1, 1, token_ids.shape[1], dtype=torch.bool, device=token_ids.device)
    med = blip.text
    layers = [cast(MedLayer, one) for one in med.layers]
    with torch.no_grad():
        positions = med.position_embedding.weight[: token_ids.shape[1]]
        states: Tensor = med.embedding_norm(med.word_embedding(token_ids) + positions)
        for index in range(layer):
            key, value = context.keys[index], context.values[index]
            states = layers[index].encode_pair(states, visible, key, value, None)
    keys, values = ([one.float() for one in several] for several in (context.keys, context.values))
    with torch.enable_grad():
        own = plain(layers[layer])
        assert own.bidirectional is not None
        cross = cast(CrossAttention, own.cross)
        states = own.bidirectional(states.float(), visible)
        attention = attention_probabilities(cross, states, keys[layer]).detach().requires_grad_()
        found = (attention @ values[layer]).transpose(1, 2).flatten(2)
        states = own.feed_forward(cross.output(found, states))
        for index in range(layer + 1, len(layers)):
            above = plain(layers[index])
            states = above.encode_pair(states, visible, keys[index], values[index], None)
        logits: Tensor = plain(blip.match_head)(states[:, 0])
        [gradient] = torch.autograd.grad(logits[0, 1] - logits[0, 0], attention)
    probability = float(logits.detach().softmax(dim=1)[0, 1])
    return ImageAttention(attention.detach()[0], gradient[0], probability)


def attention_probabilities(cross: CrossAttention, states: Tensor, key: Tensor) -> Tensor:
    """Return what states (1, L, D) look at, (1, H, L, 1 + N), by keys (1, H, 1 + N, D / H)."""
    query: Tensor = cross.query(states).unflatten(2, (cross.num_heads, -1)).transpose(1, 2)
    return (query @ key.transpose(2, 3) / math.sqrt(key.shape[3])).softmax(dim=3)


def heat_maps(attention: Tensor, gradient: Tensor) -> Tensor:
    """Return Grad-CAM (L, 1 + N) of both (H, L, 1 + N): what raises the match, over all heads."""
    return (attention * gradient).relu().mean(dim=0)


def heat_picture(image: Image.Image, heat: Tensor) -> Image.Image:
    """Lay a heat map (rows, columns), in [0, 1], over an image of any size.

    Cold places are the image, pale and nearly grey; hot ones glow. The glow grows with the
    square root of the heat, so that weak places are seen too.
    """
    values = np.sqrt(np.clip(np.asarray(heat, dtype=np.float32), 0.0, 1.0))
    grown = Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(grown), 0.0, 1.0)[..., None]
    shown = np.asarray(image.convert("RGB"), dtype=np.float32)
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    cold = _FADED * _GRAY + (1 - _FADED) * (0.3 * shown + 0.7 * gray)
    place = share[..., 0] * (len(_COLORS) - 1)
    hot = np.stack([np.interp(place, range(len(_COLORS)), c) for c in _COLORS.T], axis=-1)
    base = cold + share * (shown - cold)
    cover = _COVER * share
    return Image.fromarray(np.rint((1 - cover) * base + cover * hot).astype(np.uint8))


def explanation_figure(image: Image.Image, explanation: Explanation) -> Image.Image:
    """Draw an image, and beside it its heat map for each word; words and match stand below."""
    scale = min(PANEL[0] / image.width, PANEL[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    panels = [(small, f"match {explanation.match_probability:.2f}")]
    panels += [(heat_picture(small, word.heat), word.text) for word in explanation.words]
    rows = math.ceil(len(panels) / MOST_COLUMNS)
    columns = math.ceil(len(panels) / rows)
    width, height = max(size[0], _NARROWEST), size[1] + _TEXT_HEIGHT
    across = _GAP + columns * (width + _GAP)
    down = _GAP + rows * height
    figure = Image.new("RGB", (across, down), _PAPER)
    draw = ImageDraw.Draw(figure)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, (panel, text) in enumerate(panels):
        row, column = divmod(number, columns)
        x, y = _GAP + column * (width + _GAP), _GAP + row * height
        figure.paste(panel, (x + (width - size[0]) // 2, y))
        middle = (x + width / 2, y + size[1] + 4)
        draw.text(middle, _fitting(text, width, font), _INK, font, anchor="ma")
    return figure


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return a text that is no wider than its panel, cut where it is."""
    cut = text
    while len(cut) > 1 and font.getlength(cut) > width:
        cut = cut.removesuffix("\u2026")[:-1] + "\u2026"
    return cut
