"""The losses and scores of a training as a page: a chart per measure, drawn from its log."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from openblip.page import Html, KeyFigure, Section, grid, key_figures, note, write_page
from openblip.page_charts import MOST_POINTS, Series, line_chart, thinned
from openblip.training.log import read_log


def write_curves(log_path: Path, path: Path, title: str) -> None:
    """Write the page of a log (JSONL), which may still grow."""
    logged = read_log(log_path)
    last = logged.losses[-1]
    figures = [KeyFigure("Steps", f"{last['step'] + 1:,}")]
    figures += [KeyFigure(name, f"{last[name]:.4g}") for name in last if name != "step"]
    told = (
        f"Drawn from the {len(logged.losses):,} lines of {log_path.name}; where they are more than "
        f"{MOST_POINTS}, each point is a mean of neighbours. Losses are in nats."
    )
    sections = [Section("Curves", [grid(*_charts(logged.losses)), note(told)])]
    if logged.evaluations:
        best = max(logged.evaluations, key=lambda line: line["criterion"])
        told = (
            f"Measured {len(logged.evaluations):,} times on data that it does not train on. The "
            f"best model by the criterion, {best['criterion']:.4g}, was that of step "
            f"{best['step']:,}."
        )
        sections.append(Section("Evaluation", [grid(*_charts(logged.evaluations)), note(told)]))
    write_page(path, title, [key_figures(figures)], sections)


def _charts(lines: Sequence[Mapping[str, float]]) -> list[Html]:
    return [
        line_chart(
            name, "step", [Series(name, thinned([(line["step"], line[name]) for line in lines]))]
        )
        for name in lines[-1]
        if name != "step"
    ]
