"""The page that shows what labelled pairs say of a filter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from openblip.capfilt.calibration import Calibration, Scale
from openblip.data.sinks import write_json_atomically
from openblip.evaluation.reliability import NUM_BINS
from openblip.evaluation.thresholds import OperatingPoint
from openblip.page import (
    Html,
    KeyFigure,
    Section,
    grid,
    key_figures,
    note,
    paragraph,
    table,
    tag,
    write_page,
)
from openblip.page_charts import Counts, Series, histograms, unit_chart

_SHOWN = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds of the table; `calibration.json` has more."""


def write_calibration(
    folder: Path, calibration: Calibration, *, model: str, labels: str, bad: Mapping[str, int]
) -> None:
    """Write `calibration.json` and `calibration.html` into a folder, which is made if need be.

    model   hash of the filter's weights
    labels  where the pairs are from
    bad     what could not be used, by reason
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = {"model": model, "labels": labels, "bad": dict(bad), **calibration.to_json()}
    write_json_atomically(folder / "calibration.json", report)
    lead = [
        paragraph(
            "A filter judged pairs of image and text that are known to match or not. The page says "
            "how well it tells them apart, what each threshold keeps, and whether its match "
            "probability is right as often as it says."
        ),
        _figures(calibration),
        *(paragraph(tag("strong", sentence)) for sentence in calibration.notes),
    ]
    sections = [
        Section("Telling matches from the rest", _discrimination(calibration)),
        Section("Reliability", _reliability(calibration)),
        Section("Thresholds", _thresholds(calibration)),
        Section("Pairs and model", _origin(calibration, model, labels, bad)),
    ]
    write_page(folder / "calibration.html", "Calibration of a filter", lead, sections)


def _figures(calibration: Calibration) -> Html:
    before, after = calibration.before, calibration.after
    num_pairs = calibration.num_matching + calibration.num_wrong
    return key_figures(
        [
            KeyFigure("Pairs", f"{num_pairs:,}", f"{calibration.num_matching:,} match"),
            KeyFigure("ROC-AUC", f"{calibration.roc_auc:.3f}", "0.5 is chance, 1 perfect"),
            KeyFigure(
                "Average precision",
                f"{calibration.average_precision:.3f}",
                f"{calibration.num_matching / num_pairs:.3f} is chance",
            ),
            KeyFigure(
                f"Recall at precision {calibration.wanted_precision:g}",
                "–" if before.smallest is None else f"{before.smallest.recall:.3f}",
                "no threshold reaches it"
                if before.smallest is None
                else f"threshold {_smallest(before)}",
            ),
            KeyFigure("Temperature", f"{calibration.temperature:.3f}", "1 changes nothing"),
            KeyFigure("Calibration error", f"{after.ece:.3f}", f"{before.ece:.3f} before"),
            KeyFigure("Brier score", f"{after.brier:.3f}", f"{before.brier:.3f} before"),
        ]
    )


def _discrimination(calibration: Calibration) -> list[Html]:
    charts = [
        unit_chart(
            "ROC curve",
            "share of the wrong pairs that is kept",
            "share of the matching pairs that is kept",
            [Series("filter", calibration.roc)],
            has_diagonal=True,
        ),
        _threshold_chart(
            "What a threshold keeps, before the temperature", calibration.before.points
        ),
    ]
    half = calibration.at_half
    return [
        grid(*charts),
        paragraph(
            f"At the threshold 0.5 the precision is {_share(half.precision)}, the recall "
            f"{half.recall:.3f} and F1 {half.f1:.3f}. A temperature does not change these, nor the "
            "ROC curve."
        ),
        note(
            "Dashed beside the ROC curve: a filter that guesses. Precision is the share of "
            "matching pairs among the kept ones, so it depends on how many of the labelled pairs "
            "match: label pairs as they come, not as many of each."
        ),
    ]


def _threshold_chart(caption: str, points: Sequence[OperatingPoint]) -> Html:
    return unit_chart(
        caption,
        "threshold",
        "share",
        [
            Series(
                "precision",
                [(one.threshold, one.precision) for one in points if one.precision is not None],
            ),
            Series("recall", [(one.threshold, one.recall) for one in points]),
            Series("kept", [(one.threshold, one.kept_share) for one in points]),
        ],
    )


def _reliability(calibration: Calibration) -> list[Html]:
    scales = {"before": calibration.before, "after": calibration.after}
    lines = [
        Series(
            name,
            [
                (one.mean_probability, one.match_share)
                for one in scale.bins
                if one.mean_probability is not None and one.match_share is not None
            ],
        )
        for name, scale in scales.items()
    ]
    counts = [
        Counts(f"{name} the temperature", [one.num_pairs for one in scale.bins])
        for name, scale in scales.items()
    ]
    both = scales.values()
    measures = {
        "expected calibration error": [scale.ece for scale in both],
        "Brier score": [scale.brier for scale in both],
        "negative log-likelihood, nats": [scale.negative_log_likelihood for scale in both],
    }
    rows = [[name, *(f"{value:.4f}" for value in values)] for name, values in measures.items()]
    diagram = unit_chart(
        "Is the filter right as often as it says?",
        "match probability, mean of a bin",
        "share of the bin's pairs that match",
        lines,
        has_diagonal=True,
        has_points=True,
    )
    beside = [
        histograms("Pairs by match probability", "match probability", counts, 0.5),
        table(
            f"Before and after the temperature {calibration.temperature:g}",
            ["lower is better", *scales],
            rows,
        ),
    ]
    return [
        grid(diagram, tag("div", *beside)),
        note(
            f"Each mark is one of {NUM_BINS} bins of equal width; bins without pairs have none. On "
            "the dashed line the filter is right as often as it says; below it, it is too sure "
            "that pairs match. Few pairs in a bin move its mark by chance. The temperature was "
            "fitted on these same pairs."
        ),
    ]


def _thresholds(calibration: Calibration) -> list[Html]:
    before = {one.threshold: one for one in calibration.before.points}
    after = {one.threshold: one for one in calibration.after.points}
    rows = [
        [f"{threshold:g}", *_cells(before[threshold]), *_cells(after[threshold])]
        for threshold in _SHOWN
    ]
    header = ["threshold"]
    header += [f"{what}, {when}" for when in ("before", "after")
               for what in ("precision", "recall", "kept")]  # fmt: skip
    wanted = calibration.wanted_precision
    said = (
        f"No threshold reaches a precision of {wanted:g}."
        if calibration.before.smallest is None
        else f"The smallest threshold with a precision of {wanted:g} is "
        f"{_smallest(calibration.before)} before the temperature and "
        f"{_smallest(calibration.after)} after it."
    )
    return [
        paragraph(said),
        table("What a threshold keeps, before and after the temperature", header, rows),
        note(
            "A filter whose temperature was saved gives the probabilities after it: use its "
            "thresholds then."
        ),
    ]


def _origin(
    calibration: Calibration, model: str, labels: str, bad: Mapping[str, int]
) -> list[Html]:
    rows = [
        ["pairs from", labels],
        ["matching pairs", f"{calibration.num_matching:,}"],
        ["wrong pairs", f"{calibration.num_wrong:,}"],
        ["filter's weights", model],
    ]
    parts = [table("Where the numbers come from", ["what", "value"], rows, num_text_columns=2)]
    if bad:
        counts = [[reason.replace("_", " "), f"{number:,}"] for reason, number in bad.items()]
        parts.append(table("What could not be used", ["reason", "number"], counts))
    else:
        parts.append(note("Every pair could be used."))
    return parts


def _cells(point: OperatingPoint) -> list[str]:
    return [_share(point.precision), f"{point.recall:.3f}", f"{100 * point.kept_share:.1f} %"]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _smallest(scale: Scale) -> str:
    return "none" if scale.smallest is None else f"{scale.smallest.threshold}"
