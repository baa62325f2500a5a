"""Phrases of a catalogue: sentences with slots, alternatives and parts that are left out at times.

`{name}` is a slot for a parameter, `<kind>` a word that is only said, `[...]` a part that is left
out at times, `(a|b)` one of several wordings. What a slot's colon says is in data/README.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

_SLOT = re.compile(r"\{(\w+)(?::(!?)(\w[\w ]*))?\}")
_KIND = re.compile(r"<(\w+)>")
MOST_CHARACTERS = 2000
"""Of a phrase, and of whatever a catalogue puts into a plan as one argument."""


@dataclass(frozen=True)
class Slot:
    """A parameter's place in a phrase."""

    name: str
    manner: str = ""
    """`literal`, `said`, a kind of value, or a kind of result; empty where all is possible."""
    silent: bool = False
    """Fills the parameter and says nothing."""


@dataclass(frozen=True)
class Kind:
    """A word of a kind that is said and passed to no call."""

    name: str


@dataclass(frozen=True)
class Either:
    """One of several wordings."""

    wordings: tuple[Phrase, ...]


@dataclass(frozen=True)
class Maybe:
    """A part that is left out at times."""

    part: Phrase


Phrase = tuple["str | Slot | Kind | Either | Maybe", ...]


@cache
def parse_phrase(text: str) -> Phrase:
    """Take a phrase, a mention, or an entry of words.yaml apart.

    Raises:
        ValueError: Brackets or braces are wrong; the message says how.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"has more than {MOST_CHARACTERS:,} characters")
    try:
        phrase, end = _parse(text, 0, "")
    except RecursionError as error:
        raise ValueError("has brackets within brackets without end") from error
    assert end == len(text)
    return phrase


def blanks(phrase: Phrase) -> Iterator[Slot | Kind]:
    """Go through what a phrase leaves to fill in, in all alternatives."""
    for part in phrase:
        if isinstance(part, Slot | Kind):
            yield part
        elif isinstance(part, Maybe):
            yield from blanks(part.part)
        elif isinstance(part, Either):
            for wording in part.wordings:
                yield from blanks(wording)


def always(phrase: Phrase) -> set[str]:
    """Name the slots that stand in every form of a phrase."""
    names: set[str] = set()
    for part in phrase:
        if isinstance(part, Slot):
            names.add(part.name)
        elif isinstance(part, Either):
            names |= set.intersection(*(always(wording) for wording in part.wordings))
    return names


def most(phrase: Phrase) -> Counter[str]:
    """Count how often each slot stands in one form of a phrase, at most."""
    counts: Counter[str] = Counter()
    for part in phrase:
        if isinstance(part, Slot):
            counts[part.name] += 1
        elif isinstance(part, Maybe):
            counts += most(part.part)
        elif isinstance(part, Either):
            highest: Counter[str] = Counter()
            for wording in part.wordings:
                highest |= most(wording)
            counts += highest
    return counts


def says_nothing(phrase: Phrase) -> bool:
    """Tell whether nothing is left of a phrase in its shortest form."""
    return not any(
        part.strip()
        if isinstance(part, str)
        else not any(map(says_nothing, part.wordings))
        if isinstance(part, Either)
        else isinstance(part, Kind) or (isinstance(part, Slot) and not part.silent)
        for part in phrase
    )


def _parse(text: str, at: int, closes: str) -> tuple[Phrase, int]:
    """Parse up to one of the characters `closes`, or to the end if that is empty."""
    parts: list[str | Slot | Kind | Either | Maybe] = []
    plain = ""

    def add(part: Slot | Kind | Either | Maybe) -> None:
        nonlocal plain
        if plain:
            parts.append(plain)
        parts.append(part)
        plain = ""

    while at < len(text) and text[at] not in (closes or "]"):
        character = text[at]
        if character == "{":
            slot = _SLOT.match(text, at)
            if slot is None:
                raise ValueError("has a brace that is no {slot} and no {slot:literal}")
            add(Slot(slot[1], slot[3] or "", bool(slot[2])))
            at = slot.end()
        elif character == "<" and (kind := _KIND.match(text, at)):
            add(Kind(kind[1]))
            at = kind.end()
        elif character == "[":
            part, at = _parse(text, at + 1, "]")
            add(Maybe(part))
            at += 1
        elif character == "(" and _has_choice(text, at):
            wordings = []
            while text[at] != ")":
                wording, at = _parse(text, at + 1, "|)")
                wordings.append(wording)
            add(Either(tuple(wordings)))
            at += 1
        else:
            if character == "}":
                raise ValueError("has a brace that is no {slot} and no {slot:literal}")
            if character == "]":
                raise ValueError("has unbalanced brackets")
            plain += character
            at += 1
    if (at == len(text)) != (closes == ""):
        raise ValueError("has unbalanced brackets")
    if plain:
        parts.append(plain)
    return tuple(parts), at


def _has_choice(text: str, at: int) -> bool:
    """Tell whether the parenthesis at a place holds alternatives; others are plain text."""
    depth = 0
    for place in range(at, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return False
        if depth == 1 and text[place] == "|":
            return ")" in text[place:]
    return False
