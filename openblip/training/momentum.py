"""Momentum encoders and the feature queue that they fill (BLIP sec. 3.2, after ALBEF and MoCo).

Letters: B pairs of the batch, Q places in the queue, E embedding width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openblip.models.blip import Blip
from openblip.models.text import Med
from openblip.models.vision import VisionTransformer
from openblip.training.distributed import local_part

NO_ID = -100
"""Id of an empty place in the queue; equal to no real id."""


class MomentumTwin(nn.Module):
    """An exponential moving average of the two unimodal encoders and their projections.

    It carries the role `text` alone, takes no gradient, and runs without dropout.
    """

    def __init__(self, blip: Blip, momentum: float) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum {momentum} must be in [0, 1]")
        self.momentum = momentum
        self.vision = VisionTransformer(replace(blip.config.vision, drop_path=0.0))
        self.text = Med(replace(blip.config.text, roles=frozenset({"text"}), dropout=0.0))
        self.image_projection = nn.Linear(blip.config.vision.width, blip.config.embedding_width)
        self.text_projection = nn.Linear(blip.config.text.width, blip.config.embedding_width)
        self.requires_grad_(False)
        online = dict(blip.named_parameters())
        self.load_state_dict({name: online[name] for name, _ in self.named_parameters()})

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Return image_states (B, 1+N, D) of images (B, 3, S, S)."""
        states: Tensor = self.vision(images)
        return states

    @torch.no_grad()
    def embed(
        self, image_states: Tensor, token_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return image and text embeddings, each (B, E), unit norm."""
        text_states = self.text.encode_text(token_ids, text_mask)
        return (
            F.normalize(self.image_projection(image_states[:, 0]), dim=-1),
            F.normalize(self.text_projection(text_states[:, 0]), dim=-1),
        )

    @torch.no_grad()
    def update(self, blip: Blip) -> None:
        """Move towards the online weights: twin = momentum * twin + (1 - momentum) * online."""
        online = dict(blip.named_parameters())
        names = [name for name, _ in self.named_parameters()]
        # Of weights that are split over ranks, both sides are split alike.
        torch._foreach_lerp_(
            [local_part(parameter) for parameter in self.parameters()],
            [local_part(online[name]) for name in names],
            1.0 - self.momentum,
        )


@dataclass(frozen=True)
class QueueEntries:
    """What one batch adds to the queue: features (B, E) and the ids (B,) of images and texts."""

    image_embedding: Tensor
    text_embedding: Tensor
    image_ids: Tensor
    text_ids: Tensor


class FeatureQueue(nn.Module):
    """The momentum features of the last Q pairs, overwritten in a ring.

    A batch of any size fits: one that reaches the end goes on at the start.
    """

    image_embedding: Tensor
    text_embedding: Tensor
    image_ids: Tensor
    text_ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, embedding_width: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"queue size {size} must be at least 1")
        self.size = size
        # Random unit vectors, as in the original: harmless negatives until real ones replace them.
        for name in ("image_embedding", "text_embedding"):
            self.register_buffer(name, F.normalize(torch.randn(size, embedding_width), dim=-1))
        for name in ("image_ids", "text_ids"):
            self.register_buffer(name, torch.full((size,), NO_ID))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, entries: QueueEntries) -> None:
        """Write a batch at the pointer and move the pointer behind it.

        Of a batch longer than the queue the last Q pairs stay.
        """
        num_new = entries.image_ids.shape[0]
        places = (self.pointer + torch.arange(num_new, device=self.pointer.device)) % self.size
        newest = slice(max(0, num_new - self.size), None)
        for name in ("image_embedding", "text_embedding", "image_ids", "text_ids"):
            field = getattr(self, name)
            field[places[newest]] = getattr(entries, name)[newest].to(field.dtype)
        self.pointer.copy_((self.pointer + num_new) % self.size)
