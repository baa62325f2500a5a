"""Text into HTML, so that no text of a model or a dataset ever becomes markup.

Only this module makes `Markup` out of a plain string; the type checker refuses a plain string
wherever markup is wanted, so nothing can be written into a page unescaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import NewType

Markup = NewType("Markup", str)
"""A piece of HTML that is safe to put between two tags."""

NOTHING = Markup("")

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)
_VOID = frozenset({"meta", "br"})
_TAG = re.compile(r"[a-zA-Z][a-zA-Z0-9]*")


def printable(value: object) -> str:
    """Replace characters that a page or a UTF-8 file cannot hold or that hide or turn text round.

    Args:
        value: Any value; its `str` is taken.

    Returns:
        The text with U+FFFD for control characters, lone surrogates and direction overrides.
    """
    return _UNPRINTABLE.sub("\ufffd", str(value))


def text(value: object) -> Markup:
    """Escape a text.

    Args:
        value: Any value; its `str` is taken.

    Returns:
        Markup that shows exactly this text, but for what `printable` replaces.
    """
    return Markup(html.escape(printable(value), quote=True))


def joined(parts: Iterable[Markup], separator: Markup = NOTHING) -> Markup:
    """Put pieces of markup one after the other.

    Args:
        parts: The pieces.
        separator: What stands between them.

    Returns:
        One piece.
    """
    return Markup(separator.join(parts))


def element(name: str, /, *children: Markup, **attributes: object) -> Markup:
    """Write an element.

    Args:
        name: Of the tag.
        children: What stands inside.
        attributes: By name; a trailing underscore is dropped and others become hyphens, so
            `class_` and `stroke_width` can be written. None leaves an attribute out.

    Returns:
        The element.
    """
    assert _TAG.fullmatch(name), name
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{''.join(children)}</{name}>")


def _attribute(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def table(head: Iterable[str], rows: Iterable[Iterable[Markup]], marked: int = 0) -> Markup:
    """Write a table that scrolls by itself where the screen is narrow.

    Args:
        head: Titles of the columns.
        rows: Contents of the cells by row.
        marked: So many first rows stand out.

    Returns:
        The table.
    """
    titles = joined(element("th", text(title), scope="col") for title in head)
    body = (
        element(
            "tr",
            *(element("td", content) for content in row),
            class_="marked" if index < marked else None,
        )
        for index, row in enumerate(rows)
    )
    whole = element("table", element("thead", element("tr", titles)), element("tbody", *body))
    return element("div", whole, class_="scroll")
