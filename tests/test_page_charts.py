import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openblip.page_charts import (
    Counts,
    Series,
    _spread,
    _ticks,
    histograms,
    line_chart,
    unit_chart,
)

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, finite)
def test_ticks_are_few_rise_evenly_and_hold_the_range(first, second):
    low, high = sorted((first, second))
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert min(steps) > 0
    assert max(steps) == pytest.approx(min(steps))
    slack = 1e-6 * steps[0]
    assert ticks[0] <= low + slack
    assert high <= ticks[-1] + slack


def test_ticks_are_round():
    assert _ticks(0, 10.5) == [0, 5, 10, 15]
    assert _ticks(0, 0.7) == [0, 0.2, 0.4, 0.6, 0.8]
    assert _ticks(3, 3) == [3, 4]


@given(st.lists(st.floats(0, 200), min_size=1, max_size=6))
def test_labels_do_not_overlap_and_keep_their_order(places):
    moved = _spread(places, 14, 204)
    ranked = sorted(moved)
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(ranked))
    assert ranked[-1] <= 204
    for i, one in enumerate(places):
        for j, other in enumerate(places):
            assert not (one < other and moved[i] > moved[j])


def test_a_line_is_drawn_where_its_values_are():
    html = line_chart("c", "step", [Series("loss", [(0, 0.0), (5, 5.0), (10, 10.0)])])
    points = re.search(r'<polyline points="([^"]+)"', html).group(1).split()
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2)
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2)
    assert ys[2] < ys[0]
    assert "loss from 0 to 10" in html


def test_what_is_not_finite_is_left_out_and_told():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    html = line_chart("c", "step", [Series("loss", points)])
    assert "loss (2 not finite)" in html
    assert "nan" not in html
    assert len(re.search(r'points="([^"]+)"', html).group(1).split()) == 2


@pytest.mark.parametrize("series", [[], [Series("a", [])], [Series("a", [(0, math.nan)])]])
def test_nothing_to_draw_is_said(series):
    assert "nothing to draw" in line_chart("c", "step", series)


@pytest.mark.parametrize("points", [[(3, 0.0)], [(0, 2.0), (1, 2.0)], [(0, -1.0), (1, -2.0)]])
def test_lines_without_a_range_are_drawn(points):
    html = line_chart("c", "step", [Series("a", points)])
    assert "polyline" in html
    assert "nan" not in html


def test_shares_are_drawn_on_axes_from_0_to_1():
    html = unit_chart("c", "x", "y", [Series("a", [(0.25, 0.5), (0.5, 0.75)])], has_diagonal=True)
    points = re.search(r'<polyline points="([^"]+)"', html).group(1).split()
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points)
    diagonal = re.search(r'<line x1="(\d+)" x2="(\d+)" y1="(\d+)" y2="(\d+)" class="mark"', html)
    left, right, bottom, top = map(float, diagonal.groups())
    assert right - left == bottom - top
    assert x1 == left + (right - left) / 4
    assert x2 == left + (right - left) / 2
    assert y1 == bottom - (bottom - top) / 2
    assert y2 == bottom - 3 * (bottom - top) / 4
    assert "a from (0.25, 0.5) to (0.5, 0.75)" in html


def test_points_of_shares_tell_their_numbers():
    html = unit_chart("c", "x", "y", [Series("a", [(0.25, 0.5), (1, math.nan)])], has_points=True)
    assert html.count("<rect") == 1
    assert "a (1 not finite): 0.250, 0.500</title>" in html
    assert 'class="mark"' not in html


def test_shares_of_nothing_are_said():
    html = unit_chart("c", "x", "y", [Series("a", [])])
    assert "There is nothing to draw" in html
    assert "polyline" not in html


def test_a_histogram_tells_each_bin_and_shows_every_count():
    html = histograms("c", "p", [Counts("web", [1, 0, 1000, 0])], 0.5)
    assert "0.00 to 0.25: 1</title>" in html
    assert "0.50 to 0.75: 1,000</title>" in html
    heights = [float(value) for value in re.findall(r'<rect[^>]* height="([\d.]+)"', html)]
    assert heights == [1.5, 0, 44, 0]


def test_the_bins_of_a_histogram_may_have_names_of_their_own():
    bins, ticks = ["none", "<one>"], [(0.25, "0"), (0.75, "1+")]
    html = histograms("c", "p", [Counts("web", [3, 4])], bins=bins, ticks=ticks)
    assert "none: 3</title>" in html
    assert "&lt;one&gt;: 4</title>" in html
    assert re.findall(r'<text x="([\d.]+)"[^>]*>(0|1\+|0\.5)</text>', html) == [
        ("116", "0"), ("324", "1+"),
    ]  # fmt: skip
    assert 'class="mark"' not in html


def test_labels_are_text():
    html = line_chart("<b>", "<b>", [Series("<b>", [(0, 1.0)])])
    html += unit_chart("<b>", "<b>", "<b>", [Series("<b>", [(0, 1.0)])], has_points=True)
    html += histograms("<b>", "<b>", [Counts("<b>", [1])], 0.5)
    assert "<b>" not in html
