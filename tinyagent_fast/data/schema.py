"""Typed values of the planner dataset, and how the text of a plan is read for data checks.

First stage of the data flow: `reading` checks each entry with the help of this module; `cache`,
`splits` and `report` work on the `Entry` and `Example` values. Of the two text forms, the plan is
read here (`plan_steps`) and the messages of a point in `messages`.

The file is one JSON object, entry key -> {"input", "output", "closest_5_queries"}. Each item of
"output" is a point: the messages sent to the model ("raw_input", usually the Python repr of a
message list), its reply ("raw_output") and that reply parsed ("parsed_output").
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Literal, NamedTuple

PointKind = Literal["plan", "join", "replan"]
Role = Literal["system", "user", "assistant"]

_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_STEP = re.compile(r"(?:Thought: [^\n]*\n\s*)?(\d{1,9})\. (\w+)\((.*)\)")
JSON_NAMES: dict[type, str] = defaultdict(lambda: "another type")
JSON_NAMES.update({dict: "an object", list: "a list", str: "a text", float: "a number"})
JSON_NAMES.update({int: "a whole number", bool: "true or false", type(None): "null"})


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; the role "human" of the file is read as "user"."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model call of an entry: what was asked and what was answered."""

    kind: PointKind
    messages: tuple[Message, ...]
    raw_output: str
    index: int
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One user query with its model calls; the first one is always a plan."""

    key: str
    query: str
    points: tuple[Point, ...]
    closest_queries: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row for training or evaluation: system and user text in, raw output expected.

    `key` is "<entry key>/<position of the point in the entry's output list>".
    """

    key: str
    entry_key: str
    kind: PointKind
    query: str
    system: str | None
    user: str
    output: str


@dataclass(frozen=True, slots=True)
class EntryProblem:
    """One reason why one entry cannot be used: which entry, which field, what is wrong."""

    key: str
    field: str
    reason: str


class Step(NamedTuple):
    """One call of a plan, read leniently: the tool's name and the text between the brackets."""

    tool: str
    args_text: str


def plan_steps(raw_output: str) -> list[Step]:
    """Read the calls of a plan as the dataset's own convention does, for data checks.

    A later line with the same number replaces the earlier one, and nothing after the first
    `join` counts. Text that is no call is passed over.

    Args:
        raw_output: The model's reply, one `N. tool(args)` per line.

    Returns:
        The calls in the order of their first appearance, `join` included.

    Source: output parser of github.com/SqueezeAILab/TinyAgent.
    """
    steps: dict[int, Step] = {}
    for number, tool, args_text in _STEP.findall(raw_output):
        steps[int(number)] = Step(tool, args_text)
        if tool == "join":
            break
    return list(steps.values())


def try_literal(text: str) -> object:
    """Read a Python literal; a reader of data must know why it is none, so nothing is raised.

    Args:
        text: The text of the literal.

    Returns:
        Its value, or the exception that says why there is none.
    """
    try:
        with warnings.catch_warnings():
            # An unknown escape such as "\d" is a warning in some Python versions only.
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except _LITERAL_ERRORS as error:
        return error


def plan_disagreement(raw_output: str, parsed_output: list[object]) -> str | None:
    """Compare a plan's text with its parsed form, tool by tool and argument by argument.

    Args:
        raw_output: The text of the plan.
        parsed_output: The list of {"tool_name", "tool_args"} stored next to it.

    Returns:
        What differs first, or None if they agree.
    """
    steps = plan_steps(raw_output)
    if not steps:
        return f"has no line of the form 'N. tool(args)': {short_text(raw_output)}"
    if len(steps) != len(parsed_output):
        return f"has {len(steps)} steps but parsed_output has {len(parsed_output)}"
    for number, (step, parsed) in enumerate(zip(steps, parsed_output, strict=True), start=1):
        if not isinstance(parsed, dict) or not isinstance(parsed.get("tool_args"), list):
            return f"cannot be compared: step {number} of parsed_output needs tool_name, tool_args"
        if parsed.get("tool_name") != step.tool:
            return f"step {number} calls {step.tool}, parsed_output has {parsed.get('tool_name')!s}"
        if not _same_args(step.args_text, parsed["tool_args"]):
            shown = f"{step.tool}({step.args_text})"
            return f"step {number} is {short_text(shown)}, parsed_output has other arguments"
    return None


def _same_args(text: str, args: list[object]) -> bool:
    try:
        # Writing the arguments is cheaper than compiling the text, and nearly always enough.
        if ", ".join(map(_written, args)) == text:
            return True
        value = try_literal(text)
        if isinstance(value, Exception):
            return bool(text) and args == [text]
        plain = _as_json(value)
        return args == [plain] or (isinstance(plain, list) and args == plain)
    except RecursionError:
        return False


def _written(value: object) -> str:
    """Write a decoded JSON value as a Python literal, texts in double quotes as plans have them."""
    if isinstance(value, str):
        return encode_basestring(value)  # JSON's escapes mean the same in Python.
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return repr(value)


def _as_json(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _as_json(item) for name, item in value.items()}
    return value


def is_encodable(text: str) -> bool:
    """Return whether a text is free of lone surrogates, which no tokenizer can encode.

    Args:
        text: Any text.

    Returns:
        True if UTF-8 can hold it.
    """
    try:
        return text.isascii() or text.encode() is not None
    except UnicodeEncodeError:
        return False


def short_text(text: str, limit: int = 80) -> str:
    """Quote the beginning of a text on one line of ASCII, for messages.

    Args:
        text: The text to show.
        limit: How many of its characters to show.

    Returns:
        The quoted text, with "..." where it was cut.
    """
    return ascii(text if len(text) <= limit else text[:limit] + "...")
