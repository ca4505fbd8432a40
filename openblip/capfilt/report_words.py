"""Captions as words, in the report of a CapFilt folder: lengths, vocabulary, repetition."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from openblip.capfilt.keep import JudgedImage
from openblip.capfilt.report_text import percent
from openblip.captions import clean_caption
from openblip.data.batches import stable_id
from openblip.page import Html, bars, grid, note, table
from openblip.page_charts import Counts, histograms

MOST_WORDS = 50
"""Captions are cleaned up to this many words; the last length holds all that had more."""

NUM_FREQUENT_WORDS = 20
NUM_REPEATED_CAPTIONS = 10
_SHORTEST_AXIS = 10
_FATES = ("kept", "dropped")


@dataclass
class WordTally:
    """Words of judged captions, as `clean_caption` leaves them, and how often captions recur.

    Lengths and words are counted exactly, in memory that grows with the vocabulary. Of a kept
    caption its 63-bit hash stays, 8 bytes: numbers of equal captions are exact unless two texts
    share a hash, which among 100 million captions happens once in 2,000 folders.
    """

    lengths: dict[tuple[str, str], Counter[int]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    words: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    hashes: dict[str, "array[int]"] = field(default_factory=lambda: defaultdict(lambda: array("Q")))

    def add(self, image: JudgedImage) -> None:
        """Count the captions of an image."""
        for caption in image.captions:
            text = clean_caption(caption.text, MOST_WORDS)
            words = text.split()
            is_kept = caption.drop_reason is None
            length = min(MOST_WORDS, len(words))
            self.lengths[caption.source, "kept" if is_kept else "dropped"][length] += 1
            if is_kept:
                self.words[caption.source].update(words)
                self.hashes[caption.source].append(stable_id(text))

    def lengths_to_json(self) -> dict[str, Any]:
        """Return captions per number of words (0 to MOST_WORDS), by source, kept and dropped."""
        sources = sorted({source for source, _ in self.lengths}, reverse=True)
        result = {}
        for source in sources:
            kept, dropped = (self.lengths.get((source, fate), Counter()) for fate in _FATES)
            result[source] = {
                "kept": {"counts": _counts(kept), **_middle(kept)},
                "dropped": {"counts": _counts(dropped), **_middle(dropped)},
                **_middle(kept + dropped),
            }
        return result

    def vocabulary_to_json(self) -> dict[str, Any]:
        """Return the words of the kept captions by source; rates are None where none is kept."""
        result = {}
        for source in sorted({source for source, _ in self.lengths}, reverse=True):
            words = self.words.get(source, Counter())
            captions = len(self.hashes.get(source, ()))
            distinct = len(np.unique(_joined([self.hashes[source]]))) if captions else 0
            num_words = words.total()
            frequent = sorted(words.items(), key=lambda item: (-item[1], item[0]))
            result[source] = {
                "num_captions": captions,
                "num_distinct_captions": distinct,
                "share_distinct_captions": distinct / captions if captions else None,
                "num_words": num_words,
                "num_distinct_words": len(words),
                "type_token_ratio": len(words) / num_words if num_words else None,
                "num_words_used_once": sum(count == 1 for count in words.values()),
                "most_frequent": [
                    {"word": word, "count": count} for word, count in frequent[:NUM_FREQUENT_WORDS]
                ],
            }
        return result

    def repeated(self) -> dict[int, int]:
        """Return hash -> count of the kept captions that recur most, whoever wrote them.

        At most NUM_REPEATED_CAPTIONS, each there at least twice; of equal counts the smaller hash
        goes first.
        """
        values, counts = np.unique(_joined(self.hashes.values()), return_counts=True)
        is_repeated = counts > 1
        values, counts = values[is_repeated], counts[is_repeated]
        first = np.lexsort((values, -counts))[:NUM_REPEATED_CAPTIONS]
        return {int(values[place]): int(counts[place]) for place in first}


class RepeatedTexts:
    """The texts to the hashes of `WordTally.repeated`, found as the captions go by once more."""

    def __init__(self, counts: Mapping[int, int]) -> None:
        self._counts = counts
        self._missing = set(counts)
        self._found: list[tuple[int, str]] = []

    def add(self, image: JudgedImage) -> None:
        """Look at the captions of an image."""
        for caption in image.captions if self._missing else ():
            if caption.drop_reason is None:
                text = clean_caption(caption.text, MOST_WORDS)
                number = stable_id(text)
                if number in self._missing:
                    self._missing.discard(number)
                    self._found.append((self._counts[number], text))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the texts with their counts, the most repeated first."""
        order = sorted(self._found, key=lambda item: (-item[0], item[1]))
        return [{"text": text, "count": count} for count, text in order]


def words_section(report: Mapping[str, Any]) -> list[Html]:
    """Return the part of the page that shows lengths, vocabulary and repeated captions."""
    lengths, vocabulary = report["caption_lengths"], report["vocabulary"]
    return [
        _lengths_table(lengths),
        grid(*(_lengths_chart(source, values) for source, values in lengths.items())),
        note(
            "Captions as training reads them: in lower case, without punctuation, and with their "
            f"first {MOST_WORDS} words. Each histogram is as high as its fullest bin."
        ),
        _vocabulary_table(vocabulary),
        note(
            "The type-token ratio is distinct words per word. It falls as captions are added: "
            "compare sources of like size."
        ),
        grid(
            *(
                bars(
                    f"Most frequent words of kept {source} captions",
                    ("word", "times"),
                    [(w["word"], w["count"], f"{w['count']:,}") for w in values["most_frequent"]],
                )
                for source, values in vocabulary.items()
                if values["most_frequent"]
            )
        ),
        *_repeated(report["repeated_captions"]),
    ]


def _counts(lengths: Counter[int]) -> list[int]:
    return [lengths[length] for length in range(MOST_WORDS + 1)]


def _middle(lengths: Counter[int]) -> dict[str, float | None]:
    """Return mean and median in words, None of no captions."""
    total = lengths.total()
    if not total:
        return {"mean": None, "median": None}
    return {
        "mean": sum(length * count for length, count in lengths.items()) / total,
        "median": (_at(lengths, (total - 1) // 2) + _at(lengths, total // 2)) / 2,
    }


def _at(lengths: Counter[int], place: int) -> int:
    """Return the length at a place of all lengths in order, from 0."""
    order = sorted(lengths)
    up_to = accumulate(lengths[length] for length in order)
    return next(length for length, below in zip(order, up_to, strict=True) if below > place)


def _joined(several: Iterable["array[int]"]) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    parts = [np.frombuffer(hashes, dtype=np.uint64) for hashes in several if hashes]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _lengths_table(lengths: Mapping[str, Any]) -> Html:
    rows = []
    for source, values in lengths.items():
        kept, dropped = (sum(values[fate]["counts"]) for fate in _FATES)
        for name, number, middle in (
            ("all", kept + dropped, values),
            ("kept", kept, values["kept"]),
            ("dropped", dropped, values["dropped"]),
        ):
            if number:
                mean, median = middle["mean"], middle["median"]
                rows.append([source, name, f"{number:,}", f"{mean:.1f}", f"{median:g}"])
    header = ["written by", "captions", "number", "mean", "median"]
    return table("Words per caption", header, rows, num_text_columns=2)


def _lengths_chart(source: str, values: Mapping[str, Any]) -> Html:
    longest = max(
        (length for fate in _FATES for length, n in enumerate(values[fate]["counts"]) if n),
        default=0,
    )
    shown = max(_SHORTEST_AXIS, longest) + 1
    rows = [
        Counts(f"{fate}: {sum(values[fate]['counts']):,} captions", values[fate]["counts"][:shown])
        for fate in _FATES
        if any(values[fate]["counts"])
    ]
    bins = [f"{length} word{'s' * (length != 1)}{_or_more(length)}" for length in range(shown)]
    step = 5 if shown <= 26 else 10
    ticks = [
        ((length + 0.5) / shown, f"{length}{'+' * (length == MOST_WORDS)}")
        for length in range(0, shown, step)
    ]
    return histograms(
        f"Words per {source} caption", "words in a caption", rows, bins=bins, ticks=ticks
    )


def _or_more(length: int) -> str:
    return " or more" if length == MOST_WORDS else ""


def _vocabulary_table(vocabulary: Mapping[str, Any]) -> Html:
    header = [
        "written by",
        "kept captions",
        "distinct captions",
        "words",
        "distinct words",
        "type-token ratio",
        "words used once",
    ]
    rows = [
        [
            source,
            f"{values['num_captions']:,}",
            _share(values["share_distinct_captions"]),
            f"{values['num_words']:,}",
            f"{values['num_distinct_words']:,}",
            "–" if values["type_token_ratio"] is None else f"{values['type_token_ratio']:.3g}",
            f"{values['num_words_used_once']:,}",
        ]
        for source, values in vocabulary.items()
    ]
    return table("Vocabulary of the kept captions", header, rows)


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _repeated(captions: Sequence[Mapping[str, Any]]) -> list[Html]:
    if not captions:
        return [note("No kept caption is there twice.")]
    rows = [[one["text"] or "(empty)", f"{one['count']:,}"] for one in captions]
    return [table("Kept captions that recur most", ["caption", "times"], rows)]
