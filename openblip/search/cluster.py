"""Near-duplicates and clusters of an index.

Letters: N images, E embedding width, K clusters.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from openblip.search.index import Index

MOST_HASH_BITS = 3
_BANDS = 4
_BLOCK = 2048
_STEPS = 50


@dataclass(frozen=True)
class Cluster:
    """Images that are alike: their numbers, the nearest to the centre first."""

    numbers: tuple[int, ...]


def duplicate_groups(
    index: Index, *, min_similarity: float, max_hash_bits: int = MOST_HASH_BITS
) -> list[tuple[int, ...]]:
    """Return groups of near-duplicates, the largest first; who is like one of a group is in it.

    min_similarity  cosine that the embeddings of two images have at least
    max_hash_bits   of 64, in which their perceptual hashes differ at most, 0 to 3; -1 does not ask
                    for their looks, and compares all N x N cosines: for 100,000 images a minute
    Raises ValueError for values out of range.
    """
    if not -1 <= max_hash_bits <= MOST_HASH_BITS:
        raise ValueError(f"max_hash_bits {max_hash_bits}: expected -1 to {MOST_HASH_BITS}")
    if not -1 <= min_similarity <= 1:
        raise ValueError(f"min_similarity {min_similarity} is no cosine")
    numbers = np.flatnonzero(index.is_live)
    leaders = list(range(len(numbers)))

    def leader(place: int) -> int:
        while leaders[place] != place:
            leaders[place] = leaders[leaders[place]]
            place = leaders[place]
        return place

    embeddings = index.embeddings(numbers.tolist())
    if max_hash_bits < 0:
        pairs = _alike_embeddings(embeddings, min_similarity)
    else:
        hashes = index.column("hash").to_numpy()[numbers]
        pairs = (
            (one, other)
            for one, other in _alike_hashes(hashes, max_hash_bits)
            if float(embeddings[one] @ embeddings[other]) >= min_similarity
        )
    for one, other in pairs:
        first, second = sorted((leader(one), leader(other)))
        leaders[second] = first
    groups: dict[int, list[int]] = defaultdict(list)
    for place, number in enumerate(numbers.tolist()):
        groups[leader(place)].append(number)
    found = [tuple(group) for group in groups.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group))


def clusters(index: Index, num: int, *, seed: int = 0) -> list[Cluster]:
    """Divide all images into clusters by k-means on their embeddings, the largest first.

    Raises ValueError unless `num` is between 1 and the number of images.
    """
    numbers = np.flatnonzero(index.is_live).tolist()
    if not 1 <= num <= len(numbers):
        raise ValueError(f"{num} clusters of {len(numbers)} images: expected 1 to {len(numbers)}")
    embeddings = index.embeddings(numbers)
    owners, similarity = _spherical_k_means(embeddings, num, seed)
    found = []
    for cluster in range(num):
        own = (owners == cluster).nonzero().flatten()
        order = own[similarity[own].argsort(descending=True, stable=True)]
        if len(order):
            found.append(Cluster(tuple(numbers[place] for place in order.tolist())))
    return sorted(found, key=lambda one: (-len(one.numbers), one.numbers))


def _alike_embeddings(embeddings: Tensor, min_similarity: float) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows of (N, E) whose cosine is high enough."""
    for start in range(0, len(embeddings), _BLOCK):
        block = embeddings[start : start + _BLOCK]
        similarity = block @ embeddings[start:].T
        # Each pair once, and nobody with himself.
        alike = (similarity >= min_similarity).triu(diagonal=1)
        for row, column in alike.nonzero().tolist():
            yield start + row, start + column


def _alike_hashes(hashes: NDArray[np.uint64], max_bits: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of hashes that differ in few bits: one of four parts is equal then."""
    for band in range(_BANDS):
        parts = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(parts, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
            for place, one in enumerate(group[:-1].tolist()):
                rest = group[place + 1 :]
                bits = (hashes[rest] ^ hashes[one]).view(np.uint8).reshape(-1, 8)
                differing = np.unpackbits(bits, axis=1).sum(axis=1)
                yield from ((one, other) for other in rest[differing <= max_bits].tolist())


def _spherical_k_means(embeddings: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the cluster of each row of (N, E), and its cosine with the centre.

    Starts from rows that are far from each other, as k-means++ does.
    """
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(embeddings), (1,), generator=generator))
    centres = [embeddings[first]]
    nearest = embeddings @ centres[0]
    for _ in range(num - 1):
        distance = (1.0 - nearest).clamp_min(0.0)
        if not bool(distance.sum() > 0):
            distance = torch.ones_like(distance)
        chosen = int(torch.multinomial(distance, 1, generator=generator))
        centres.append(embeddings[chosen])
        nearest = torch.maximum(nearest, embeddings @ centres[-1])
    centre = torch.stack(centres)
    owners = torch.full((len(embeddings),), -1)
    for _ in range(_STEPS):
        best = (embeddings @ centre.T).max(dim=1)
        if torch.equal(best.indices, owners):
            break
        owners = best.indices
        sums = torch.zeros_like(centre).index_add_(0, owners, embeddings)
        is_empty = torch.bincount(owners, minlength=num) == 0
        centre = torch.where(is_empty[:, None], centre, F.normalize(sums, dim=1))
    best = (embeddings @ centre.T).max(dim=1)
    return best.indices, best.values
