"""Reads the messages of a point from the forms that data files use: repr, JSON or plain text.

First stage of the data flow, beside `schema`: `reading` calls `parse_messages` for each point and
`conversation_problem` for what came out.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import lru_cache
from typing import cast

from tinyagent_fast.data.schema import (
    JSON_NAMES,
    Message,
    Role,
    is_encodable,
    short_text,
    try_literal,
)

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_ROLES["human"] = "user"
_LIST_START = re.compile(r"\s*\[\s*\{")
_JSON_LIST_START = re.compile(r'\s*\[\s*\{\s*"')
_BLOCK_CHARS = 2048
# A quote, unless exactly one backslash is before it: the rest is left to the general parser.
_NOT_SURELY_ESCAPED = {quote: re.compile(rf"{quote}(?<!(?<!\\)\\{quote})") for quote in ("'", '"')}
_BACKSLASH_BEFORE_NON_ASCII = re.compile(r"\\[^\x00-\x7f]")


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


def _decode_list(raw: str) -> object:
    """Decode a text that starts like a list of objects, as JSON or as a Python literal."""
    value: object = None
    if _JSON_LIST_START.match(raw):
        try:
            return cast(object, json.loads(raw))
        except (ValueError, RecursionError):
            pass  # A Python list may use double quotes too, so the literal parser decides.
    value = try_literal(raw.strip())
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
