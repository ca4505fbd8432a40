"""The ONNX files of a BLIP, as modules that the exporter can follow.

| file            | inputs                                           | outputs                     |
|-----------------|--------------------------------------------------|-----------------------------|
| image_encoder   | images (B, 3, S, S)                              | image_states (B, 1 + N, W)  |
| image_embedding | class_states (B, W), the first of image_states   | image_embedding (B, E)      |
| text_encoder    | token_ids, text_mask (R, L)                      | text_embedding (R, E)       |
| context         | image_states                                     | image_key_i, image_value_i  |
| pair_encoder    | token_ids, text_mask, image_key_i, image_value_i | match_logits (R, 2)         |
| decoder         | token_ids (R, T), past_key_i, past_value_i,      | logits (R, V) of what then  |
|                 | image_key_i, image_value_i                       | follows, present_key_i,     |
|                 |                                                  | present_value_i             |

image_key_i and image_value_i, of layer i, are (B, H, 1 + N, D / H): computed once, they serve every
text and step. The decoder's past is (R, H, P, D / H) with any P, even 0; its present has P + T. All
keys stand before all values. Rows i * R / B to (i + 1) * R / B - 1 see image i. A text's first
token is set by the file itself, but the decoder's must be [DEC].

Letters: B images, S image side in pixels, N patches, W and D widths of image and text, E embedding
width, R rows of text, L tokens, T new tokens, P tokens before them, H heads, V vocabulary.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from openblip.models.blip import Blip
from openblip.models.context import Context, DecoderCache
from openblip.models.text import MedConfig, MedLayer


@dataclass(frozen=True)
class Part:
    """One file: a module, examples of its inputs, what they are called, and which sizes are free.

    examples         tensors, and tuples of one tensor per layer
    sizes            of each example the axes whose sizes are free
    float_products   places, among the file's products by weights, of those that int8 leaves alone
    """

    module: nn.Module
    examples: tuple[Tensor | tuple[Tensor, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_products: tuple[int, ...] = ()


def parts_of(blip: Blip) -> dict[str, Part]:
    """Return the files of a model by name."""
    config, roles = blip.config, blip.config.text.roles
    vision, text = config.vision, config.text
    images = torch.zeros(2, 3, vision.image_size_px, vision.image_size_px)
    states = torch.zeros(2, 1 + vision.num_patches, vision.width)
    ids, mask = torch.zeros(6, 3, dtype=torch.long), torch.ones(6, 3, dtype=torch.long)
    head = text.width // text.num_heads

    def layers(*shape: int) -> tuple[Tensor, ...]:
        # The exporter would take one tensor given twice for one input.
        return tuple(torch.zeros(shape) for _ in range(text.num_layers))

    seen = [layers(2, text.num_heads, 1 + vision.num_patches, head) for _ in range(2)]
    past = [layers(6, text.num_heads, 5, head) for _ in range(2)]
    context = (*_numbered("image_key", text), *_numbered("image_value", text))
    own = (*_numbered("key", text), *_numbered("value", text))
    parts = {
        "image_encoder": Part(
            _ImageEncoder(blip), (images,), ((0,),), ("images",), ("image_states",), (0,)
        )
    }
    if "text" in roles:
        parts["image_embedding"] = Part(
            _ImageEmbedding(blip), (states[:, 0],), ((0,),), ("class_states",), ("image_embedding",)
        )
        parts["text_encoder"] = Part(
            _TextEncoder(blip), (ids, mask), ((0, 1), (0, 1)), ("token_ids", "text_mask"),
            ("text_embedding",), (-1,),
        )  # fmt: skip
    if text.has_cross:
        parts["context"] = Part(
            _ContextProjection(blip), (states,), ((0,),), ("image_states",), context
        )
    if "pair" in roles:
        parts["pair_encoder"] = Part(
            _PairEncoder(blip), (ids, mask, *seen), ((0, 1), (0, 1), (0,), (0,)),
            ("token_ids", "text_mask", *context), ("match_logits",), (-1,),
        )  # fmt: skip
    if "decode" in roles:
        parts["decoder"] = Part(
            _Decoder(blip), (ids, *past, *seen), ((0, 1), (0, 2), (0, 2), (0,), (0,)),
            ("token_ids", *(f"past_{name}" for name in own), *context),
            ("logits", *(f"present_{name}" for name in own)),
        )  # fmt: skip
    return parts


def _numbered(name: str, text: MedConfig) -> tuple[str, ...]:
    return tuple(f"{name}_{index}" for index in range(text.num_layers))


class _OfBlip(nn.Module):
    def __init__(self, blip: Blip) -> None:
        super().__init__()
        self.blip = blip


class _ImageEncoder(_OfBlip):
    def forward(self, images: Tensor) -> Tensor:
        return self.blip.encode_image(images)


class _ImageEmbedding(_OfBlip):
    def forward(self, class_states: Tensor) -> Tensor:
        return self.blip.embed_image(class_states[:, None])


class _TextEncoder(_OfBlip):
    def forward(self, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        return self.blip.embed_text(self.blip.encode_text(token_ids, text_mask))


class _ContextProjection(_OfBlip):
    def forward(self, image_states: Tensor) -> tuple[Tensor, ...]:
        context = self.blip.project_context(image_states)
        return tuple(part.contiguous() for part in (*context.keys, *context.values))


class _PairEncoder(_OfBlip):
    def forward(
        self,
        token_ids: Tensor,
        text_mask: Tensor,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
    ) -> Tensor:
        context = Context(tuple(keys), tuple(values))
        return self.blip.match_logits(self.blip.encode_pair(token_ids, text_mask, context))


class _Decoder(_OfBlip):
    """`Med.decode_step` without what depends on whether tokens are many, few or none."""

    def forward(
        self,
        token_ids: Tensor,
        past_keys: tuple[Tensor, ...],
        past_values: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        med = self.blip.text
        start, num_new = past_keys[0].shape[2], token_ids.shape[1]
        positions = torch.arange(num_new) + start
        visible = torch.arange(start + num_new) <= positions[:, None]
        embedded = med.word_embedding(token_ids) + med.position_embedding(positions)
        states = med.embedding_norm(embedded)
        cache = DecoderCache(list(past_keys), list(past_values))
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
            layer = cast(MedLayer, med.layers[index])
            assert layer.causal is not None
            query, new_key, new_value = layer.causal.project(states)
            own_keys, own_values = cache.append(index, new_key, new_value)
            states = layer.causal.attend(states, query, own_keys, own_values, visible)
            states = layer.cross_and_feed(states, key, value, None)
        assert med.lm_head is not None
        logits = med.lm_head(states[:, -1], med.word_embedding.weight)
        return (logits, *cache.keys, *cache.values)
