"""The losses of a training as a page: one chart per measure, drawn from its log."""

import json
from pathlib import Path

from openblip.page import KeyFigure, Section, grid, key_figures, note, write_page
from openblip.page_charts import MOST_POINTS, Series, line_chart, thinned


def write_curves(log_path: Path, path: Path, title: str) -> None:
    """Write the page of a log (JSONL), which may still grow."""
    lines = [json.loads(line) for line in log_path.read_text("utf-8").splitlines()]
    last = lines[-1]
    names = [name for name in last if name != "step"]
    charts = [
        line_chart(
            name, "step", [Series(name, thinned([(line["step"], line[name]) for line in lines]))]
        )
        for name in names
    ]
    figures = [KeyFigure("Steps", f"{last['step'] + 1:,}")]
    figures += [KeyFigure(name, f"{last[name]:.4g}") for name in names]
    told = (
        f"Drawn from the {len(lines):,} lines of {log_path.name}; where they are more than "
        f"{MOST_POINTS}, each point is a mean of neighbours. Losses are in nats."
    )
    write_page(
        path, title, [key_figures(figures)], [Section("Curves", [grid(*charts), note(told)])]
    )
