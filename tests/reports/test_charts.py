"""Charts take their colours from the page, need nothing else, and lose no spike."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from tinyagent_fast.reports.charts import Chart, Line, run_charts
from tinyagent_fast.reports.reading import read_run
from tinyagent_fast.runs import Run

LOSS = Chart(
    title="Loss",
    unit="nats per token",
    log=True,
    lines=(
        Line(name="training", points=[(10, 2.0), (20, 0.5), (30, 0.25)]),
        Line(name="validation", points=[(0, 3.0), (30, 0.3)], second=True, dots=True),
    ),
)
SUCCESS = Chart(
    title="Success",
    unit="%",
    percent=True,
    lines=(Line(name="success", points=[(0, 20.0), (30, 80.0)], dots=True),),
    band=[(0, 10.0, 30.0), (30, 70.0, 90.0)],
)


def root_of(chart: Chart) -> ET.Element:
    return ET.fromstring(chart.svg())


def line_points(chart: Chart, colour: str = "--a") -> list[tuple[float, float]]:
    """Give the points of the longest path in a colour."""
    paths = [
        [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]
        for path in root_of(chart).iter("{http://www.w3.org/2000/svg}path")
        if f"var({colour})" in path.get("style", "")
    ]
    return max(paths, key=len)


def test_every_colour_is_the_pages_own() -> None:
    for chart in (LOSS, SUCCESS):
        drawing = chart.svg()
        assert not re.search(r"(fill|stroke): #", drawing)
        assert "<style" not in drawing
        assert {"var(--a)", "var(--dim)", "var(--rule)"} <= set(
            re.findall(r"var\([^)]*\)", drawing)
        )


def test_charts_are_drawn_though_a_notebook_names_a_backend_that_is_not_here() -> None:
    program = """
from tinyagent_fast.reports.charts import Chart, Line
print(len(Chart(title="a", unit="b", lines=(Line(name="c", points=[(0, 1.0)]),)).svg()))
"""
    kernel = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=kernel)
    assert done.returncode == 0, done.stderr


def test_ids_are_referred_to_within_a_chart_and_differ_between_charts() -> None:
    found = []
    for chart in (LOSS, replace(LOSS, title="Other")):
        ids = re.findall(r'id="([^"]+)"', chart.svg())
        used = re.findall(r'(?:href="|url\()#([^")]+)', chart.svg())
        assert set(used) <= set(ids)
        assert len(set(ids)) == len(ids)
        found.append(set(ids))
    assert not found[0] & found[1]


def test_higher_values_stand_higher_and_later_steps_to_the_right() -> None:
    (x0, y0), (x1, y1), (x2, y2) = line_points(LOSS)
    assert x0 < x1 < x2
    assert y0 < y1 < y2
    assert (y1 - y0) / (y2 - y1) == pytest.approx(2, abs=0.01)  # logarithmic: 4 = 2 x 2


def test_a_chart_is_named_for_those_who_cannot_see_it() -> None:
    name = root_of(LOSS).get("aria-label") or ""
    assert name == "Loss: training from 2 to 0.25; validation from 3 to 0.3"
    assert "95 % Wilson interval" in SUCCESS.svg()


def test_of_many_points_no_spike_is_lost_and_the_drawing_stays_small() -> None:
    values = [(float(at), 1.0 + at % 7 / 10) for at in range(20_000)]
    values[4_321] = (4_321.0, 30.0)
    line = Line(name="a", points=values)
    chart = Chart(title="Speed", unit="tokens/s", lines=(line,))
    assert len(chart.svg()) < 200_000
    heights = [y for _, y in line_points(chart)]
    assert min(heights) < max(heights) - 90


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_values_without_a_logarithm_are_left_open(value: float) -> None:
    line = Line(name="training", points=[(1, 1.0), (2, value), (3, 2.0)])
    assert "nan" not in replace(LOSS, lines=(line,)).svg().lower()


def test_what_was_not_recorded_has_no_chart(full_run: Run, bare_run: Run) -> None:
    contents = read_run(full_run)
    titles = [chart.title for chart in run_charts(contents.steps, contents.validations)]
    assert titles == [
        "Loss",
        "Plan success on 4 validation queries",
        "Learning rate",
        "Speed",
    ]
    (alone,) = run_charts({1: {"loss": math.nan, "tokens_per_s": 9.0}}, ())
    assert alone.title == "Speed"
    assert "nan" not in alone.svg().lower()
    assert list(run_charts({}, ())) == []
