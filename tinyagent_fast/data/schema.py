"""One entry of a dataset file: its typed values, and the checks that make them from JSON.

The file is one JSON object, entry key -> {"input", "output", "closest_5_queries"}. Each item of
"output" is a point: the messages sent to the model ("raw_input", usually the Python repr of a
message list), its reply ("raw_output") and that reply parsed ("parsed_output"). `reading` streams
the file and calls `entry_from_json`; `cache` stores the examples.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, Literal, NamedTuple, cast, get_args

from tinyagent_fast.errors import printable
from tinyagent_fast.plans.grammar import loose_steps, parse_expression
from tinyagent_fast.plans.tools import JOIN

PointKind = Literal["plan", "join", "replan"]

_KINDS: tuple[str, ...] = get_args(PointKind)
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user"}
_MESSAGE_LIST_START = re.compile(r"\s*\[\s*\{")
_JSON_LIST_START = re.compile(r'\s*\[\s*\{\s*"')
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_HALF_A_PAIR = "holds half of a surrogate pair, which is no character and cannot be encoded"
_JSON_NAMES: dict[type, str] = {
    **{dict: "an object", list: "a list", str: "a text", float: "a number"},
    **{int: "a whole number", bool: "true or false", type(None): "null"},
}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One user query with an example per model call; the first one is always a plan."""

    key: str
    query: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class EntryProblem:
    """One reason why one entry cannot be used: which entry, which field, what is wrong."""

    key: str
    field: str
    reason: str


class _Fields:
    """Reads typed fields of one entry and keeps every problem met on the way."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.problems: list[EntryProblem] = []

    def add(self, field: str, reason: str) -> None:
        """Note what is wrong with a field."""
        self.problems.append(EntryProblem(printable(self.key, one_line=True), field, reason))

    def take(self, values: Mapping[str, object], name: str, kind: type, where: str = "") -> Any:
        """Return the field if it is there with this type, else None and a problem."""
        if name not in values:
            self.add(where + name, "is missing")
            return None
        if _json_type(values[name]) is not kind:
            wanted = _JSON_NAMES[kind]
            self.add(where + name, f"must be {wanted}, not {_json_name(values[name])}")
            return None
        return values[name]

    def take_text(self, values: Mapping[str, object], name: str, where: str = "") -> str:
        """Return a text that is not blank, else an empty one and a problem."""
        text = self.take(values, name, str, where)
        if text is not None and not text.strip():
            self.add(where + name, "is empty")
        elif text is not None and not _is_encodable(text):
            self.add(where + name, _HALF_A_PAIR)
        return text or ""


def entry_from_json(key: str, value: object) -> Entry | list[EntryProblem]:
    """Check one decoded entry of the file: an `Entry`, or all of its problems.

    Fields that the schema does not name are ignored.
    """
    if not isinstance(value, dict):
        return [
            EntryProblem(
                printable(key, one_line=True), "", f"must be an object, not {_json_name(value)}"
            )
        ]
    fields = _Fields(key)
    if not _is_encodable(key):
        fields.add("", f"has a key that {_HALF_A_PAIR}")
    query = fields.take_text(value, "input")
    output = fields.take(value, "output", list)
    examples = [_example(item, at, query, fields) for at, item in enumerate(output or ())]
    if output is not None and not output:
        fields.add("output", "is empty")
    elif examples and examples[0] is not None and examples[0].kind != "plan":
        fields.add("output[0].type", f"must be 'plan', it is '{examples[0].kind}'")
    closest = value.get("closest_5_queries") or []
    if not isinstance(closest, list) or not all(isinstance(item, str) for item in closest):
        fields.add("closest_5_queries", "must be a list of texts")
    if fields.problems:
        return fields.problems
    kept = tuple(example for example in examples if example is not None)
    return Entry(key=key, query=query, examples=kept)


def _example(item: object, at: int, query: str, fields: _Fields) -> Example | None:
    """Read one point; None where its kind is unknown. Problems are added to `fields`."""
    where = f"output[{at}]."
    if not isinstance(item, dict):
        fields.add(where[:-1], f"must be an object, not {_json_name(item)}")
        return None
    kind = fields.take(item, "type", str, where)
    if kind is not None and kind not in _KINDS:
        fields.add(where + "type", f"must be plan, join or replan, it is {short_text(kind)}")
    system, user = None, ""
    try:
        if "raw_input" not in item:
            raise ValueError("is missing")
        system, user = _system_and_user(parse_messages(item["raw_input"]))
    except ValueError as error:
        fields.add(where + "raw_input", str(error))
    output = fields.take_text(item, "raw_output", where)
    parsed = fields.take(item, "parsed_output", dict if kind == "join" else list, where)
    if isinstance(parsed, list) and output.strip():
        reason = plan_disagreement(output, parsed)
        if reason:
            fields.add(where + "raw_output", reason)
    fields.take(item, "id", str, where)
    fields.take(item, "index", int, where)
    if kind not in _KINDS:
        return None
    return Example(
        key=f"{fields.key}/{at}",
        entry_key=fields.key,
        kind=cast(PointKind, kind),
        query=query,
        system=system,
        user=user,
        output=output,
    )


def parse_messages(raw_input: object) -> list[tuple[str, str]]:
    """Read the messages of a point from any of the forms that data files use.

    These are a text with the Python repr of a message list or with the same list in JSON, that list
    itself, or a plain text, which is taken as one user message.

    Returns:
        Role (system, user or assistant; "human" is read as "user") and text of each message.

    Raises:
        ValueError: The text starts like a message list but is none; the message says why.
    """
    if isinstance(raw_input, str):
        if not _MESSAGE_LIST_START.match(raw_input):
            return [("user", raw_input)]
        raw_input = _decode_list(raw_input)
    if not isinstance(raw_input, list):
        raise ValueError(f"must be a text or a list of messages, not {_json_name(raw_input)}")
    return [_message(item, at) for at, item in enumerate(raw_input)]


def _decode_list(raw: str) -> object:
    """Decode a text that starts like a list of objects, as JSON or as a Python literal."""
    if _JSON_LIST_START.match(raw):
        try:
            return cast(object, json.loads(raw))
        except (ValueError, RecursionError):
            pass  # A Python list may use double quotes too, so the literal parser decides.
    value = _try_literal(raw.strip())
    if isinstance(value, MemoryError | RecursionError):
        raise ValueError("is nested too deeply or too large to be read")
    if isinstance(value, Exception):
        reason = value.msg if isinstance(value, SyntaxError) else str(value)
        raise ValueError(
            "starts like a list of messages but is neither a Python literal nor JSON "
            f"({short_text(reason)}): {short_text(raw)}"
        )
    return value


def _message(item: object, at: int) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise ValueError(f"message {at} must be an object, not {_json_name(item)}")
    if set(item) != {"role", "content"}:
        names = ", ".join(short_text(str(name)) for name in item) or "nothing"
        raise ValueError(f"message {at} must have just 'role' and 'content', it has {names}")
    name, content = item["role"], item["content"]
    if not isinstance(content, str):
        raise ValueError(f"message {at}: content must be a text, not {_json_name(content)}")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        shown = short_text(name) if isinstance(name, str) else _json_name(name)
        raise ValueError(f"message {at}: unknown role {shown}; known: {', '.join(_ROLES)}")
    return role, content


def _system_and_user(messages: list[tuple[str, str]]) -> tuple[str | None, str]:
    """Take the optional system text and the user text out of a conversation.

    Several turns, or a reply inside the input, would have to be joined by a rule that the
    deployed prompt does not have, so they are a ValueError.
    """
    roles = [role for role, _ in messages]
    if roles not in (["user"], ["system", "user"]):
        found = f"{', '.join(roles[:8]) or 'no message'}{', ...' if len(roles) > 8 else ''}"
        raise ValueError(
            f"must be an optional system message and then one user message, it has {found}"
        )
    user = messages[-1][1]
    if not user.strip():
        raise ValueError("has an empty user message")
    if not all(_is_encodable(text) for _, text in messages):
        raise ValueError(_HALF_A_PAIR)
    return messages[0][1] if len(messages) == 2 else None, user


class Step(NamedTuple):
    """One call of a plan, read leniently: the tool's name and the text between the brackets."""

    tool: str
    args_text: str


def plan_steps(raw_output: str) -> list[Step]:
    """Read the calls of a plan as the dataset's own convention does, for data checks.

    A later line with the same number replaces the earlier one, and nothing after the first
    `join` counts. Text that is no call is passed over. Numbers keep the order in which they first
    appear.
    """
    steps: dict[str, Step] = {}
    for digits, tool, args_text in loose_steps(raw_output):
        steps[digits.lstrip("0")] = Step(tool, args_text)
        if tool == JOIN:
            break
    return list(steps.values())


def called_tools(plan: str) -> tuple[str, ...]:
    """List the tools that a plan calls, each once, join left out."""
    return tuple(dict.fromkeys(step.tool for step in plan_steps(plan) if step.tool != JOIN))


def plan_disagreement(raw_output: str, parsed_output: list[object]) -> str | None:
    """Say where a plan and its list of {"tool_name", "tool_args"} differ first; None if nowhere."""
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
        value = _try_literal(f"[{text}]")
        if isinstance(value, Exception):
            return args == [text]
        plain = _as_json(value)
        return plain in (args, [args])  # The published parser takes a single list apart.
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


def _try_literal(text: str) -> object:
    """Return the value of a Python literal, or the exception that says why it is none."""
    try:
        return ast.literal_eval(parse_expression(text.lstrip(" \t")))
    except _LITERAL_ERRORS as error:
        return error


def _is_encodable(text: str) -> bool:
    """Say whether a text is free of lone surrogates, which no tokenizer can encode."""
    try:
        return text.isascii() or text.encode() is not None
    except UnicodeEncodeError:
        return False


def _json_type(value: object) -> type:
    return dict if isinstance(value, dict) else type(value)


def _json_name(value: object) -> str:
    return _JSON_NAMES.get(_json_type(value), "another type")


def short_text(text: str, limit: int = 80) -> str:
    """Quote at most `limit` characters of a text on one line of ASCII, for messages."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")
