"""Seeded values for generated queries: each is a pair of the wording and the argument it means."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path


@dataclass(frozen=True)
class Value:
    """One value as the user words it and as the plan passes it."""

    text: str
    argument: object


@cache
def _word_lists() -> dict[str, list[str]]:
    """Read words.yaml, which lies beside this module."""
    import yaml

    path = Path(__file__).with_name("words.yaml")
    lists: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lists


_PATTERNS = {
    "event": "{subjects} {events}",
    "file": "{subjects} {file_nouns}.pdf",
    "path": "/docs/{subjects}{file_nouns}.pdf",
    "note": "{subjects} {note_nouns}",
    "folder": "{folders}",
    "chore": "{chores}",
}
"""Kinds that are words of these lists."""


def _written(pattern: str, rng: random.Random) -> str:
    """Replace each `{list}` by a word of that list, from left to right."""
    return re.sub(r"\{(\w+)\}", lambda match: rng.choice(_word_lists()[match[1]]), pattern)


def _person(rng: random.Random) -> str:
    name = _written("{first_names}", rng)
    return f"{name} {_written('{last_names}', rng)}" if rng.random() < 0.15 else name


def _place(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return _written("{places}", rng)
    street_and_city = _written("{streets}, {cities}", rng)
    return f"{rng.randrange(1, 100)} {street_and_city}"


def _remark(rng: random.Random) -> Value:
    remark = _written("{remarks}", rng)
    return Value(f'"{remark}"', remark)


def _start(rng: random.Random) -> Value:
    moment = datetime(2024, 1, 1) + timedelta(days=rng.randrange(730), hours=rng.randrange(8, 20))
    return Value(f"on {moment:%Y-%m-%d} at {moment:%H:%M}", f"{moment:%Y-%m-%d %H:%M:%S}")


def _minutes(rng: random.Random) -> Value:
    minutes = rng.choice((15, 30, 45, 90))
    return Value(f"{minutes}-minute", minutes)


def _number(rng: random.Random) -> Value:
    number = rng.randrange(1, 100)
    return Value(str(number), number)


_TRANSPORTS = (Value("by car", "d"), Value("on foot", "w"), Value("by public transport", "r"))
_PRIORITIES = (Value("high-priority", 1), Value("urgent", 1))

BUILT_IN_VALUES: Mapping[str, Callable[[random.Random], str | Value]] = {
    **{kind: partial(_written, pattern) for kind, pattern in _PATTERNS.items()},
    "person": _person,
    "email": lambda rng: _written("{first_names}@{domains}", rng).lower(),
    "phone": lambda rng: f"555-{rng.randrange(10_000):04d}",
    "subject": lambda rng: f"the {_written(_PATTERNS['event'], rng).lower()}",
    "place": _place,
    "remark": _remark,
    "start": _start,
    "minutes": _minutes,
    "transport": lambda rng: rng.choice(_TRANSPORTS),
    "priority": lambda rng: rng.choice(_PRIORITIES),
    "number": _number,
}
"""Kinds of value that every catalogue can name; a text is worded and passed in the same way."""

INTEGER_KINDS = frozenset({"minutes", "priority", "number"})
"""Kinds whose argument is a whole number; all others give texts."""

REUSABLE_KINDS = frozenset({"person", "file", "note"})
"""Kinds that a query mentions again at times, so that calls share a result."""


def draw(kind: str, own_words: Mapping[str, Sequence[str | int]], rng: random.Random) -> Value:
    """Draw one value of a kind: a word of the catalogue's own list, or a built-in value."""
    if kind in own_words:
        word = rng.choice(own_words[kind])
        return Value(str(word), word)
    value = BUILT_IN_VALUES[kind](rng)
    return value if isinstance(value, Value) else Value(value, value)


def one_hour_after(argument: object) -> str:
    """Give the time one hour after 'YYYY-MM-DD HH:MM:SS' in the same form."""
    start = datetime.strptime(str(argument), "%Y-%m-%d %H:%M:%S")
    return f"{start + timedelta(hours=1):%Y-%m-%d %H:%M:%S}"
