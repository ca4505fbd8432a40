"""The page of a CapFilt folder, and the parts of it that a loop's report shows too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openblip.capfilt.report_cards import disagreement_cards, example_cards
from openblip.capfilt.report_shards import shards_section
from openblip.capfilt.report_text import noise_name, percent, seconds, spoken
from openblip.capfilt.report_words import words_section
from openblip.page import (
    Html,
    KeyFigure,
    Section,
    details,
    key_figures,
    note,
    paragraph,
    table,
    tag,
    write_page,
)
from openblip.page_charts import Counts, histograms


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
        Section("Words", words_section(report)),
        Section("Examples", example_cards(folder)),
        Section("ITC against ITM", disagreement_cards(report, folder)),
        Section("Shards", shards_section(report)),
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
        *(f"dropped: {spoken(r)}" for r in reasons),
    ]
    return table("What became of the captions", header, rows)


def probabilities(report: Mapping[str, Any]) -> list[Html]:
    """Return the histograms of the match probability, by source and by kind of planted noise."""
    threshold = report["runs"][0]["settings"]["keep"]["threshold"]
    groups = report["match_probability"]
    by_source = [
        Counts(f"{source}: {sum(bins):,} captions", bins)
        for source, bins in groups["by_source"].items()
        if any(bins)
    ]
    by_noise = [
        Counts(f"{noise_name(noise)}: {sum(bins):,} captions", bins)
        for noise, bins in groups["by_noise"].items()
        if any(bins)
    ]
    axis = f"match probability; dashed: the threshold, {threshold:g}"
    charts = [histograms("Match probability by source", axis, by_source, threshold)]
    if by_noise:
        title = "Match probability of web captions by planted noise"
        charts.append(histograms(title, axis, by_noise, threshold))
    not_judged = ", ".join(f"{source} {num:,}" for source, num in groups["not_judged"].items())
    return [
        tag("div", *charts, class_="grid"),
        note("Each histogram is as high as its fullest bin: compare shapes, not heights."),
        *([note(f"Left out, as ITM did not judge them: {not_judged}.")] if not_judged else []),
    ]


def truth_table(report: Mapping[str, Any]) -> list[Html]:
    """Return how the filter did on captions of known truth; nothing where that is not known."""
    truth = report.get("planted_truth")
    if truth is None:
        return []
    has_not_judged = any(truth["num_not_judged"].values())
    header = ["web captions", "number", "at or above the threshold", "ROC-AUC against true ones"]
    rows = [
        [
            noise_name(noise),
            f"{num:,}",
            percent(truth["keep_rate"][noise]),
            f"{truth['roc_auc_by_noise'][noise]:.3f}"
            if noise in truth["roc_auc_by_noise"]
            else "–",
            *([f"{truth['num_not_judged'][noise]:,}"] if has_not_judged else []),
        ]
        for noise, num in truth["num_captions"].items()
    ]
    return [
        table(
            "Web captions by planted noise",
            [*header, *(["not judged by ITM"] if has_not_judged else [])],
            rows,
        ),
        paragraph(
            f"Over all kinds of noise the ROC-AUC is {truth['roc_auc']:.3f} (0.5 is chance). Of "
            f"the web captions at or above the threshold, {percent(truth['precision'])} are true."
        ),
    ]


def _bad(report: Mapping[str, Any]) -> list[Html]:
    bad = report["bad"]
    if not bad:
        return [note("Every sample could be used.")]
    rows = [[spoken(reason), f"{num:,}"] for reason, num in bad.items()]
    return [table("Samples that could not be used", ["reason", "number"], rows)]


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
