"""Draw a plan in the terminal: calls in boxes, layer below layer, with references in colour."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tinyagent_fast.chat.plan_view import PlanView, ViewNode
from tinyagent_fast.chat.planners import PlanStream

_COLOURS = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green")
_PROBLEM = "red"
_BOX_COLUMNS = 42
_ARGUMENT_LINES = 6
_REFERENCE = re.compile(r"\$(?:(\d{1,9})|\{(\d{1,9})\})")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Show control characters instead of sending them: a model's text must not steer a terminal.

    Args:
        text: Any text.

    Returns:
        The text with line breaks and tabs kept, and other control characters written as escapes.
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


def draw_plan(view: PlanView) -> RenderableType:
    """Draw a plan.

    Args:
        view: The plan.

    Returns:
        What rich can print: a row of boxes for each layer, below it what the next layer takes
        from it, and every problem in words.
    """
    return Group(*_parts(view))


def _parts(view: PlanView) -> Iterator[RenderableType]:
    for index, layer in enumerate(view.layers):
        if index:
            yield _arrows(view, index)
        yield Columns([_box(node) for node in layer], padding=(0, 1))
    if view.joined:
        yield Text("join() waits for all calls" if view.nodes else "join()", style="dim")
    for problem in view.problems:
        yield Text(f"problem: {printable(problem)}", style=_PROBLEM)


def _box(node: ViewNode) -> RenderableType:
    body = _arguments(node.arguments)
    for problem in node.problems:
        body.append(f"\nproblem: {printable(problem)}", style=_PROBLEM)
    colour = _colour(node.number)
    title = f"[bold {colour}]{node.number}[/] {escape(printable(node.tool))}"
    widest = max(len(line) for line in [*body.plain.split("\n"), f"{node.number} {node.tool}  "])
    return Panel(
        body,
        title=title,
        title_align="left",
        border_style=_PROBLEM if node.problems else colour,
        width=min(_BOX_COLUMNS, widest + 4),
    )


def _arguments(raw: str) -> Text:
    """Give arguments with each reference in the colour of the call it refers to."""
    room = _BOX_COLUMNS * _ARGUMENT_LINES
    shown = printable(raw if len(raw) <= room else raw[: room - 3] + "...")
    text = Text(shown or "(no arguments)", style="" if shown else "dim", overflow="fold")
    for match in _REFERENCE.finditer(shown):
        number = int(match.group(1) or match.group(2))
        text.stylize(f"bold {_colour(number)}", *match.span())
    return text


def _arrows(view: PlanView, layer: int) -> Text:
    """Name the references that end in a layer."""
    text = Text("  ")
    for start, end in view.edges:
        if view.nodes[end].layer == layer:
            number = view.nodes[start].number
            text.append(f"${number}", style=f"bold {_colour(number)}")
            text.append(f" -> {view.nodes[end].number}   ")
    return text


def _colour(number: int) -> str:
    return _COLOURS[(number - 1) % len(_COLOURS)]


def show_header(console: Console, title: str, facts: Mapping[str, str]) -> None:
    """Print what a planner is.

    Args:
        console: Where to print.
        title: Name of the command.
        facts: Short names and values.
    """
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(printable(value)))
    console.print(Panel(table, title=title, title_align="left", expand=False))


def show_stream(console: Console, stream: PlanStream) -> None:
    """Print a plan as it is written, then its drawing and what it cost.

    Args:
        console: Where to print.
        stream: A plan that has not begun.
    """
    # Closed here, not when memory is tidied up, since a plan that was broken off holds its turn.
    with console.status("reading the prompt") as status, closing(iter(stream)) as pieces:
        for piece in pieces:
            if piece:
                status.stop()
                console.out(printable(piece), end="", highlight=False)
    console.out("")
    console.print(draw_plan(stream.view()))
    if stream.ending is not None:
        console.print(Text(stream.ending.sentence(), style="dim"))
