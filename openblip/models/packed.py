"""Texts without padding, and the MED's roles `text` and `pair` over them.

Only linear layers and LayerNorms cost much, and they take tokens one by one: all texts stand behind
each other, in order of their lengths: those of one length attend to themselves as one batch.
What is asked of a text is its first token's state; the last layer computes no other.

Letters: R texts, T tokens of all, B images, D text width, H heads, N image positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from openblip.models.context import Context
from openblip.models.text import CrossAttention, Med, MedLayer, SelfAttention


@dataclass(frozen=True)
class PackedTexts:
    """R texts in order of their lengths, each with the image that it is compared with.

    token_ids, position_ids  (T,)
    groups         of texts of one length: first token, number of texts, their length
    lengths        (R,) numbers of tokens, growing
    owners         (R,) number of each text's image
    order          (R,) place of each text in the list that was packed
    """

    token_ids: Tensor
    position_ids: Tensor
    groups: tuple[tuple[int, int, int], ...]
    lengths: Tensor
    owners: Tensor
    order: Tensor

    @classmethod
    def of(
        cls, token_ids: Tensor, text_mask: Tensor, first_token: int, owners: Sequence[int] | None
    ) -> "PackedTexts":
        """Pack token_ids, text_mask (R, L), whose first tokens become the role's.

        owners  image of each text; None where there are no images
        """
        lengths, order = text_mask.sum(dim=1).sort(stable=True)
        mask = text_mask[order].bool()
        packed = token_ids[order][mask]
        packed[_starts(lengths)] = first_token
        positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(mask)[mask]
        groups, start = [], 0
        for length, count in zip(
            *torch.unique_consecutive(lengths, return_counts=True), strict=True
        ):
            groups.append((start, int(count), int(length)))
            start += int(count) * int(length)
        rows = torch.zeros(len(order), dtype=torch.long) if owners is None else torch.tensor(owners)
        return cls(packed, positions, tuple(groups), lengths, rows.to(order.device)[order], order)

    @property
    def firsts(self) -> Tensor:
        """Places of the first tokens (R,)."""
        return _starts(self.lengths)

    def unsorted(self, rows: Tensor) -> Tensor:
        """Return rows (R, ...) of the packed texts in the order of the list that was packed."""
        result = torch.empty_like(rows)
        result[self.order] = rows
        return result


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def encode_first(med: Med, texts: PackedTexts, context: Context | None) -> Tensor:
    """Encode texts, alone or in sight of images -> states of their first tokens (R, D).

    They come in the order in which the texts were given. Equal to the first states of
    `Med.encode_text` and `Med.encode_pair`, but for rounding.
    """
    embedded = med.word_embedding(texts.token_ids) + med.position_embedding(texts.position_ids)
    states: Tensor = med.embedding_norm(embedded)
    sight = None if context is None else _Sight.of(texts.owners.repeat_interleave(texts.lengths))
    for index in range(len(med.layers)):
        layer = cast(MedLayer, med.layers[index])
        is_last = index == len(med.layers) - 1
        assert layer.bidirectional is not None
        states = _attend_to_self(layer.bidirectional, states, texts, only_firsts=is_last)
        if context is not None and sight is not None:
            if is_last:
                sight = _Sight.of(texts.owners)
            cross = cast(CrossAttention, layer.cross)
            found = sight.attend(cross.query(states), context, index, cross.num_heads)
            states = cross.output(found, states)
        states = layer.feed_forward(states)
    return texts.unsorted(states)


def _attend_to_self(
    attention: SelfAttention, states: Tensor, texts: PackedTexts, *, only_firsts: bool
) -> Tensor:
    width, heads = states.shape[1], attention.num_heads
    qkv = attention.qkv(states)
    found = []
    for start, count, length in texts.groups:
        group = qkv[start : start + count * length].view(count, length, 3, heads, width // heads)
        query, key, value = group.permute(2, 0, 3, 1, 4)
        if only_firsts:
            query = query[:, :, :1]
        attended = F.scaled_dot_product_attention(query, key, value)
        found.append(attended.transpose(1, 2).reshape(-1, width))
    if only_firsts:
        states = states[texts.firsts]
    output: Tensor = attention.output(torch.cat(found), states)
    return output


@dataclass(frozen=True)
class _Sight:
    """Which rows of queries look at which image.

    order   rows sorted by image, None where they are already
    counts  of rows of every image
    """

    order: Tensor | None
    images: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, owners: Tensor) -> "_Sight":
        images, counts = torch.unique(owners, return_counts=True)
        is_one = len(images) == 1
        order = None if is_one else owners.argsort(stable=True)
        return cls(order, tuple(images.tolist()), tuple(counts.tolist()))

    def attend(self, query: Tensor, context: Context, layer: int, num_heads: int) -> Tensor:
        """Return what queries (T, D) find in their images: keys and values are never copied."""
        rows = query if self.order is None else query[self.order]
        found = torch.empty_like(rows)
        start = 0
        for image, count in zip(self.images, self.counts, strict=True):
            one = rows[start : start + count].view(1, count, num_heads, -1).transpose(1, 2)
            keys = context.keys[layer][image : image + 1]
            values = context.values[layer][image : image + 1]
            attended = F.scaled_dot_product_attention(one, keys, values)
            found[start : start + count] = attended.transpose(1, 2).reshape(count, -1)
            start += count
        if self.order is None:
            return found
        result = torch.empty_like(found)
        result[self.order] = found
        return result
