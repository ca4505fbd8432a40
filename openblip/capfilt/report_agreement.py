"""Where the filter's two scores, of ITC and of ITM, contradict each other most."""

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from openblip.capfilt.keep import JudgedImage

NUM_SIMILARITY_BINS = 200
"""Bins of the similarity over [-1, 1], from which its percentiles are read."""

NUM_DISAGREEMENTS = 6


@dataclass
class SimilarityTally:
    """Captions per bin of the ITC similarity, by source; those without one are not counted."""

    bins: dict[str, list[int]] = field(
        default_factory=lambda: defaultdict(lambda: [0] * NUM_SIMILARITY_BINS)
    )

    def add(self, image: JudgedImage) -> None:
        """Count the captions of an image. Raises ValueError for a similarity that is NaN."""
        for caption in image.captions:
            if caption.similarity is None:
                continue
            if math.isnan(caption.similarity):
                raise ValueError(f"image {image.key}: its similarity is NaN; train the filter anew")
            self.bins[caption.source][_bin(caption.similarity)] += 1

    def percentiles(self) -> dict[str, list[float]]:
        """Return, by source, each bin's percentile in [0, 1].

        It is the share of the source's captions in lower bins and half of those in the bin.
        """
        result = {}
        for source, bins in self.bins.items():
            up_to = list(accumulate(bins))
            pairs = zip(up_to, bins, strict=True)
            result[source] = [(below - inside / 2) / up_to[-1] for below, inside in pairs]
        return result


class Disagreements:
    """The captions whose two scores contradict each other most, NUM_DISAGREEMENTS each way.

    A caption's score is its match probability less the percentile of its similarity among the
    folder's captions of its source: near 1, ITM alone finds that it matches; near -1, ITC alone.
    Of equal scores the caption that came first stays. Captions without one of the two are passed.
    """

    def __init__(self, similarities: SimilarityTally) -> None:
        self._percentiles = similarities.percentiles()
        self._heaps: tuple[_Heap, _Heap] = ([], [])
        self._number = 0

    def add(self, shard: str, image: JudgedImage) -> None:
        """Look at the captions of an image; shard is the name of its shard."""
        for caption in image.captions:
            if caption.match_probability is None or caption.similarity is None:
                continue
            percentile = self._percentiles[caption.source][_bin(caption.similarity)]
            score = caption.match_probability - percentile
            if score == 0:
                continue
            self._number += 1
            heap = self._heaps[0] if score > 0 else self._heaps[1]
            rank = abs(score), -self._number
            if len(heap) == NUM_DISAGREEMENTS and rank < heap[0][:2]:
                continue
            found = {
                "shard": shard,
                "key": image.key,
                "source": caption.source,
                "text": caption.text,
                "match_probability": caption.match_probability,
                "similarity": caption.similarity,
                "similarity_percentile": percentile,
                "score": score,
                "drop_reason": caption.drop_reason,
            }
            # Numbers differ, so entries are never compared by what was found.
            heapq.heappush(heap, (*rank, found))
            if len(heap) > NUM_DISAGREEMENTS:
                heapq.heappop(heap)

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return the captions, the strongest disagreement of either way first."""
        high, low = (
            [found for _, _, found in sorted(heap, key=lambda e: (-e[0], -e[1]))]
            for heap in self._heaps
        )
        return {"high_match_low_similarity": high, "low_match_high_similarity": low}


_Heap = list[tuple[float, int, dict[str, Any]]]


def _bin(similarity: float) -> int:
    # Rounding may leave a cosine a little outside.
    place = int((similarity + 1) / 2 * NUM_SIMILARITY_BINS)
    return max(0, min(NUM_SIMILARITY_BINS - 1, place))
