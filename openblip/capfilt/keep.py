"""Which judged captions are kept (BLIP sec. 3.3, and what it leaves open); needs no model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from openblip.captions import clean_caption
from openblip.config import Recipe
from openblip.data.samples import Caption, CaptionSource

NOT_ASKED_FOR = "source_left_out"
EMPTY = "empty"
DISSIMILAR = "dissimilar"
UNMATCHED = "unmatched"
BELOW_SHARE = "below_share"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"
SECOND_CHOICE = "second_choice"
OUTRANKED = "outranked"
TOO_COMMON = "too_common"


@dataclass(frozen=True)
class JudgedImage:
    """All captions of one image, as a line of `x.captions.jsonl`.

    image_hash  of the image's bytes
    """

    key: str
    captions: tuple[Caption, ...]
    meta: Mapping[str, Any]
    image_hash: str = ""


class KeepRule(Recipe):
    """Which judged captions are for training.

    sources         who may have written it
    min_similarity  ITC cosine below which a caption is dropped unseen by ITM; None asks ITM of all
    threshold       a caption is kept if its match probability is at least this; 0.5 is where the
                    ITM head says that the pair matches, 0 keeps all
    share           of a shard's captions the best share by match probability is kept, if it also
                    passes the threshold; None keeps all of those
    near            captions of an image are near-equal if the words that they share are at least
                    this part of the words of both; the better judged one stays
    first           captions of this source go first: others stay where it has none to keep
    best            the most captions that an image keeps, the best judged ones
    most_repeats    the most images of a shard that keep the same text, as "image not available"
    """

    sources: tuple[CaptionSource, ...] = ("web", "synthetic", "human")
    min_similarity: float | None = Field(None, ge=-1, le=1)
    threshold: float = Field(0.5, ge=0, le=1)
    share: float | None = Field(None, gt=0, le=1)
    near: float | None = Field(None, gt=0, le=1)
    first: Literal["web", "synthetic"] | None = None
    best: int | None = Field(None, ge=1)
    most_repeats: int | None = Field(None, ge=1)

    def apply(self, captions: Sequence[Caption], least: float = 0.0) -> tuple[Caption, ...]:
        """Return the judged captions of one image, in their order, with a reason where dropped.

        Of captions that are equal once cleaned the first that is kept stays.
        least  match probability of the shard's best share
        Raises ValueError for one that this rule needs judged by ITM, and that was not.
        """
        reasons: list[str | None] = []
        seen: set[str] = set()
        for caption in captions:
            text = clean_caption(caption.text)
            reason = self._alone(caption, text, least)
            if reason is None and text in seen:
                reason = DUPLICATE
            elif reason is None:
                seen.add(text)
            reasons.append(reason)
        best_first = sorted(
            (place for place, reason in enumerate(reasons) if reason is None),
            key=lambda place: (-_probability(captions[place]), place),
        )
        chosen = self._without_near(best_first, captions, reasons)
        if self.first is not None and any(captions[p].source == self.first for p in chosen):
            for place in chosen:
                if captions[place].source not in (self.first, "human"):
                    reasons[place] = SECOND_CHOICE
            chosen = [place for place in chosen if reasons[place] is None]
        for place in chosen[self.best :] if self.best is not None else []:
            reasons[place] = OUTRANKED
        return tuple(
            replace(caption, drop_reason=reason)
            for caption, reason in zip(captions, reasons, strict=True)
        )

    def _alone(self, caption: Caption, text: str, least: float) -> str | None:
        """Return why a caption is dropped whatever the image's others are."""
        if caption.source not in self.sources:
            return NOT_ASKED_FOR
        if not text:
            return EMPTY
        if self.min_similarity is not None and _similarity(caption) < self.min_similarity:
            return DISSIMILAR
        if _probability(caption) < self.threshold:
            return UNMATCHED
        return BELOW_SHARE if _probability(caption) < least else None

    def _without_near(
        self, best_first: list[int], captions: Sequence[Caption], reasons: list[str | None]
    ) -> list[int]:
        if self.near is None:
            return best_first
        kept: list[tuple[int, frozenset[str]]] = []
        for place in best_first:
            words = frozenset(clean_caption(captions[place].text).split())
            if any(len(words & w) >= self.near * len(words | w) for _, w in kept):
                reasons[place] = NEAR_DUPLICATE
            else:
                kept.append((place, words))
        return [place for place, _ in kept]


def select(images: Sequence[JudgedImage], keep: KeepRule) -> list[JudgedImage]:
    """Apply a rule to all images of a shard, in their order."""
    least = 0.0
    if keep.share is not None:
        least = least_of_share(
            (
                caption.match_probability
                for image in images
                for caption in image.captions
                if caption.match_probability is not None
                and caption.source in keep.sources
                and clean_caption(caption.text)
            ),
            keep.share,
        )
    result = [replace(image, captions=keep.apply(image.captions, least)) for image in images]
    return result if keep.most_repeats is None else _without_common(result, keep.most_repeats)


def least_of_share(probabilities: Iterable[float], share: float) -> float:
    """Return the match probability that the best `share` of captions reach; 0 if there is none."""
    best_first = sorted(probabilities, reverse=True)
    return best_first[max(1, round(share * len(best_first))) - 1] if best_first else 0.0


def _without_common(images: Sequence[JudgedImage], most: int) -> list[JudgedImage]:
    times: Counter[str] = Counter()
    result = []
    for image in images:
        captions = []
        for caption in image.captions:
            if caption.drop_reason is None:
                text = clean_caption(caption.text)
                times[text] += 1
                if times[text] > most:
                    caption = replace(caption, drop_reason=TOO_COMMON)
            captions.append(caption)
        result.append(replace(image, captions=tuple(captions)))
    return result


def _similarity(caption: Caption) -> float:
    if caption.similarity is None:
        raise ValueError(f"the caption {caption.text!r} has no ITC cosine to be selected by")
    return caption.similarity


def _probability(caption: Caption) -> float:
    if caption.match_probability is None:
        raise ValueError(
            f"the caption {caption.text!r} was dropped by its ITC cosine, {caption.similarity}, "
            "before ITM judged it: take a min_similarity that is at least that of the run"
        )
    return caption.match_probability
