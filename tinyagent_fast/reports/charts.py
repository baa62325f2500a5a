"""The curves of a run as SVG, drawn by matplotlib in the colours of the page's style."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tinyagent_fast.reports.reading import RunContents

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
    """One curve; `second` takes the page's second colour, `dots` marks each point."""

    name: str
    points: Points
    second: bool = False
    dots: bool = False


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
        """Draw the chart.

        Returns:
            An `svg` element that takes its colours from the page's CSS variables.
        """
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        # The salt keeps the ids of several charts in one page apart.
        with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": self.title}):
            figure = Figure(figsize=(4.6, 2.6), layout="constrained")
            axes = figure.subplots()
            for line in self.lines:
                axes.plot(
                    [x for x, _ in line.points],
                    [y for _, y in line.points],
                    marker="o" if line.dots or len(line.points) == 1 else None,
                    markersize=4,
                    linewidth=1.8 if line.second else 1.3,
                    color=_B if line.second else _A,
                    label=line.name,
                )
            if self.band:
                steps, low, high = zip(*self.band, strict=True)
                name = "95 % Wilson interval"
                axes.fill_between(steps, low, high, color=_A, alpha=0.2, linewidth=0, label=name)
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
            if len(self.lines) > 1 or self.band:
                figure.legend(loc="outside lower left", ncols=2, frameon=False)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
        return self._themed(file.getvalue())

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


def run_charts(contents: RunContents) -> Iterator[Chart]:
    """Choose the curves of a run; what was not recorded has none.

    Args:
        contents: The run.

    Yields:
        Charts.
    """
    steps, checks = contents.steps, contents.validations
    loss = tuple((s.step, s.loss) for s in steps if s.loss is not None)
    checked = tuple((v.step, v.loss) for v in checks if v.loss is not None)
    if loss or checked:
        lines = (
            Line(name="training", points=loss),
            Line(name="validation", points=checked, second=True, dots=True),
        )
        yield Chart(title="Loss", unit="nats per token", lines=lines, log=True)
    if checks:
        success = tuple((v.step, 100 * v.success.share) for v in checks)
        best = [v for v in checks if v.best][-1:]
        kept = tuple((v.step, 100 * v.success.share) for v in best)
        name = "best, kept as the adapter"
        yield Chart(
            title=f"Plan success on {checks[-1].success.total} validation queries",
            unit="%",
            percent=True,
            lines=(
                Line(name="success", points=success, dots=True),
                Line(name=name, points=kept, second=True, dots=True),
            ),
            band=[
                (v.step, 100 * low, 100 * high)
                for v in checks
                for low, high in [v.success.interval]
            ],
        )
    for title, unit, values in (
        ("Learning rate", "", [(s.step, s.learning_rate) for s in steps]),
        ("Speed", "tokens/s", [(s.step, s.tokens_per_s) for s in steps]),
        ("Memory", "GiB", [(s.step, s.memory_gib) for s in steps]),
    ):
        points = tuple((step, value) for step, value in values if value is not None)
        if points:
            yield Chart(title=title, unit=unit, lines=(Line(name=title.lower(), points=points),))
