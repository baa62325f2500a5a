"""The curves of a run, drawn by matplotlib: SVG in the colours of a page, and training.png."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tinyagent_fast.reports.reading import ValidationRecord, number, read_history
from tinyagent_fast.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib writes fixed colours; these stand for the page's own, which follow light and dark.
_INK, _RULE, _A, _B = "#010101", "#020202", "#030303", "#040404"
_OF_THE_PAGE = {_INK: "var(--dim)", _RULE: "var(--rule)", _A: "var(--a)", _B: "var(--b)"}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _INK,
    "grid.color": _RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
    "axes.axisbelow": True,
    "font.size": 9,
    "path.simplify_threshold": 0.5,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; `second` takes the second colour, `dots` marks each point."""

    name: str
    points: Points
    second: bool = False
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over optimizer steps; `band` is an interval: step, lower and upper bound."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = False
    percent: bool = False
    band: Sequence[tuple[float, float, float]] = ()

    def svg(self) -> Markup:
        """Draw the chart as an `svg` element with the colours of the page's CSS variables."""
        _take_a_backend_that_is_here()
        import matplotlib
        from cycler import cycler
        from matplotlib.figure import Figure

        colours = cycler(color=[_A, _B])
        # The salt keeps the ids of several charts in one page apart.
        own = {"svg.hashsalt": self.title, "axes.prop_cycle": colours}
        with matplotlib.rc_context(_SETTINGS | own):
            figure = Figure(figsize=(4.6, 2.6), layout="constrained")
            if self.draw(figure.subplots()):
                figure.legend(loc="outside lower left", ncols=2, frameon=False)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
        return self._themed(file.getvalue())

    def draw(self, axes: Axes) -> bool:
        """Draw into axes of matplotlib; returns whether there is so much that it needs a legend."""
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        for line in self.lines:
            axes.plot(
                [x for x, _ in line.points],
                [y for _, y in line.points],
                marker="o" if line.dots or len(line.points) == 1 else None,
                markersize=4,
                linestyle="--" if line.dashed else "-",
                linewidth=1.8 if line.second else 1.3,
                color="C1" if line.second else "C0",
                label=line.name,
            )
        if self.band:
            steps, low, high = zip(*self.band, strict=True)
            name = "95 % Wilson interval"
            axes.fill_between(steps, low, high, color="C0", alpha=0.2, linewidth=0, label=name)
        plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
        if self.log:
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="y", which="minor", left=False)
        if self.percent:
            axes.set_ylim(0, 100)
        axes.yaxis.set_major_formatter(plain)
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", linewidth=0.7)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(self.unit)
        return len(self.lines) > 1 or bool(self.band)

    def _themed(self, drawing: str) -> Markup:
        """Keep the element alone, with the page's colours and a name for those who cannot see."""
        drawing = drawing[drawing.index("<svg") :]
        drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.S)  # it would style the page
        drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)  # the same in every chart
        for fixed, of_the_page in _OF_THE_PAGE.items():
            drawing = drawing.replace(fixed, of_the_page)
        spoken = "; ".join(
            f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}"
            for line in self.lines
            if line.points
        )
        name = html.escape(f"{self.title}: {spoken}")
        opening = f'<svg class="plot" role="img" aria-label="{name}" '
        return Markup(drawing.replace("<svg ", opening, 1))


def run_charts(
    steps: Mapping[int, Mapping[str, Any]], validations: Sequence[ValidationRecord]
) -> Iterator[Chart]:
    """Choose the curves of a run; what was not recorded has none."""

    def logged(key: str) -> Points:
        return [(at, v) for at, record in steps.items() if (v := number(record, key)) is not None]

    checked = [(v.step, v.loss) for v in validations if v.loss is not None]
    if logged("loss") or checked:
        lines = (
            Line(name="training", points=logged("loss")),
            Line(name="validation", points=checked, second=True, dots=True),
        )
        yield Chart(title="Loss", unit="nats per token", lines=lines, log=True)
    if validations:
        success = [(v.step, 100 * v.success.share) for v in validations]
        dag = [(v.step, 100 * v.success_dag) for v in validations if v.success_dag is not None]
        best = [(v.step, 100 * v.success.share) for v in validations if v.best][-1:]
        yield Chart(
            title=f"Plan success on {validations[-1].success.total} validation queries",
            unit="%",
            percent=True,
            lines=(
                Line(name="success", points=success, dots=True),
                Line(name="success_dag", points=dag, dashed=True),
                Line(name="best, kept as the adapter", points=best, second=True, dots=True),
            ),
            band=[
                (v.step, 100 * low, 100 * high)
                for v in validations
                for low, high in [v.success.interval]
            ],
        )
    for title, unit, key in (
        ("Learning rate", "", "learning_rate"),
        ("Speed", "tokens/s", "tokens_per_s"),
    ):
        if points := logged(key):
            yield Chart(title=title, unit=unit, lines=(Line(name=title.lower(), points=points),))


def plot_training(run: Run) -> Path:
    """Draw loss and plan success into `training.png` in the run's folder; gives its path."""
    _take_a_backend_that_is_here()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, chart in zip(figure.subplots(1, 2), run_charts(*read_history(run, [])), strict=False):
        if chart.draw(axes):
            axes.legend()
        axes.set_title(chart.title)
    path = run.path / "training.png"
    figure.savefig(path, dpi=110)
    return path


def _take_a_backend_that_is_here() -> None:
    """Let matplotlib be imported by a program that a notebook's cell runs in another environment.

    It gets the kernel's own backend named, `module://matplotlib_inline...`, and refuses one that is
    not installed, though files need none.
    """
    named = os.environ.get("MPLBACKEND", "").removeprefix("module://").partition(".")[0]
    if named == "matplotlib_inline" and find_spec(named) is None:
        os.environ["MPLBACKEND"] = "agg"
