"""What runs a model for the `Engine`: PyTorch here, onnxruntime in `onnx_backend`.

Letters: B images, S image side in pixels, N patches, D width, R texts, L tokens, E embedding width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip.kernels import Precision, prepare
from openblip.models.blip import Blip, BlipConfig
from openblip.models.context import Context, DecoderCache
from openblip.models.packed import PackedTexts, encode_first

POSITIONS_AT_ONCE = 577
"""Image positions that one pass over a processor takes: one image of 384 px. More leave the cache,
and are 1.4 times slower in int8."""


class Backend(Protocol):
    """The parts of a BLIP. Results lie on `device`; nothing keeps gradients."""

    @property
    def config(self) -> BlipConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def temperature(self) -> float: ...
    @property
    def precision(self) -> Precision: ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> image_states (B, 1 + N, D)."""
        ...

    def embed_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> image_embedding (B, E), unit norm, float32."""
        ...

    def embed_states(self, image_states: Tensor) -> Tensor:
        """The same of image_states (B, 1 + N, D)."""
        ...

    def project_context(self, image_states: Tensor) -> Context:
        """The keys and values of image_states (B, 1 + N, D) that texts look at."""
        ...

    def embed_texts(self, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        """token_ids, text_mask (R, L) -> text_embedding (R, E), unit norm, float32."""
        ...

    def match_logits(
        self, token_ids: Tensor, text_mask: Tensor, owners: Sequence[int], context: Context
    ) -> Tensor:
        """Judge texts (R, L), text r beside image owners[r] -> (R, 2) logits, float32."""
        ...

    def new_decoder_cache(self) -> DecoderCache: ...

    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor:
        """Append token_ids (R, T) to the cache -> logits (R, V) of the token that follows."""
        ...


def _of_unit_norm(embedding: Tensor) -> Tensor:
    """Return embeddings in float32; in half the digits their norms are off by up to 0.4 %."""
    if embedding.dtype == torch.float32:
        return embedding
    return F.normalize(embedding.float(), dim=-1)


class TorchBackend:
    """A `Blip` in PyTorch, in a precision of its own. `prepack` as in `kernels.prepare`."""

    def __init__(self, blip: Blip, precision: Precision, *, prepack: bool = True) -> None:
        self.blip = prepare(blip, precision, prepack=prepack)
        self.config, self.precision = blip.config, precision
        self._dtype = self.blip.vision.class_token.dtype

    @property
    def device(self) -> torch.device:
        return self.blip.device

    @property
    def temperature(self) -> float:
        return self.blip.temperature.item()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return torch.cat([self.blip.encode_image(part) for part in self._parts(images)])

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        states = [self.blip.vision.class_state(part) for part in self._parts(images)]
        return self.embed_states(torch.cat(states))

    @torch.no_grad()
    def embed_states(self, image_states: Tensor) -> Tensor:
        return _of_unit_norm(self.blip.embed_image(image_states))

    @torch.no_grad()
    def project_context(self, image_states: Tensor) -> Context:
        return self.blip.project_context(image_states)

    @torch.no_grad()
    def embed_texts(self, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        self.blip.require("text")
        texts = self._pack(token_ids, text_mask, self.config.tokens.cls, None)
        return _of_unit_norm(
            self.blip.embed_text(encode_first(self.blip.text, texts, None)[:, None])
        )

    @torch.no_grad()
    def match_logits(
        self, token_ids: Tensor, text_mask: Tensor, owners: Sequence[int], context: Context
    ) -> Tensor:
        self.blip.require("pair")
        texts = self._pack(token_ids, text_mask, self.config.tokens.enc, owners)
        return self.blip.match_logits(encode_first(self.blip.text, texts, context)[:, None]).float()

    @torch.no_grad()
    def refine(self, images: Tensor, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Move each image's embedding by its text; as `Blip.refine_image`."""
        device = self.device
        images = images.to(device, self._dtype)
        refined = self.blip.refine_image(images, token_ids.to(device), text_mask.to(device))
        return _of_unit_norm(refined)

    def new_decoder_cache(self) -> DecoderCache:
        return self.blip.new_decoder_cache()

    @torch.no_grad()
    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor:
        return self.blip.decode_step(token_ids, cache, context)

    def _parts(self, images: Tensor) -> Sequence[Tensor]:
        images = images.to(self.device, self._dtype)
        if self.device.type != "cpu":
            return [images]
        at_once = max(1, POSITIONS_AT_ONCE // (1 + self.config.vision.num_patches))
        return [images[start : start + at_once] for start in range(0, len(images), at_once)]

    def _pack(
        self, token_ids: Tensor, text_mask: Tensor, first: int, owners: Sequence[int] | None
    ) -> PackedTexts:
        return PackedTexts.of(token_ids.to(self.device), text_mask.to(self.device), first, owners)
