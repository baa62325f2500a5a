"""A plan as a graph: read from any text, laid out once, drawn for a terminal or as SVG.

Used by chat, the local page, the Python API and reports. It reads half a plan while a model still
writes it; a wrong plan is drawn with what is wrong at each call. `mark_differences` marks what
two plans do not have in common.
"""

from __future__ import annotations

import re
import textwrap
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from tinyagent_fast.config import typed
from tinyagent_fast.errors import printable
from tinyagent_fast.plans.grammar import Step, read_plan
from tinyagent_fast.plans.graph import Dag, followed_references, same_dag, surroundings
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, Tool, call_problems

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Edge = tuple[int, int]
"""Positions of two steps in the drawing: the second needs the result of the first."""
Mark = Literal["same", "missing", "extra"]
"""Whether a step or reference is in both plans, in the label alone, or in the prediction alone."""

MAX_CALLS = 30
"""A plan that repeats itself without end is drawn so far; the remaining calls are counted."""

MAX_PROBLEMS = 5
"""More problems of the text as a whole are counted in the drawing for a terminal, not listed."""

_NO_CALL = "no call that can be read"
_UNFINISHED = ("no_join", "empty")  # no problems while the plan is being written
_SIGN = {"same": "", "missing": "\u2212 ", "extra": "+ "}
_REFERENCE = re.compile(r"\$(?:(\d{1,9})|\{(\d{1,9})\})")


@dataclass(frozen=True, kw_only=True)
class DrawnStep:
    """One call of a plan: what it says, where it stands, and what is wrong with it."""

    number: int
    tool: str
    arguments: str
    """As the model wrote them."""
    layer: int
    """0 for calls that can start at once, else one more than the last call it waits for."""
    place: int
    """Place within the layer, from 0."""
    problems: tuple[str, ...]
    mark: Mark = "same"
    status: str = ""
    """`running`, or what became of the call (`done`, `done before`, `failed`, `skipped` or
    `refused`), once the plan is run."""
    outcome: str = ""
    """What the call gave, or why it gave nothing."""


@dataclass(frozen=True, kw_only=True)
class PlanDrawing:
    """A plan ready to be drawn; join is not drawn, since it waits for everything."""

    steps: tuple[DrawnStep, ...]
    """In the order of the text."""
    edges: Mapping[Edge, Mark]
    joined: bool
    problems: tuple[str, ...]
    """What is wrong with the text as a whole, or with lines that are no call."""
    left_out: int
    """Calls beyond `MAX_CALLS`."""

    @property
    def all_problems(self) -> tuple[str, ...]:
        """What is wrong with the text as a whole, then what is wrong with each call."""
        calls = (f"step {step.number}: {p}" for step in self.steps for p in step.problems)
        return (*self.problems, *calls)

    @property
    def layers(self) -> list[list[DrawnStep]]:
        """The steps by layer, each in the order of their places."""
        layers: defaultdict[int, list[DrawnStep]] = defaultdict(list)
        for step in sorted(self.steps, key=lambda step: step.place):
            layers[step.layer].append(step)
        return [layers[layer] for layer in sorted(layers)]

    def with_outcomes(self, outcomes: Mapping[int, tuple[str, str]]) -> PlanDrawing:
        """Fill in what became of calls: status and observation by number."""
        steps = (
            replace(s, status=o[0], outcome=o[1]) if (o := outcomes.get(s.number)) else s
            for s in self.steps
        )
        return replace(self, steps=tuple(steps))

    def with_problems(self, problems: Mapping[int, str]) -> PlanDrawing:
        """Add to what is wrong with calls, by number."""
        steps = (
            replace(s, problems=(*s.problems, problems[s.number])) if s.number in problems else s
            for s in self.steps
        )
        return replace(self, steps=tuple(steps))

    def to_json(self) -> dict[str, Any]:
        """Give plain values, edges as a list of pairs of positions."""
        return asdict(self) | {"edges": [list(edge) for edge in self.edges]}

    def to_text(self, width: int = 80) -> str:
        """Draw the plan as text of so many columns; `console.print(drawing)` has colours too."""
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=width, color_system=None, force_terminal=False).print(self)
        return text.getvalue().lstrip("\n") or "(no steps)\n"

    def __rich__(self) -> RenderableType:
        """Give what rich prints: boxes layer below layer, the references between, the problems."""
        from rich.columns import Columns
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = []
        for index, layer in enumerate(self.layers):
            if index:
                parts.append(_arrows(self, index))
            parts.append(Columns([_panel(step) for step in layer], padding=(0, 1)))
        if self.left_out:
            parts.append(Text(self._left_out_note(), style="dim"))
        if self.joined:
            join = "join() waits for all calls" if self.steps else "join()"
            parts.append(Text(join, style="dim"))
        shown = self.problems if len(self.problems) <= MAX_PROBLEMS else self.problems[:3]
        for problem in shown:
            parts.append(Text(f"problem: {printable(problem)}", style=_PROBLEM))
        if len(shown) < len(self.problems):
            rest = len(self.problems) - len(shown)
            parts.append(Text(f"{rest} more problems of this kind or others", style=_PROBLEM))
        return Group(*parts)

    def to_svg(self, name: str = "Plan") -> str:
        """Draw the plan as one SVG element for a page or a file, layers from left to right.

        Colours are `currentColor` until a page's CSS sets them by class: `plan-graph` with
        `layers-N`; `step` with `faulty`, `missing`, `extra` and a colour `c0` to `c6` by step
        number; `edge` and `head` with mark and colour; texts `tool`, `argument`, `reference`,
        `problem`, `outcome`. A step that was run has its status as `data-status`.

        It is safe to put into HTML, as every text of the plan is escaped; `name` is read out to
        those who cannot see it. Without any call it says so.
        """
        boxes, routes, width, height = _geometry(self)
        note = self._left_out_note() if self.left_out else ""
        if not boxes:
            width, height, note = _BOX_WIDTH, _LINE_HEIGHT, _NO_CALL
        height += 2 * _LINE_HEIGHT * bool(note)
        root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
        _set(root, class_=f"plan-graph layers-{len(self.layers)}", width=width, height=height)
        _set(root, viewBox=f"0 0 {width:g} {height:g}", fill="none", stroke="currentColor")
        _set(root, font_family="ui-monospace, Menlo, Consolas, monospace")
        ET.SubElement(root, "title").text = printable(f"{name}: {self._spoken()}")
        for (start, end), mark in self.edges.items():
            classes = f"{mark} {_colour_class(self.steps[start].number)}"
            route, edge = routes[start, end], f"{start}-{end}"
            line = _set(ET.SubElement(root, "path"), class_=f"edge {classes}", data_edge=edge)
            _set(line, d=_curve(route), **_STROKE[mark])
            head = _set(ET.SubElement(root, "path"), class_=f"head {classes}", data_edge=edge)
            _set(head, d="M{:g} {:.1f}l-7 -3.5v7z".format(*route[-1]), fill="currentColor")
            _set(head, stroke="none")
        for step, box in zip(self.steps, boxes, strict=True):
            _add_box(root, step, box)
        if note:
            _add_line(root, "note", note, x=_MARGIN, y=height - _LINE_HEIGHT / 2)
        return ET.tostring(root, encoding="unicode")

    def _left_out_note(self) -> str:
        return f"{self.left_out} more calls are not drawn"

    def _spoken(self) -> str:
        named = [f"{step.number} {step.tool}" for step in self.steps]
        links = [f"{named[start]} to {named[end]}" for start, end in self.edges]
        counts = f"{len(named)} calls, {len(links)} references"
        return f"{counts}: {'; '.join(links or named)}" if named else _NO_CALL


@typed
def draw_plan(
    text: str, tools: Mapping[str, Tool] | None = None, *, finished: bool = True
) -> PlanDrawing:
    """Read a plan and lay it out.

    Args:
        text: What the planner wrote, or has written so far.
        tools: Tools that may be called, by name; None stands for TinyAgent's own.
        finished: False while it is being written: then only whole lines are read, and a missing
            end is no problem.

    Returns:
        The drawing; no text raises anything.

    Raises:
        ConfigError: The plan is no text.
    """
    reading = read_plan(text if finished else text[: text.rfind("\n") + 1])
    by_number = {step.number: step for step in reading.steps}
    every = [step for step in reading.steps if step.tool != JOIN]
    calls = every[:MAX_CALLS]
    position: dict[int, int] = {}
    for index, call in enumerate(calls):
        position.setdefault(call.number, index)
    last = max(by_number, default=0)
    edges: set[Edge] = set()
    problems: list[tuple[str, ...]] = []
    for index, call in enumerate(calls):
        needed, faults = _references(call, by_number, last)
        edges |= {(position[number], index) for number in needed if number in position}
        of_call = call_problems(call.tool, call.arguments, TINYAGENT if tools is None else tools)
        problems.append((*(message for _, message in of_call), *faults))
    layers = _layers([call.number for call in calls], edges)
    places = {
        step: place
        for column in _columns(layers, edges)
        for place, step in enumerate(slot for slot in column if isinstance(slot, int))
    }
    return PlanDrawing(
        steps=tuple(
            DrawnStep(
                number=call.number,
                tool=call.tool,
                arguments=call.raw_arguments.strip(),
                layer=layers[index],
                place=places[index],
                problems=problems[index],
            )
            for index, call in enumerate(calls)
        ),
        edges=dict.fromkeys(sorted(edges), "same"),
        joined=len(every) < len(reading.steps),
        problems=tuple(
            problem.message
            for problem in reading.problems
            if finished or problem.code not in _UNFINISHED
        ),
        left_out=len(every) - len(calls),
    )


def _references(call: Step, by_number: Mapping[int, Step], last: int) -> tuple[set[int], list[str]]:
    """Find the steps that a call needs, and what is wrong with its other references."""
    needed: set[int] = set()
    faults: list[str] = []
    uses = followed_references(call, by_number, last)
    for number, error in sorted(uses, key=lambda use: use[0]):
        if error is not None:
            faults.append(error.message)
        elif by_number[number].tool == JOIN:
            faults.append(f"${number} is the result of join")
        else:
            needed.add(number)
    return needed, list(dict.fromkeys(faults))


# The layout: layers of steps. An edge that passes a layer has a slot of its own there, so that it
# runs through no box.

_Slot = int | tuple[int, int, int]  # a step's position, or (start, end, layer) of a passing edge
_SWEEPS = 4


def _layers(numbers: Sequence[int], edges: set[Edge]) -> list[int]:
    """Put every call behind the last one it waits for; references go to smaller numbers only."""
    before: defaultdict[int, list[int]] = defaultdict(list)
    for start, end in edges:
        before[end].append(start)
    layers = [0] * len(numbers)
    for step in sorted(range(len(numbers)), key=numbers.__getitem__):
        layers[step] = 1 + max((layers[start] for start in before[step]), default=-1)
    return layers


def _columns(layers: Sequence[int], edges: set[Edge]) -> list[list[_Slot]]:
    """Order every layer by the mean place of its neighbours, to and fro: few edges cross then."""
    columns: list[list[_Slot]] = [[] for _ in range(max(layers, default=-1) + 1)]
    for step, layer in enumerate(layers):
        columns[layer].append(step)
    left: defaultdict[_Slot, list[_Slot]] = defaultdict(list)
    right: defaultdict[_Slot, list[_Slot]] = defaultdict(list)
    for start, end in sorted(edges):
        passing: list[_Slot] = [(start, end, at) for at in range(layers[start] + 1, layers[end])]
        for at, slot in enumerate(passing, start=layers[start] + 1):
            columns[at].append(slot)
        for one, other in pairwise([start, *passing, end]):
            right[one].append(other)
            left[other].append(one)
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        for at in range(1, len(columns)) if forward else range(len(columns) - 2, -1, -1):
            place = {slot: i for i, slot in enumerate(columns[at - 1 if forward else at + 1])}
            wish: dict[_Slot, float] = {}
            for index, slot in enumerate(columns[at]):
                near = [place[other] for other in (left if forward else right)[slot]]
                wish[slot] = sum(near) / len(near) if near else index
            columns[at].sort(key=wish.__getitem__)
    return columns


# SVG

_BOX_WIDTH, _COLUMN_GAP, _ROW_GAP, _MARGIN, _SLOT_HEIGHT = 190.0, 34.0, 14.0, 4.0, 14.0
_LINE_HEIGHT, _LINE_CHARS, _TOOL_CHARS, _MOST_LINES, _TITLE_CHARS = 15.0, 27, 26, 3, 600
_COLOURS = 7
_STROKE: dict[Mark, dict[str, object]] = {
    "same": {"stroke_width": 1.3},
    "missing": {"stroke_width": 2.2, "stroke_dasharray": "5 3"},
    "extra": {"stroke_width": 2.2},
}
_Point = tuple[float, float]


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    lines: tuple[tuple[str, str], ...]
    """Class and text of each line."""

    @property
    def height(self) -> float:
        """Height of the box in pixels."""
        return 16 + _LINE_HEIGHT * len(self.lines)


def _set(element: ET.Element, **attributes: object) -> ET.Element:
    """Set attributes; `class_` and `stroke_width` become `class` and `stroke-width`."""
    for key, value in attributes.items():
        written = f"{value:g}" if isinstance(value, float) else str(value)
        element.set(key.rstrip("_").replace("_", "-"), written)
    return element


def _colour_class(number: int) -> str:
    return f"c{(number - 1) % _COLOURS}"


def _add_box(root: ET.Element, step: DrawnStep, box: _Box) -> None:
    group = _set(ET.SubElement(root, "g"), data_step=step.number)
    if step.status:
        _set(group, data_status=step.status)
    faulty = " faulty" if step.problems else ""
    _set(group, class_=f"step {step.mark} {_colour_class(step.number)}{faulty}")
    whole = _cut(f"{step.number}. {step.tool}({step.arguments})", _TITLE_CHARS)
    ET.SubElement(group, "title").text = printable("\n".join([whole, *step.problems]))
    frame = _set(ET.SubElement(group, "rect"), x=box.x, y=box.y, height=box.height)
    _set(frame, width=_BOX_WIDTH, rx=6, **_STROKE[step.mark])
    # An inner svg clips letters that are wider than expected.
    inner = _set(ET.SubElement(group, "svg"), x=box.x, y=box.y, height=box.height)
    _set(inner, width=_BOX_WIDTH - 3)
    for index, (kind, text) in enumerate(box.lines):
        _add_line(inner, kind, text, x=9, y=19 + _LINE_HEIGHT * index)


def _add_line(parent: ET.Element, kind: str, text: str, x: float, y: float) -> None:
    """Write one line; references within arguments get the colour of the step they refer to."""
    line = _set(ET.SubElement(parent, "text"), class_=kind, x=x, y=y)
    _set(line, fill="currentColor", stroke="none", font_size=10.5)
    if kind != "argument":
        line.text = text
        if kind == "tool":
            _set(line, font_weight="bold", font_size=11)
        return
    end = 0
    for match in (*_REFERENCE.finditer(text), None):
        plain = ET.SubElement(line, "tspan")
        plain.text = text[end : match.start() if match else None]
        if match:
            reference = _set(ET.SubElement(line, "tspan"), font_weight="bold")
            _set(reference, class_=f"reference {_colour_class(_referred(match))}")
            reference.text, end = match.group(), match.end()


def _referred(match: re.Match[str]) -> int:
    return int(match.group(1) or match.group(2))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def _box_lines(step: DrawnStep) -> tuple[tuple[str, str], ...]:
    title = _cut(f"{_SIGN[step.mark]}{step.number} {step.tool}", _TOOL_CHARS)
    texts = [("argument", step.arguments), *(("problem", problem) for problem in step.problems)]
    if step.status:
        failed = step.status in ("failed", "skipped", "refused")
        texts.append(("problem" if failed else "outcome", f"{step.status}: {step.outcome}"))
    wrapped = (
        (kind, line)
        for kind, text in texts
        for line in textwrap.wrap(
            printable(text), _LINE_CHARS, max_lines=_MOST_LINES, placeholder="\u2026"
        )
    )
    return (("tool", title), *wrapped)


def _geometry(
    drawing: PlanDrawing,
) -> tuple[list[_Box], dict[Edge, list[_Point]], float, float]:
    """Place the boxes and lead every edge from side to side.

    Returns:
        Boxes by position of the step, the points of each edge, width and height, all in px.
    """
    lines = [_box_lines(step) for step in drawing.steps]
    columns = _columns([step.layer for step in drawing.steps], set(drawing.edges))

    def height_of(slot: _Slot) -> float:
        return _Box(0, 0, lines[slot]).height if isinstance(slot, int) else _SLOT_HEIGHT

    heights = [sum(map(height_of, column)) + _ROW_GAP * (len(column) - 1) for column in columns]
    tallest = max(heights, default=0.0)
    boxes: dict[int, _Box] = {}
    passing: defaultdict[Edge, list[_Point]] = defaultdict(list)
    for at, column in enumerate(columns):
        x = _MARGIN + at * (_BOX_WIDTH + _COLUMN_GAP)
        y = _MARGIN + (tallest - heights[at]) / 2
        for slot in column:
            if isinstance(slot, int):
                boxes[slot] = _Box(x, y, lines[slot])
            else:
                middle = y + _SLOT_HEIGHT / 2
                passing[slot[:2]] += [(x, middle), (x + _BOX_WIDTH, middle)]
            y += height_of(slot) + _ROW_GAP
    routes: dict[Edge, list[_Point]] = {}
    for start, end in drawing.edges:
        leaves = (boxes[start].x + _BOX_WIDTH, boxes[start].y + boxes[start].height / 2)
        enters = (boxes[end].x, boxes[end].y + boxes[end].height / 2)
        routes[start, end] = [leaves, *passing[start, end], enters]
    width = 2 * _MARGIN + len(columns) * (_BOX_WIDTH + _COLUMN_GAP) - _COLUMN_GAP
    placed = [boxes[at] for at in range(len(boxes))]
    return placed, _spread(placed, routes), width, 2 * _MARGIN + tallest


def _spread(boxes: Sequence[_Box], routes: Mapping[Edge, list[_Point]]) -> dict[Edge, list[_Point]]:
    """Spread the edges that leave or enter a box over its side, in the order of where they go."""
    spread = {edge: list(route) for edge, route in routes.items()}
    for step, box in enumerate(boxes):
        for side, end, beside in ((0, 0, 1), (1, -1, -2)):
            edges = [edge for edge in routes if edge[side] == step]
            edges.sort(key=lambda edge: routes[edge][beside][1])
            for index, edge in enumerate(edges, start=1):
                y = box.y + box.height * index / (len(edges) + 1)
                spread[edge][end] = (routes[edge][end][0], y)
    return spread


def _curve(route: Sequence[_Point]) -> str:
    """Go from layer to layer in S-shaped curves, and straight past a layer."""
    *before, (end_x, end_y) = route
    points = [*before, (end_x - 6, end_y)]  # the arrow's head covers the rest
    path = f"M{points[0][0]:g} {points[0][1]:.1f}"
    for index, ((x, y), (next_x, next_y)) in enumerate(pairwise(points)):
        half = (x + next_x) / 2
        bend = f"C{half:g} {y:.1f} {half:g} {next_y:.1f}" if index % 2 == 0 else "L"
        path += f"{bend} {next_x:g} {next_y:.1f}"
    return path


# Terminal

_TERMINAL_COLOURS = ["cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green"]
_PROBLEM = "red"
_PANEL_COLUMNS, _ARGUMENT_LINES = 42, 6
_STATUS_STYLES = {"running": "dim", "done": "green", "done before": "green"} | dict.fromkeys(
    ("skipped", "refused"), "yellow"
)


def _panel(step: DrawnStep) -> RenderableType:
    from rich.panel import Panel
    from rich.text import Text

    shown = printable(_cut(step.arguments, _PANEL_COLUMNS * _ARGUMENT_LINES))
    body = Text(shown or "(no arguments)", style="" if shown else "dim", overflow="fold")
    for match in _REFERENCE.finditer(shown):
        body.stylize(_bold_colour(_referred(match)), *match.span())
    for problem in step.problems:
        body.append(f"\nproblem: {printable(problem)}", style=_PROBLEM)
    if step.status:
        told = printable(_cut(" ".join(step.outcome.split()), _PANEL_COLUMNS * _ARGUMENT_LINES))
        style = _STATUS_STYLES.get(step.status, _PROBLEM)
        body.append(f"\n{step.status}{': ' * bool(told)}{told}", style=style)
    title = Text(f"{_SIGN[step.mark]}{step.number}", style=_bold_colour(step.number))
    title.append(f" {printable(step.tool)}", style="not bold")
    widest = max(map(len, (*body.plain.split("\n"), f"{title.plain}  ")))
    return Panel(
        body,
        title=title,
        title_align="left",
        border_style=_PROBLEM if step.problems else _bold_colour(step.number).split()[1],
        width=min(_PANEL_COLUMNS, widest + 4),
    )


def _arrows(drawing: PlanDrawing, layer: int) -> Text:
    """Name the references that end in a layer."""
    from rich.text import Text

    text = Text("  ")
    for start, end in drawing.edges:
        if drawing.steps[end].layer == layer:
            number = drawing.steps[start].number
            text.append(f"${number}", style=_bold_colour(number))
            text.append(f" -> {drawing.steps[end].number}   ")
    return text


def _bold_colour(number: int) -> str:
    return f"bold {_TERMINAL_COLOURS[(number - 1) % _COLOURS]}"


# Two plans side by side.


def mark_differences(
    label: PlanDrawing, prediction: PlanDrawing
) -> tuple[PlanDrawing, PlanDrawing]:
    """Mark the steps and references of each plan that the other one lacks.

    If they are the same graph, nothing is marked; if not, something is.
    """
    if same_dag(_dag(label), _dag(prediction)):
        return label, prediction
    pairs = _matched_steps(label, prediction)
    back = {there: here for here, there in pairs.items()}
    missing = _marked(label, prediction, pairs, "missing")
    return missing, _marked(prediction, label, back, "extra")


def _dag(drawing: PlanDrawing) -> Dag:
    return Dag(tuple(step.tool for step in drawing.steps), frozenset(drawing.edges))


def _marked(
    drawing: PlanDrawing, other: PlanDrawing, pairs: Mapping[int, int], mark: Mark
) -> PlanDrawing:
    return replace(
        drawing,
        steps=tuple(
            replace(step, mark="same" if at in pairs else mark)
            for at, step in enumerate(drawing.steps)
        ),
        edges={
            (start, end): "same" if (pairs.get(start), pairs.get(end)) in other.edges else mark
            for start, end in drawing.edges
        },
    )


def _matched_steps(a: PlanDrawing, b: PlanDrawing) -> dict[int, int]:
    """Pair steps of the same tool: those with the same surroundings, then arguments, then any.

    Steps are taken in order, so what a step needs is paired before the step itself.
    """
    surroundings_a, surroundings_b = surroundings(_dag(a), _dag(b))
    pairs: dict[int, int] = {}
    free = set(range(len(b.steps)))

    def same_arguments(at: int, other: int) -> bool:
        return a.steps[at].arguments == b.steps[other].arguments

    def likeness(at: int, other: int) -> tuple[int, bool, int]:
        needed = {pairs.get(start) for start, end in a.edges if end == at}
        shared = needed & {start for start, end in b.edges if end == other}
        return len(shared), same_arguments(at, other), -abs(at - other)

    rounds: tuple[Callable[[int, int], bool], ...] = (
        lambda at, other: surroundings_a[at] == surroundings_b[other],
        same_arguments,
        lambda _at, _other: True,
    )
    for fits in rounds:
        for at, step in enumerate(a.steps):
            candidates = [
                other
                for other in sorted(free)
                if at not in pairs and b.steps[other].tool == step.tool and fits(at, other)
            ]
            if candidates:
                pairs[at] = max(candidates, key=lambda other: likeness(at, other))
                free.discard(pairs[at])
    return pairs
