"""Ratios of `bench` as a chart for a README: bars beside a line at 1, light or dark."""

from collections.abc import Sequence
from html import escape

from openblip.bench import Row

LABEL, WIDTH, BAR, GAP, TOP = 400, 900, 14, 8, 64
COLORS = {"float32": "#2f6fb0", "bfloat16": "#b0662f", "int8": "#4f8a3c"}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}line{stroke:#888}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


def ratio_chart(rows: Sequence[Row]) -> str:
    """Return an SVG document of the rows that have a ratio. Raises ValueError if none has."""
    names = list(dict.fromkeys(row.name for row in rows if row.ratio is not None))
    if not names:
        raise ValueError("no work was measured beside the peer: there is nothing to draw")
    longest = max(row.ratio for row in rows if row.ratio is not None)
    scale = (WIDTH - LABEL - 60) / longest
    parts, y = [], TOP
    for name in names:
        several = [row for row in rows if row.name == name and row.ratio is not None]
        parts.append(_text(LABEL - 8, y + BAR * (len(several) + 1) / 2, name, "end"))
        for row in several:
            assert row.ratio is not None
            parts.append(
                f'<rect x="{LABEL}" y="{y}" width="{row.ratio * scale:.1f}" height="{BAR - 2}" '
                f'fill="{COLORS.get(row.precision, "#777")}"/>'
            )
            parts.append(_text(LABEL + row.ratio * scale + 6, y + BAR - 3, f"{row.ratio:.1f}"))
            y += BAR
        y += GAP
    line = LABEL + scale
    legend, x = [], float(LABEL)
    for precision in dict.fromkeys(row.precision for row in rows if row.ratio is not None):
        legend.append(
            f'<rect x="{x}" y="32" width="12" height="12" fill="{COLORS.get(precision, "#777")}"/>'
        )
        legend.append(_text(x + 17, 43, precision))
        x += 100
    title = "times as fast as transformers (the line: equally fast)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        + "".join([_text(LABEL, 18, title), *legend, *parts])
        + f'<line x1="{line:.1f}" x2="{line:.1f}" y1="{TOP - 6}" y2="{y}" stroke-dasharray="4 3"/>'
        "</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
