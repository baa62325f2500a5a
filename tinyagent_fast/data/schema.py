"""Typed values of the planner dataset, and how its two text forms are read.

First stage of the data flow: `reading` checks each entry with the help of this module; `cache`,
`splits` and `report` work on the `Entry` and `Example` values. The text forms are the messages
of a point (`parse_messages`) and a plan (`plan_steps`).

The file is one JSON object, entry key -> {"input", "output", "closest_5_queries"}. Each item of
"output" is a point: the messages sent to the model ("raw_input", usually the Python repr of a
message list), its reply ("raw_output") and that reply parsed ("parsed_output").
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Literal, NamedTuple, cast

PointKind = Literal["plan", "join", "replan"]
Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES["human"] = "user"
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_LIST_START = re.compile(r"\s*\[\s*\{")
_JSON_LIST_START = re.compile(r'\s*\[\s*\{\s*"')
_STEP = re.compile(r"(?:Thought: [^\n]*\n\s*)?(\d{1,9})\. (\w+)\((.*)\)")
_BLOCK_CHARS = 2048
# A quote, unless exactly one backslash is before it: the rest is left to the general parser.
_NOT_SURELY_ESCAPED = {quote: re.compile(rf"{quote}(?<!(?<!\\)\\{quote})") for quote in ("'", '"')}
_BACKSLASH_BEFORE_NON_ASCII = re.compile(r"\\[^\x00-\x7f]")
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


def parse_messages(raw_input: object) -> tuple[Message, ...]:
    """Read the messages of a point from any of the forms that data files use.

    Args:
        raw_input: A text with the Python repr of a message list, a text with the same list in
            JSON, that list itself, or a plain text, which is taken as one user message.

    Returns:
        The messages in order.

    Raises:
        ValueError: The text starts like a message list but is none; the message says why.
    """
    if isinstance(raw_input, str):
        if not _LIST_START.match(raw_input):
            return (Message("user", raw_input),)
        scanned = scan_repr(raw_input)
        if scanned is not None:
            return tuple(Message(_role(role, at), text) for at, (role, text) in enumerate(scanned))
        raw_input = _decode_list(raw_input)
    if not isinstance(raw_input, list):
        raise ValueError(f"must be a text or a list of messages, not {JSON_NAMES[type(raw_input)]}")
    return tuple(_message(item, at) for at, item in enumerate(raw_input))


def scan_repr(raw: str) -> list[tuple[str, str]] | None:
    r"""Read the Python repr of `[{'role': ..., 'content': ...}, ...]` without compiling it.

    Several times as fast as `ast.literal_eval` on long prompts, and equal to it on all that it
    accepts: Python's own parser decodes a literal with the same codec, once the quotes inside
    are known to be escaped.

    Args:
        raw: The text of the literal.

    Returns:
        The (role, content) pairs, or None where the text has any other shape; the caller then
        uses the general parser, so None is not an error.
    """
    head, middle = "{'role': '", "', 'content': "
    if "\n" in raw or "\r" in raw or "\0" in raw or not is_encodable(raw):
        return None
    pairs: list[tuple[str, str]] = []
    position = 1
    while raw.startswith(head, position):
        role_start = position + len(head)
        role_end = raw.find("'", role_start)
        role = raw[role_start:role_end]
        start = role_end + len(middle) + 1
        quote = raw[start - 1 : start]
        if not role.isalpha() or not raw.startswith(middle, role_end) or quote not in ("'", '"'):
            return None
        end = _closing_quote(raw, start, quote)
        text = None if end is None else _unescape(raw[start:end], quote)
        if end is None or text is None:
            return None
        pairs.append((role, text))
        if end == len(raw) - 3:
            return pairs if raw.startswith("[") else None
        position = end + len("'}, ")
    return None


def _closing_quote(raw: str, start: int, quote: str) -> int | None:
    """Return where the content that begins at `start` ends: before the next message or `]`."""
    end = raw.find(quote + "}, {'role': '", start)
    while end > start and (end - len(raw[start:end].rstrip("\\")) - start) % 2:
        end = raw.find(quote + "}, {'role': '", end + 1)
    if end == -1 and len(raw) - 3 >= start and raw.endswith(quote + "}]"):
        return len(raw) - 3
    return None if end == -1 else end


def _unescape(body: str, quote: str) -> str | None:
    """Decode the inside of a one-line string literal; None if it ends early or is malformed."""
    if "\\" not in body:
        return None if quote in body else body
    texts: list[str] = []
    start = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" keeps its backslash, with a warning.
        while start < len(body):
            # Cut behind a space: the only escape that may hold one (a name) then fails.
            cut = body.rfind(" ", start, start + _BLOCK_CHARS) + 1
            end = cut if start < cut and len(body) - start > _BLOCK_CHARS else len(body)
            text = _unescape_block(body[start:end], quote)
            if text is None:
                return None
            texts.append(text)
            start = end
    return "".join(texts)


# Prompts share long beginnings, so many blocks have been decoded before.
@lru_cache(maxsize=128)
def _unescape_block(block: str, quote: str) -> str | None:
    if _NOT_SURELY_ESCAPED[quote].search(block):
        return None
    if not block.isascii() and _BACKSLASH_BEFORE_NON_ASCII.search(block):
        return None
    try:
        return block.encode("ascii", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        return None


def _try_literal(text: str) -> object:
    """Return the value of a Python literal, or the exception that says why it is none."""
    try:
        with warnings.catch_warnings():
            # An unknown escape such as "\d" is a warning in some Python versions only.
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except _LITERAL_ERRORS as error:
        return error


def _decode_list(raw: str) -> object:
    """Decode a text that starts like a list of objects, as JSON or as a Python literal."""
    value: object = None
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


def _message(item: object, at: int) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"message {at} must be an object, not {JSON_NAMES[type(item)]}")
    if set(item) != {"role", "content"}:
        names = ", ".join(short_text(str(name)) for name in item) or "nothing"
        raise ValueError(f"message {at} must have just 'role' and 'content', it has {names}")
    if not isinstance(item["content"], str):
        raise ValueError(
            f"message {at}: content must be a text, not {JSON_NAMES[type(item['content'])]}"
        )
    return Message(_role(item["role"], at), item["content"])


def _role(name: object, at: int) -> Role:
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        shown = short_text(name) if isinstance(name, str) else JSON_NAMES[type(name)]
        raise ValueError(f"message {at}: unknown role {shown}; known: {', '.join(_ROLES)}")
    return role


def conversation_problem(messages: tuple[Message, ...]) -> str | None:
    """Say what keeps a conversation from being one training row, or None if nothing does.

    A row is an optional system message followed by one user message: several turns or a reply
    inside the input would have to be joined by a rule that the deployed prompt does not have.

    Args:
        messages: The messages of one point.

    Returns:
        The reason in words, or None.
    """
    roles = [message.role for message in messages]
    if roles not in (["user"], ["system", "user"]):
        return (
            "must be an optional system message and then one user message, it has "
            f"{', '.join(roles[:8]) or 'no message'}{', ...' if len(roles) > 8 else ''}"
        )
    if not messages[-1].content.strip():
        return "has an empty user message"
    if not all(is_encodable(message.content) for message in messages):
        return "holds half of a surrogate pair, which is no character and cannot be encoded"
    return None


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
        value = _try_literal(text)
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
