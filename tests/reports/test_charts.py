"""Charts: every value lands inside, ticks are round, and what cannot be drawn is counted."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.reports.svg_plots import (
    HEIGHT,
    WIDTH,
    Axes,
    Band,
    Line,
    line_chart,
    share_bar,
    tick_texts,
    ticks,
)

AXES = Axes(title="Loss", x="step", y="nats")
finite = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-9)
points = st.lists(st.tuples(st.integers(0, 10_000).map(float), finite), max_size=30)


def drawing(chart: str) -> ET.Element:
    return ET.fromstring(chart)


def places(chart: str) -> list[tuple[float, float]]:
    found = [p.get("d") or "" for p in drawing(chart).iter("path") if "line" in p.get("class", "")]
    return [(float(x), float(y)) for d in found for x, y in re.findall(r"[ML](\S+) ([^L]+)", d)]


@given(points, st.booleans())
def test_every_point_is_drawn_inside_the_chart(given: list[tuple[float, float]], log: bool) -> None:
    axes = Axes(title="t", x="x", y="y", log_y=log)
    chart = line_chart(axes, [Line(name="a", points=given, style="a")])
    usable = [point for point in given if not log or point[1] > 0]
    drawn = places(chart)
    assert len(drawn) == len(usable)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in drawn)


def test_higher_values_stand_higher_and_later_steps_to_the_right() -> None:
    line = Line(name="a", points=[(0, 1), (5, 10), (10, 100)], style="a")
    for axes in (AXES, Axes(title="t", x="x", y="y", log_y=True)):
        (x0, y0), (x1, y1), (x2, y2) = places(line_chart(axes, [line]))
        assert x0 < x1 < x2
        assert y0 > y1 > y2
        assert (y0 - y1 == pytest.approx(y1 - y2, abs=0.11)) == axes.log_y


def test_values_that_cannot_be_drawn_are_counted() -> None:
    line = Line(name="a", points=[(0, 1.0), (1, float("nan")), (2, float("inf"))], style="a")
    assert "2 values cannot be drawn" in line_chart(AXES, [line])
    assert "nothing recorded" in line_chart(AXES, [Line(name="a", points=[], style="a")])


def test_many_points_are_thinned_but_no_spike_is_lost() -> None:
    values = [(float(at), 1.0) for at in range(9_000)]
    values[4_321] = (4_321.0, 7.0)
    chart = line_chart(AXES, [Line(name="a", points=values, style="a")])
    drawn = places(chart)
    assert len(drawn) < 700
    assert min(y for _, y in drawn) < max(y for _, y in drawn) - 100
    assert "lowest and the highest" in chart


def test_a_band_is_filled_and_named() -> None:
    band = Band(name="interval", points=[(0, 0.0, 1.0), (1, 0.5, 2.0)], style="a")
    line = Line(name="success", points=[(0, 0.5), (1, 1.0)], style="a", markers=True)
    chart = line_chart(AXES, [line], band)
    root = drawing(chart)
    assert len([p for p in root.iter("path") if p.get("class") == "band a"]) == 1
    assert len(list(root.iter("circle"))) == 2
    assert "interval" in chart


def test_names_are_escaped() -> None:
    chart = line_chart(
        Axes(title="<b>", x="<u>", y="&"), [Line(name="</svg>", points=[(0, 1)], style="a")]
    )
    assert {"b", "u"}.isdisjoint({one.tag for one in drawing(chart).iter()})


@given(finite, st.floats(1e-6, 1e9))
def test_ticks_are_within_the_axis_and_evenly_spaced(low: float, width: float) -> None:
    high = low + max(width, abs(low) * 1e-3)
    found = ticks(low, high)
    slack = (high - low) * 1e-6
    assert 1 <= len(found) <= 7
    assert all(low - slack <= tick <= high + slack for tick in found)


def test_tick_texts_are_written_in_one_way() -> None:
    assert tick_texts([0, 500, 1000]) == ["0", "500", "1,000"]
    assert tick_texts([0, 0.0005, 0.001]) == ["0", "5e-4", "1e-3"]
    assert tick_texts([0.2, 0.4]) == ["0.2", "0.4"]
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]


def test_a_share_is_a_bar_with_its_interval() -> None:
    root = ET.fromstring(share_bar(0.25, (0.1, 0.5)))
    bar = next(one for one in root.iter("rect") if one.get("class") == "bar")
    assert bar.get("width") == "25"
    assert "M10.0 7H50.0" in share_bar(0.25, (0.1, 0.5))
    assert 'class="bar"' not in share_bar(float("nan"))
    assert "whisker" not in share_bar(0.5)
