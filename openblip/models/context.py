"""What a text looks at, and what a decoder remembers: keys and values, computed once.

Letters: B images, or questions where answers look at them, R rows of text, N positions, T tokens,
D width, H heads.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The cross-attention's keys and values of a batch of images, one pair per layer.

    They depend on the image alone: computed once, they serve every text, role and decoding step.
    keys, values  per layer (B, H, N, D / H)
    mask          (B, N) 1 = seen, where some positions are padding; None: all are seen
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None

    @property
    def num_images(self) -> int:
        return self.keys[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def visible(self) -> Tensor | None:
        """The mask as attention takes it, (B, 1, 1, N) bool."""
        return None if self.mask is None else self.mask.bool()[:, None, None, :]

    def __getitem__(self, part: slice) -> "Context":
        """Return the context of some images that stand side by side; nothing is copied."""
        return Context(
            tuple(key[part] for key in self.keys),
            tuple(value[part] for value in self.values),
            None if self.mask is None else self.mask[part],
        )

    def select(self, indices: Tensor) -> "Context":
        """Return the context of the images at `indices` (any number, repeats allowed)."""
        return Context(
            tuple(key.index_select(0, indices) for key in self.keys),
            tuple(value.index_select(0, indices) for value in self.values),
            None if self.mask is None else self.mask.index_select(0, indices),
        )


@dataclass
class DecoderCache:
    """Self-attention keys and values of the tokens decoded so far, per layer (R, H, T, D / H)."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest tokens of a layer and return all of the layer's keys and values."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]

    def reorder(self, rows: Tensor) -> None:
        """Replace the rows by the rows at `rows`, as beam search asks after each step."""
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]
