"""The page of a CapFilt folder, and the parts of it that a loop's report shows too."""

import heapq
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from openblip.capfilt.keep import UNMATCHED, JudgedImage
from openblip.capfilt.manifest import Manifest, OutputPaths, manifests, read_judged
from openblip.data.batches import stable_id
from openblip.data.samples import Caption, CaptionSource
from openblip.data.shards import Shard
from openblip.data.sources import read_samples
from openblip.images import ImageDecodeError
from openblip.page import (
    Badge,
    CardLine,
    Html,
    KeyFigure,
    Section,
    card,
    cards,
    details,
    key_figures,
    no_picture,
    note,
    paragraph,
    picture,
    table,
    tag,
    write_page,
)
from openblip.page_charts import Counts, histograms

NUM_EXAMPLES = 6
_MOST_SHARDS_SHOWN = 100
_EXAMPLES: tuple[tuple[str, CaptionSource, bool], ...] = (
    ("Web captions that were dropped", "web", False),
    ("Web captions that were kept", "web", True),
    ("Synthetic captions that were kept", "synthetic", True),
    ("Synthetic captions that were dropped", "synthetic", False),
)


@dataclass(frozen=True)
class _Example:
    shard: str
    image: JudgedImage


def write_report_page(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.html` beside the shards. report is what `capfilt_report` returned."""
    lead = [
        paragraph(
            "A captioner wrote captions for every image, a filter judged these and the captions "
            "from the web, and what it judged to match the image was kept."
        ),
        capfilt_figures(report),
    ]
    sections = [
        Section("Captions", [captions_table(report), *_bad(report), *probabilities(report)]),
        Section("Examples", example_cards(folder)),
        Section("Shards", _shards(report)),
        Section("Models and settings", _runs(report)),
    ]
    truth = truth_table(report)
    if truth:
        sections.insert(1, Section("The filter against the planted truth", truth))
    write_page(folder / "report.html", "CapFilt report", lead, sections)


def capfilt_figures(report: Mapping[str, Any]) -> Html:
    """Return the numbers that sum a CapFilt folder up."""
    num_images, num_kept = report["num_images"], report["num_images_kept"]
    figures = [
        KeyFigure("Images judged", f"{num_images:,}", f"{num_kept:,} keep a caption"),
        *(
            KeyFigure(
                f"{source.capitalize()} kept",
                percent(counts["keep_rate"]),
                f"{counts['kept']:,} of {counts['judged']:,} captions",
            )
            for source, counts in report["captions"].items()
        ),
    ]
    if "planted_truth" in report:
        auc = report["planted_truth"]["roc_auc"]
        figures.append(KeyFigure("Filter's ROC-AUC", f"{auc:.3f}", "0.5 is chance, 1 perfect"))
    if report["images_per_s"] is not None:
        figures.append(
            KeyFigure(
                "Speed", f"{report['images_per_s']:,.1f}/s", f"images, {seconds(report['seconds'])}"
            )
        )
    return key_figures(figures)


def captions_table(report: Mapping[str, Any]) -> Html:
    """Return what became of the captions of each source."""
    reasons = sorted({r for counts in report["captions"].values() for r in counts["dropped"]})
    rows = [
        [
            source,
            f"{counts['judged']:,}",
            f"{counts['kept']:,}",
            percent(counts["keep_rate"]),
            *(f"{counts['dropped'].get(reason, 0):,}" for reason in reasons),
        ]
        for source, counts in report["captions"].items()
    ]
    header = [
        "written by",
        "judged",
        "kept",
        "keep rate",
        *(f"dropped: {_words(r)}" for r in reasons),
    ]
    return table("What became of the captions", header, rows)


def probabilities(report: Mapping[str, Any]) -> list[Html]:
    """Return the histograms of the match probability, by source and by kind of planted noise."""
    threshold = report["runs"][0]["settings"]["keep"]["threshold"]
    groups = report["match_probability"]
    by_source = [
        Counts(f"{source}: {sum(bins):,} captions", bins)
        for source, bins in groups["by_source"].items()
    ]
    by_noise = [
        Counts(f"{noise_name(noise)}: {sum(bins):,} captions", bins)
        for noise, bins in groups["by_noise"].items()
    ]
    axis = f"match probability; dashed: the threshold, {threshold:g}"
    charts = [histograms("Match probability by source", axis, by_source, threshold)]
    if by_noise:
        title = "Match probability of web captions by planted noise"
        charts.append(histograms(title, axis, by_noise, threshold))
    return [
        tag("div", *charts, class_="grid"),
        note("Each histogram is as high as its fullest bin: compare shapes, not heights."),
    ]


def truth_table(report: Mapping[str, Any]) -> list[Html]:
    """Return how the filter did on captions of known truth; nothing where that is not known."""
    truth = report.get("planted_truth")
    if truth is None:
        return []
    rows = [
        [
            noise_name(noise),
            f"{num:,}",
            percent(truth["keep_rate"][noise]),
            f"{truth['roc_auc_by_noise'][noise]:.3f}"
            if noise in truth["roc_auc_by_noise"]
            else "–",
        ]
        for noise, num in truth["num_captions"].items()
    ]
    return [
        table(
            "Web captions by planted noise",
            ["web captions", "number", "at or above the threshold", "ROC-AUC against true ones"],
            rows,
        ),
        paragraph(
            f"Over all kinds of noise the ROC-AUC is {truth['roc_auc']:.3f} (0.5 is chance). Of "
            f"the web captions at or above the threshold, {percent(truth['precision'])} are true."
        ),
    ]


def example_cards(folder: Path) -> list[Html]:
    """Return pictures with their captions, for web and synthetic, kept and dropped.

    Which ones is drawn by a hash of the image's key, so it is neither choice nor chance.
    """
    chosen = _choose_examples(folder)
    wanted: dict[str, set[str]] = defaultdict(set)
    for several in chosen:
        for example in several:
            wanted[example.shard].add(example.image.key)
    pictures = {
        shard: read_pictures([Shard.at(shard)], keys) for shard, keys in sorted(wanted.items())
    }
    return [
        note(
            "Drawn by a hash of the image's name, not picked. Under each heading, dropped means "
            "judged unmatched; match is the match probability."
        ),
        *(
            cards(
                title,
                [
                    card(
                        pictures[example.shard][example.image.key],
                        example.image.key,
                        [_line(caption, example.image.meta) for caption in example.image.captions],
                    )
                    for example in several
                ],
            )
            for (title, _, _), several in zip(_EXAMPLES, chosen, strict=True)
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


def noise_name(noise: str) -> str:
    """Return the name of a kind of planted noise, for reading."""
    return "true" if noise == "none" else _words(noise)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """Return a time in the unit that suits it."""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _choose_examples(folder: Path) -> list[list[_Example]]:
    """Return, per entry of _EXAMPLES, the images whose hashed keys are smallest."""
    # The second number is the image's own: images of one key have the same hash.
    heaps: list[list[tuple[int, int, _Example]]] = [[] for _ in _EXAMPLES]
    numbers = count()
    for path in manifests(folder):
        shard = Manifest.read(path).shard
        for image in read_judged(OutputPaths.of(path.stem, folder).captions):
            number = next(numbers)
            fates = {(c.source, c.drop_reason) for c in image.captions}
            for heap, (title, source, is_kept) in zip(heaps, _EXAMPLES, strict=True):
                if (source, None if is_kept else UNMATCHED) in fates:
                    # Negative, as a heap gives up its smallest.
                    rank = -stable_id(f"{title}/{path.stem}/{image.key}")
                    entry = (rank, number, _Example(shard, image))
                    if len(heap) < NUM_EXAMPLES:
                        heapq.heappush(heap, entry)
                    elif rank > heap[0][0]:
                        heapq.heapreplace(heap, entry)
    return [[example for _, _, example in sorted(heap, key=lambda e: -e[0])] for heap in heaps]


def _line(caption: Caption, meta: Mapping[str, Any]) -> CardLine:
    assert caption.match_probability is not None
    badges = []
    if caption.source == "web" and "noise" in meta:
        badges.append(Badge(f"planted: {noise_name(str(meta['noise']))}"))
    badges.append(Badge(f"match {caption.match_probability:.2f}"))
    if caption.drop_reason is None:
        badges.append(Badge("kept", "good"))
    else:
        badges.append(Badge(f"dropped: {_words(caption.drop_reason)}", "bad"))
    return CardLine(caption.source, [caption.text], badges)


def _bad(report: Mapping[str, Any]) -> list[Html]:
    bad = report["bad"]
    if not bad:
        return [note("Every sample could be used.")]
    rows = [[_words(reason), f"{num:,}"] for reason, num in bad.items()]
    return [table("Samples that could not be used", ["reason", "number"], rows)]


def _shards(report: Mapping[str, Any]) -> list[Html]:
    sources = list(report["captions"])
    shards = report["shards"]
    rows = []
    for shard in shards[:_MOST_SHARDS_SHOWN]:
        rates = [shard["captions"].get(source, {}).get("keep_rate") for source in sources]
        rows.append(
            [
                shard["name"],
                f"{shard['num_images']:,}",
                f"{shard['num_images_kept']:,}",
                f"{sum(shard['bad'].values()):,}",
                *("–" if rate is None else percent(rate) for rate in rates),
                seconds(shard["seconds"]),
            ]
        )
    header = ["shard", "images", "with a kept caption", "unusable"]
    header += [*(f"{source} kept" for source in sources), "time"]
    left_out = len(shards) - len(rows)
    more = [note(f"{left_out:,} more shards are in report.json.")] if left_out else []
    return [table("Shards", header, rows), *more]


def _runs(report: Mapping[str, Any]) -> list[Html]:
    runs = report["runs"]
    parts = []
    if len(runs) > 1:
        parts.append(
            paragraph(
                tag("strong", f"Shards of {len(runs)} different runs lie in this folder. "),
                "Thresholds that are drawn are those of the first.",
            )
        )
    for run in runs:
        rows = [
            ["captioner", run["captioner"]],
            ["filter", run["filter"]],
            ["openblip", run["version"]],
        ]
        title = f"Weights of {run['num_shards']:,} shards"
        parts += [
            table(title, ["part", "hash or version"], rows, num_text_columns=2),
            details("Settings", tag("pre", json.dumps(run["settings"], indent=2))),
        ]
    return parts


def _words(name: str) -> str:
    return name.replace("_", " ")
