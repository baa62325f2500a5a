"""A plan's graph as inline SVG: boxes for calls, arrows for references, differences marked.

Colours come from the page's style, so one drawing serves a light and a dark page; every mark is
also a sign or a dash, so that none rests on colour alone.
"""

from __future__ import annotations

from tinyagent_fast.reports.dag_layout import Box, Point, layered_layout
from tinyagent_fast.reports.markup import Markup, element, joined, text
from tinyagent_fast.reports.plan_graphs import DrawnCall, DrawnPlan

_TOOL_CHARS = 22
_ARGUMENT_CHARS = 30
_TITLE_CHARS = 600
_SIGN = {"same": "", "missing": "\u2212 ", "extra": "+ "}
_ARROW = 7.0


def draw_plan(plan: DrawnPlan, name: str) -> Markup:
    """Draw a plan.

    Args:
        plan: The plan with its marks.
        name: What the drawing shows, read out to those who cannot see it.

    Returns:
        An `svg` element, or a paragraph if there is no call to draw.
    """
    if not plan.calls:
        return element("p", text("no call that can be read"), class_="nothing")
    layout = layered_layout(len(plan.calls), plan.edges)
    edges = (
        element("path", d=_curve(layout.routes[edge]), class_=f"edge {state}")
        for edge, state in plan.edges.items()
    )
    heads = (
        element("path", d=_head(layout.routes[edge][-1]), class_=f"head {state}")
        for edge, state in plan.edges.items()
    )
    boxes = (_box(call, box) for call, box in zip(plan.calls, layout.boxes, strict=True))
    drawing = element(
        "svg",
        *edges,
        *heads,
        *boxes,
        viewBox=f"0 0 {layout.width:g} {layout.height:g}",
        role="img",
        aria_label=f"{name}: {_spoken(plan)}",
        class_="dag",
        style=f"max-width:{layout.width:g}px;min-width:{0.78 * layout.width:g}px",
    )
    if not plan.left_out:
        return drawing
    more = f"{plan.left_out} more calls are not drawn"
    return joined([drawing, element("p", text(more), class_="nothing")])


def _box(call: DrawnCall, box: Box) -> Markup:
    first = shortened(f"{_SIGN[call.state]}{call.number} {call.tool}", _TOOL_CHARS + 4)
    second = "; ".join(call.faults) if call.faults else call.arguments
    whole = f"{call.number}. {call.tool}({call.arguments})"
    notes = "".join(f"\n{fault}" for fault in call.faults)
    return element(
        "g",
        element("title", text(shortened(whole, _TITLE_CHARS) + notes)),
        element("rect", x=box.x, y=box.y, width=box.width, height=box.height, rx=6),
        # An inner svg clips its text, whatever font the reader has.
        element(
            "svg",
            element("text", text(first), x=9, y=19, class_="tool"),
            element(
                "text",
                text(shortened(second, _ARGUMENT_CHARS)),
                x=9,
                y=36,
                class_="fault" if call.faults else "arguments",
            ),
            x=box.x,
            y=box.y,
            width=box.width - 3,
            height=box.height,
        ),
        class_=f"node {call.state}",
    )


def shortened(value: str, most: int) -> str:
    """Cut a text for a drawing; the whole one goes into its title.

    Args:
        value: The text.
        most: Characters allowed.

    Returns:
        One line of at most so many characters, with an ellipsis where something was cut.
    """
    line = " ".join(value.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}\u2026"


def _curve(route: tuple[Point, ...]) -> str:
    """Go from column to column in S-shaped curves, and straight across a column."""
    *before, (end_x, end_y) = route
    points = [*before, (end_x - _ARROW + 1, end_y)]
    x, y = points[0]
    parts = [f"M{x:g} {y:.1f}"]
    for index, (next_x, next_y) in enumerate(points[1:]):
        if index % 2:
            parts.append(f"L{next_x:g} {next_y:.1f}")
        else:
            half = (x + next_x) / 2
            parts.append(f"C{half:g} {y:.1f} {half:g} {next_y:.1f} {next_x:g} {next_y:.1f}")
        x, y = next_x, next_y
    return "".join(parts)


def _head(end: Point) -> str:
    x, y = end
    return f"M{x:g} {y:.1f}l-{_ARROW:g} -3.5v7z"


def _spoken(plan: DrawnPlan) -> str:
    named = [f"{call.number} {call.tool}" for call in plan.calls]
    links = [f"{named[start]} to {named[end]}" for start, end in plan.edges]
    return f"{len(named)} calls, {len(links)} references" + (
        f": {'; '.join(links)}" if links else ""
    )
