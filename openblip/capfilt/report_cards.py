"""Pictures with their judged captions, for CapFilt's reports."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.manifest import Manifest, OutputPaths, judged_by, manifests
from openblip.capfilt.report_text import noise_name, percent, spoken
from openblip.data.batches import stable_id
from openblip.data.samples import Caption, CaptionSource
from openblip.data.shards import Shard
from openblip.data.sources import read_samples
from openblip.images import ImageDecodeError
from openblip.page import Badge, CardLine, Html, card, cards, no_picture, note, picture

NUM_EXAMPLES = 6
_EXAMPLES: tuple[tuple[str, CaptionSource, bool], ...] = (
    ("Web captions that were dropped", "web", False),
    ("Web captions that were kept", "web", True),
    ("Synthetic captions that were kept", "synthetic", True),
    ("Synthetic captions that were dropped", "synthetic", False),
)
_DISAGREEMENTS = (
    ("ITM finds that they match, ITC does not", "high_match_low_similarity"),
    ("ITC finds that they match, ITM does not", "low_match_high_similarity"),
)


@dataclass(frozen=True)
class _Example:
    shard: str
    image: JudgedImage


def example_cards(folder: Path) -> list[Html]:
    """Return pictures with their captions, for web and synthetic, kept and dropped.

    Which ones is drawn by a hash of the image's key, so it is neither choice nor chance.
    """
    chosen = _choose_examples(folder)
    pictures = _pictures((one.shard, one.image.key) for several in chosen for one in several)
    return [
        note(
            "Drawn by a hash of the image's name, not picked. All captions of an image are "
            "shown; match is the match probability."
        ),
        *(
            cards(
                title,
                [
                    card(
                        pictures[one.shard, one.image.key],
                        one.image.key,
                        [_line(caption, one.image.meta) for caption in one.image.captions],
                    )
                    for one in several
                ],
            )
            for (title, _, _), several in zip(_EXAMPLES, chosen, strict=True)
        ),
    ]


def disagreement_cards(report: Mapping[str, Any], folder: Path) -> list[Html]:
    """Return pictures with the captions on which ITC and ITM contradict each other most.

    report  what `capfilt_report` returned for this folder
    """
    found = report["disagreements"]
    if not any(found.values()):
        return [note("No caption has both a match probability and a similarity.")]
    shards = {
        one["shard"]: Manifest.read(OutputPaths.of(one["shard"], folder).manifest).shard
        for several in found.values()
        for one in several
    }
    pictures = _pictures(
        (shards[one["shard"]], one["key"]) for several in found.values() for one in several
    )
    return [
        note(
            "Match is the match probability of ITM, similarity the cosine of ITC. Shown are the "
            "greatest differences between the match probability and the share of captions by the "
            "same writer whose similarity is lower."
        ),
        *(
            cards(
                title,
                [
                    card(
                        pictures[shards[one["shard"]], one["key"]],
                        one["key"],
                        [_disagreement_line(one)],
                    )
                    for one in found[name]
                ],
            )
            for title, name in _DISAGREEMENTS
        ),
    ]


def read_pictures(shards: Sequence[Shard], keys: set[str]) -> dict[str, Html]:
    """Return the thumbnail of each key, or a note in its place if it cannot be read any more."""
    missing = set(keys)
    result = {}
    reason = "The picture is gone."
    for shard in shards:
        try:
            for sample in read_samples(shard, on_bad=lambda key, reason: None):
                if sample.key in missing:
                    missing.discard(sample.key)
                    alt = f"Picture {sample.key}; its captions stand beside it"
                    try:
                        result[sample.key] = picture(sample.image_bytes, alt)
                    except ImageDecodeError as error:
                        result[sample.key] = no_picture(f"The picture is {error.reason}.")
                if not missing:
                    break
        except (OSError, ValueError):
            reason = f"The shard {shard.name} is gone."
    return result | {key: no_picture(reason) for key in missing}


def _pictures(wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Html]:
    """Return the thumbnails of (address of a shard, key); each shard is read once."""
    keys: dict[str, set[str]] = defaultdict(set)
    for shard, key in wanted:
        keys[shard].add(key)
    return {
        (shard, key): shown
        for shard, several in sorted(keys.items())
        for key, shown in read_pictures([Shard.at(shard)], several).items()
    }


def _choose_examples(folder: Path) -> list[list[_Example]]:
    """Return, per entry of _EXAMPLES, the images whose hashed keys are smallest."""
    # The second number is the image's own: images of one key have the same hash.
    heaps: list[list[tuple[int, int, _Example]]] = [[] for _ in _EXAMPLES]
    numbers = count()
    for path in manifests(folder):
        shard = Manifest.read(path).shard
        for image in judged_by([path]):
            number = next(numbers)
            fates = {(c.source, c.drop_reason is None) for c in image.captions}
            for heap, (title, source, is_kept) in zip(heaps, _EXAMPLES, strict=True):
                if (source, is_kept) in fates:
                    # Negative, as a heap gives up its smallest.
                    rank = -stable_id(f"{title}/{path.stem}/{image.key}")
                    entry = (rank, number, _Example(shard, image))
                    if len(heap) < NUM_EXAMPLES:
                        heapq.heappush(heap, entry)
                    elif rank > heap[0][0]:
                        heapq.heapreplace(heap, entry)
    return [[example for _, _, example in sorted(heap, key=lambda e: -e[0])] for heap in heaps]


def _line(caption: Caption, meta: Mapping[str, Any]) -> CardLine:
    badges = []
    if caption.source == "web" and "noise" in meta:
        badges.append(Badge(f"planted: {noise_name(str(meta['noise']))}"))
    if caption.match_probability is None:
        badges.append(Badge("not judged by ITM"))
    else:
        badges.append(Badge(f"match {caption.match_probability:.2f}"))
    return CardLine(caption.source, [caption.text], [*badges, _fate(caption.drop_reason)])


def _disagreement_line(found: Mapping[str, Any]) -> CardLine:
    badges = [
        Badge(f"match {found['match_probability']:.2f}"),
        Badge(f"similarity {found['similarity']:.2f}"),
        Badge(f"above {percent(found['similarity_percentile'])} of {found['source']}"),
        _fate(found["drop_reason"]),
    ]
    return CardLine(found["source"], [found["text"]], badges)


def _fate(drop_reason: str | None) -> Badge:
    if drop_reason is None:
        return Badge("kept", "good")
    return Badge(f"dropped: {spoken(drop_reason)}", "bad")
