"""Line charts as inline SVG: curves of a run, with an interval band and marked points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

from tinyagent_fast.reports.markup import Markup, element, joined, text

WIDTH, HEIGHT = 460.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 22.0, 10.0, 38.0
_MOST_POINTS = 600

PlotPoint = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve; `style` is a class of the page's style, `a` to `c`."""

    name: str
    points: Sequence[PlotPoint]
    style: str
    markers: bool = False


@dataclass(frozen=True, kw_only=True)
class Band:
    """A filled interval: x, lower and upper bound."""

    name: str
    points: Sequence[tuple[float, float, float]]
    style: str


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Titles and kind of a chart's axes; `y_range` fixes the vertical one."""

    title: str
    x: str
    y: str
    log_y: bool = False
    y_range: tuple[float, float] | None = None


def line_chart(axes: Axes, lines: Sequence[Line], band: Band | None = None) -> Markup:
    """Draw curves.

    Args:
        axes: Titles and kinds of the axes.
        lines: The curves; on a logarithmic axis values of 0 or less are left out.
        band: An interval to fill, if any.

    Returns:
        A `figure` with the chart and its legend, or a note if there is nothing to draw.
    """
    usable = [_usable(line, axes.log_y) for line in lines]
    left_out = sum(len(line.points) for line in lines) - sum(len(line.points) for line in usable)
    usable = [line for line in usable if line.points]
    title = element("h3", text(axes.title))
    if not usable:
        return element(
            "figure",
            title,
            element("p", text("nothing recorded"), class_="nothing"),
            class_="chart",
        )
    scale = _Scale.of(axes, usable, band)
    children = [_grid(axes, scale)]
    if band is not None:
        children.append(_band(band, scale))
    children += [_curve(line, scale) for line in usable]
    drawing = element(
        "svg",
        *children,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=f"{axes.title}: {_spoken(usable)}",
        class_="plot",
    )
    notes = [f"{left_out} values cannot be drawn and are left out"] if left_out else []
    if any(len(line.points) > _MOST_POINTS for line in usable):
        notes.append("of many neighbouring points the lowest and the highest are drawn")
    return element("figure", title, drawing, _legend(usable, band, notes), class_="chart")


def share_bar(share: float, interval: tuple[float, float] | None = None) -> Markup:
    """Draw a share as a bar, with its interval as a thin line.

    Args:
        share: Between 0 and 1; one that is not a number leaves the bar empty.
        interval: Lower and upper bound, if known.

    Returns:
        A small `svg` from 0 to 100 %.
    """
    parts = [element("rect", x=0, y=3, width=100, height=8, class_="track")]
    if math.isfinite(share):
        parts.append(element("rect", x=0, y=3, width=100 * share, height=8, class_="bar"))
        if interval is not None:
            low, high = interval
            path = f"M{100 * low:.1f} 7H{100 * high:.1f}"
            parts.append(element("path", d=path, class_="whisker"))
    return element(
        "svg",
        *parts,
        viewBox="0 0 100 14",
        preserveAspectRatio="none",
        class_="share",
        aria_hidden="true",
    )


@dataclass(frozen=True)
class _Scale:
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool

    @classmethod
    def of(cls, axes: Axes, lines: Sequence[Line], band: Band | None) -> _Scale:
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points]
        if band is not None:
            ys += [bound for _, low, high in band.points for bound in (low, high)]
        y_range = axes.y_range or (min(ys), max(ys))
        return cls(_widened((min(xs), max(xs))), _widened(y_range, axes.log_y), axes.log_y)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def _widened(bounds: tuple[float, float], log: bool = False) -> tuple[float, float]:
    """Give a range that can be drawn, also for a single value."""
    low, high = bounds
    if log:
        return low / 1.15, high * 1.15
    if high > low:
        return low, high
    spread = abs(low) * 0.1 or 1.0
    return low - spread, high + spread


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Choose round numbers for an axis.

    Args:
        low: Lower end.
        high: Upper end, above it.
        most: Most ticks.

    Returns:
        Multiples of 1, 2 or 5 times a power of ten, within the ends.
    """
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 3:
            return found
    return found if len(found) > 1 else ticks(low, high)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Write the numbers at an axis, all in one way.

    Args:
        values: The numbers.

    Returns:
        For example `0`, `0.5`, `1`; `5e-4`, `1e-3`; `8000`, `10,000`.
    """
    largest = max(map(abs, values), default=0.0)
    if largest >= 0.01:
        return [f"{value:,.10g}" for value in values]
    return [_power(value) if value else "0" for value in values]


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _grid(axes: Axes, scale: _Scale) -> Markup:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts: list[Markup] = []
    values = _log_ticks(*scale.y_range) if scale.log_y else ticks(*scale.y_range)
    for value, label in zip(values, tick_texts(values), strict=True):
        y = scale.y(value)
        parts.append(element("path", d=f"M{_LEFT:g} {y:.1f}H{right:g}", class_="grid"))
        parts.append(element("text", text(label), x=_LEFT - 6, y=y + 4, class_="y tick"))
    values = ticks(*scale.x_range)
    for value, label in zip(values, tick_texts(values), strict=True):
        parts.append(element("text", text(label), x=scale.x(value), y=bottom + 16, class_="x tick"))
    middle = (_LEFT + right) / 2
    parts.append(element("path", d=f"M{_LEFT:g} {bottom:g}H{right:g}", class_="axis"))
    parts.append(element("text", text(axes.x), x=middle, y=HEIGHT - 5, class_="x name"))
    height = (_TOP + bottom) / 2
    turn = f"rotate(-90 11 {height:g})"
    parts.append(element("text", text(axes.y), x=11, y=height, transform=turn, class_="x name"))
    return joined(parts)


def _curve(line: Line, scale: _Scale) -> Markup:
    places = [(scale.x(x), scale.y(y)) for x, y in _thinned(line.points)]
    parts = [element("path", d=_path(places), class_=f"line {line.style}")]
    if line.markers or len(places) == 1:
        parts += [
            element(
                "circle",
                element("title", text(f"{line.name}, {x:g}: {y:.4g}")),
                cx=scale.x(x),
                cy=scale.y(y),
                r=3.5,
                class_=f"dot {line.style}",
            )
            for x, y in line.points
        ]
    return joined(parts)


def _band(band: Band, scale: _Scale) -> Markup:
    upper = [(scale.x(x), scale.y(high)) for x, _, high in band.points]
    lower = [(scale.x(x), scale.y(low)) for x, low, _ in reversed(band.points)]
    return element("path", d=f"{_path([*upper, *lower])}Z", class_=f"band {band.style}")


def _path(places: Sequence[PlotPoint]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _usable(line: Line, log_y: bool) -> Line:
    def fits(point: PlotPoint) -> bool:
        return all(map(math.isfinite, point)) and (not log_y or point[1] > 0)

    return Line(
        name=line.name,
        points=[point for point in line.points if fits(point)],
        style=line.style,
        markers=line.markers,
    )


def _thinned(points: Sequence[PlotPoint]) -> list[PlotPoint]:
    """Keep the lowest and the highest of every few points, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    every = math.ceil(2 * len(points) / _MOST_POINTS)
    value = itemgetter(1)
    kept: list[PlotPoint] = []
    for start in range(0, len(points), every):
        group = points[start : start + every]
        kept += sorted({min(group, key=value), max(group, key=value)})
    return kept


def _legend(lines: Sequence[Line], band: Band | None, notes: Sequence[str]) -> Markup:
    def entries() -> Iterator[Markup]:
        for line in lines:
            yield element(
                "span", element("i", class_=f"key {line.style}"), text(line.name), class_="entry"
            )
        if band is not None:
            key = element("i", class_=f"key band {band.style}")
            yield element("span", key, text(band.name), class_="entry")
        for note in notes:
            yield element("span", text(note), class_="entry")

    return element("figcaption", *entries())


def _spoken(lines: Sequence[Line]) -> str:
    return "; ".join(
        f"{line.name} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines
    )
