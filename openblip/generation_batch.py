"""The texts of a batch while they are decoded: what was written, and the cache behind it.

Letters: B images, K rows per image (beams or captions), R = B * K rows, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from openblip.models.context import Context, DecoderCache
from openblip.models.text import SpecialTokens

LEAVING_PARTS = 4
"""Images leave a batch once this part of it, one in so many, is done."""


class Decoder(Protocol):
    """A model that continues texts, as `Blip` and `Vqa` do."""

    def new_decoder_cache(self) -> DecoderCache: ...

    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor: ...


@dataclass(frozen=True)
class Generated:
    """One decoded caption.

    token_ids          new tokens, without prompt and [SEP]
    log_probabilities  of those tokens, and of [SEP] if it came, under the model's own distribution
    is_finished        whether [SEP] came before max_tokens
    """

    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    is_finished: bool

    @property
    def mean_log_probability(self) -> float:
        return sum(self.log_probabilities) / max(1, len(self.log_probabilities))


@dataclass
class RunningBatch:
    """The images that are still written about, K rows each, and what was written so far.

    images  numbers of the images
    ids     (R, T) tokens with the prefix; gains (R, T - prefix) log-probabilities of the new ones
    newest  (R, 1) tokens that the cache lacks; at first (B, prefix): rows of an image begin alike,
            so the prefix is read once per image
    """

    decoder: Decoder
    context: Context
    cache: DecoderCache
    images: list[int]
    num_each: int
    prefix_length: int
    ids: Tensor
    gains: Tensor
    newest: Tensor

    @classmethod
    def start(
        cls, decoder: Decoder, context: Context, prefix: list[int], num_each: int
    ) -> "RunningBatch":
        newest = torch.tensor(prefix, device=context.device).repeat(context.num_images, 1)
        ids = newest.repeat_interleave(num_each, dim=0)
        gains = torch.zeros(len(ids), 0, device=context.device)
        return cls(
            decoder, context, decoder.new_decoder_cache(), list(range(context.num_images)),
            num_each, len(prefix), ids, gains, newest,
        )  # fmt: skip

    def next_logits(self) -> Tensor:
        """Return logits (R, V) of the token that follows in each row."""
        logits = self.decoder.decode_step(self.newest, self.cache, self.context).float()
        if len(logits) < len(self.ids):
            origin = torch.arange(len(logits), device=logits.device)
            rows = origin.repeat_interleave(self.num_each)
            self.cache.reorder(rows)
            logits = logits[rows]
        return logits

    def append(self, chosen: Tensor, log_probabilities: Tensor) -> None:
        """Add a token (R,) to each row, with the log-probabilities (R, V) that it came from."""
        self.newest = chosen[:, None]
        self.gains = torch.cat([self.gains, log_probabilities.gather(1, self.newest)], dim=1)
        self.ids = torch.cat([self.ids, self.newest], dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Go on from other rows, as beam search asks."""
        self.ids, self.gains = self.ids[rows], self.gains[rows]
        self.cache.reorder(rows)

    def leave(self, is_done: Tensor) -> Tensor:
        """Let images go that are done, (B,); return the numbers of the rows that stay.

        The keys and values of those that stay are copied, which costs about as much as a step:
        below a quarter of the batch nobody leaves.
        """
        everyone = torch.arange(len(self.ids), device=is_done.device)
        num_done = int(is_done.sum())
        if num_done * LEAVING_PARTS < len(self.images):
            return everyone
        stay = (~is_done).nonzero().flatten()
        rows = everyone.view(-1, self.num_each)[stay].flatten()
        self.images = [self.images[place] for place in stay.tolist()]
        if self.images:
            self.context = self.context.select(stay)
            self.newest = self.newest[rows]
            self.reorder(rows)
        return rows

    def first_rows(self) -> list[int]:
        """Return the numbers that the rows had at the start."""
        each = range(self.num_each)
        return [image * self.num_each + index for image in self.images for index in each]

    def new_ids(self, row: int) -> list[int]:
        ids: list[int] = self.ids[row, self.prefix_length :].tolist()
        return ids

    def captions(self, place: int, tokens: SpecialTokens) -> list[Generated]:
        """Return what was written about the image at `place`."""
        rows = range(place * self.num_each, (place + 1) * self.num_each)
        return [_finish(self.new_ids(row), self.gains[row].tolist(), tokens) for row in rows]


def _finish(ids: list[int], gains: list[float], tokens: SpecialTokens) -> Generated:
    if tokens.sep in ids:
        end = ids.index(tokens.sep)
        return Generated(tuple(ids[:end]), tuple(gains[: end + 1]), True)
    return Generated(tuple(ids), tuple(gains), False)
