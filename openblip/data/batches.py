"""Batches: what all have in common, and those of image-text pairs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from openblip.tokenizer import Tokenizer


class Batch(Protocol):
    """What training asks of a batch: to move it, and to name its samples in an error."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True)
class ImageTextBatch:
    """B pairs.

    images                (B, 3, S, S) normalised
    token_ids, text_mask  (B, L), [CLS] first, 1 = real token
    image_ids, text_ids   (B,) equal where the image, or the text, is the same
    keys                  of the samples, to name them in an error
    """

    images: Tensor
    token_ids: Tensor
    text_mask: Tensor
    image_ids: Tensor
    text_ids: Tensor
    keys: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "ImageTextBatch":
        return ImageTextBatch(
            self.images.to(device),
            self.token_ids.to(device),
            self.text_mask.to(device),
            self.image_ids.to(device),
            self.text_ids.to(device),
            self.keys,
        )


def stable_id(text: str) -> int:
    """Return a non-negative 63-bit id, the same in every process: 8 bytes of BLAKE2b."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def collate(
    images: Sequence[Tensor],
    keys: Sequence[str],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_tokens: int,
) -> ImageTextBatch:
    """Build a batch of B images, their sample keys and one text each."""
    tokens = tokenizer.encode_batch(texts, max_tokens=max_tokens)
    return ImageTextBatch(
        images=torch.stack(list(images)),
        token_ids=tokens.token_ids,
        text_mask=tokens.text_mask,
        image_ids=torch.tensor([stable_id(key) for key in keys]),
        text_ids=torch.tensor([stable_id(text) for text in texts]),
        keys=tuple(keys),
    )
