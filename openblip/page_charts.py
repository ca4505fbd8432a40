"""Charts of a page, drawn as SVG: curves, shares, histograms; readable without colour or screen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from openblip.page import Html, note, tag

MOST_POINTS = 120
_NUM_COLORS = 6
_WIDTH, _LEFT, _SIDE_LABEL = 440, 52, 64
"""440 units across stay readable on a phone, without scrolling."""
_QUARTERS = ((0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "1"))
_UNIT_SIDE_LABEL = 80
"""The words of shares are longer than those of losses."""
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "12 3")


@dataclass(frozen=True)
class Series:
    """A line of a chart: (x, y) in the order of x."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Counts:
    """One row of histograms: a number per bin."""

    label: str
    counts: Sequence[int]


def line_chart(caption: str, x_label: str, series: Sequence[Series]) -> Html:
    """Return a figure with one line per series, each labelled at its end.

    Points that are not finite are left out, and the label says how many.
    """
    lines = [_finite(one) for one in series]
    lines = [one for one in lines if one.points]
    if not lines:
        return tag("figure", tag("figcaption", caption), note("There is nothing to draw."))
    xs, ys = ([p[axis] for one in lines for p in one.points] for axis in (0, 1))
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(0.0, *ys), max(ys))
    top, bottom, right = 12.0, 200.0, _WIDTH - _SIDE_LABEL

    def x_of(x: float) -> float:
        return _LEFT + (right - _LEFT) * _share(x, min(xs), max(xs))

    def y_of(y: float) -> float:
        return bottom - (bottom - top) * _share(y, y_ticks[0], y_ticks[-1])

    drawn = []
    for tick in y_ticks:
        drawn += [
            tag("line", x1=_LEFT, x2=right, y1=y_of(tick), y2=y_of(tick), class_="rule"),
            tag("text", f"{tick:,g}", x=_LEFT - 6, y=y_of(tick) + 4, text_anchor="end"),
        ]
    for tick in x_ticks:
        if min(xs) <= tick <= max(xs):
            drawn.append(
                tag("text", f"{tick:,g}", x=x_of(tick), y=bottom + 17, text_anchor="middle")
            )
    drawn.append(tag("text", x_label, x=(_LEFT + right) / 2, y=bottom + 34, text_anchor="middle"))
    drawn += _lines(lines, x_of, y_of, right, bottom)
    told = "; ".join(
        f"{one.label} from {one.points[0][1]:.3g} to {one.points[-1][1]:.3g}" for one in lines
    )
    return _figure(caption, f"{caption}. {told}.", bottom + 40, drawn)


def unit_chart(
    caption: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    has_diagonal: bool = False,
    has_points: bool = False,
) -> Html:
    """Return a figure of shares over shares: both axes are [0, 1], and as long.

    has_diagonal  a dashed line where x is y
    has_points    each point is marked, and tells its numbers
    """
    top, right = 28.0, float(_WIDTH - _UNIT_SIDE_LABEL)
    side = right - _LEFT
    bottom = top + side
    lines = [one for one in map(_finite, series) if one.points]

    def x_of(x: float) -> float:
        return _LEFT + side * x

    def y_of(y: float) -> float:
        return bottom - side * y

    # Above its axis, where it needs no turning.
    drawn = [tag("text", y_label, x=4, y=14)]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        drawn += [
            tag("line", x1=_LEFT, x2=right, y1=y_of(tick), y2=y_of(tick), class_="rule"),
            tag("text", f"{tick:g}", x=_LEFT - 6, y=y_of(tick) + 4, text_anchor="end"),
            tag("text", f"{tick:g}", x=x_of(tick), y=bottom + 17, text_anchor="middle"),
        ]
    drawn.append(tag("text", x_label, x=(_LEFT + right) / 2, y=bottom + 34, text_anchor="middle"))
    if has_diagonal:
        drawn.append(tag("line", x1=x_of(0), x2=x_of(1), y1=y_of(0), y2=y_of(1), class_="mark"))
    drawn += _lines(lines, x_of, y_of, right, bottom)
    for index, one in enumerate(lines if has_points else []):
        drawn += [
            tag("rect", tag("title", f"{one.label}: {x:.3f}, {y:.3f}"), x=x_of(x) - 3, width=6,
                y=y_of(y) - 3, height=6, class_=f"color-{index % _NUM_COLORS}")
            for x, y in one.points
        ]  # fmt: skip
    told = "; ".join(
        f"{one.label} from ({one.points[0][0]:.3g}, {one.points[0][1]:.3g}) to "
        f"({one.points[-1][0]:.3g}, {one.points[-1][1]:.3g})"
        for one in lines
    )
    return _figure(caption, f"{caption}. {told or 'There is nothing to draw'}.", bottom + 40, drawn)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means of neighbours, at most `MOST_POINTS` of them."""
    size = -(-len(points) // MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def histograms(
    caption: str,
    x_label: str,
    rows: Sequence[Counts],
    mark: float | None = None,
    *,
    bins: Sequence[str] | None = None,
    ticks: Sequence[tuple[float, str]] = _QUARTERS,
) -> Html:
    """Return a figure with one histogram per row, each as high as its fullest bin.

    mark   where a dashed line stands, as a share of the axis
    bins   what each bin is, as many as a row has; without it bins are equal parts of [0, 1]
    ticks  labels of the axis, each with its place as a share of the axis
    """
    height, gap, top = 44.0, 26.0, 20.0
    right = _WIDTH - 12.0
    bottom = top + len(rows) * height + max(0, len(rows) - 1) * gap

    def x_of(x: float) -> float:
        return 12.0 + (right - 12.0) * x

    drawn = []
    for index, row in enumerate(rows):
        base = top + index * (height + gap) + height
        drawn.append(tag("text", row.label, x=12, y=base - height - 6))
        highest = max(row.counts, default=0) or 1
        for number, count in enumerate(row.counts):
            low, up = number / len(row.counts), (number + 1) / len(row.counts)
            name = f"{low:.2f} to {up:.2f}" if bins is None else bins[number]
            # A bin that holds anything is seen.
            tall = max(1.5, height * count / highest) if count else 0.0
            drawn.append(
                tag("rect", tag("title", f"{name}: {count:,}"), x=x_of(low) + 0.5,
                    width=x_of(up) - x_of(low) - 1, y=base - tall, height=tall,
                    class_=f"color-{index % _NUM_COLORS}")
            )  # fmt: skip
        drawn.append(tag("line", x1=12, x2=right, y1=base, y2=base, class_="axis"))
        if mark is not None:
            drawn.append(
                tag("line", x1=x_of(mark), x2=x_of(mark), y1=base - height, y2=base, class_="mark")
            )
    drawn += [
        tag("text", label, x=x_of(place), y=bottom + 17, text_anchor="middle")
        for place, label in ticks
    ]
    drawn.append(tag("text", x_label, x=_WIDTH / 2, y=bottom + 34, text_anchor="middle"))
    told = "; ".join(row.label for row in rows)
    return _figure(caption, f"{caption}. {told}.", bottom + 40, drawn)


def _lines(
    lines: Sequence[Series],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    right: float,
    bottom: float,
) -> list[Html]:
    """Draw lines of at least a point, each with its label to the right of its end."""
    drawn = []
    label_ys = _spread([y_of(one.points[-1][1]) + 4 for one in lines], 14, bottom + 4)
    for index, (one, label_y) in enumerate(zip(lines, label_ys, strict=True)):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in one.points)
        color = f"color-{index % _NUM_COLORS}"
        dash = _DASHES[index % len(_DASHES)]
        drawn += [
            tag("polyline", points=path, class_=f"line {color}", stroke_dasharray=dash),
            tag("text", one.label, x=right + 6, y=label_y, class_=f"label {color}"),
        ]
    return drawn


def _figure(caption: str, description: str, height: float, drawn: Sequence[Html]) -> Html:
    view = f"0 0 {_WIDTH} {height:g}"
    shown = tag("svg", *drawn, viewBox=view, role="img", aria_label=description)
    return tag("figure", tag("figcaption", caption), shown)


def _finite(series: Series) -> Series:
    points = [point for point in series.points if all(map(math.isfinite, point))]
    left_out = len(series.points) - len(points)
    return Series(series.label + (f" ({left_out} not finite)" if left_out else ""), points)


def _ticks(low: float, high: float) -> list[float]:
    """Return two to eight round numbers around a range."""
    span = high - low
    # A range that is lost in rounding is none.
    rough = span / 5 if span > 1e-9 * max(1e-3, abs(low), abs(high)) else 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 14) for number in range(first, max(last, first + 1) + 1)]


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _spread(places: Sequence[float], distance: float, lowest: float) -> list[float]:
    """Move places down, and then back up from the lowest, until labels there do not overlap."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, index in pairwise(order):
        moved[index] = max(moved[index], moved[before] + distance)
    limit = lowest
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - distance
    return moved
