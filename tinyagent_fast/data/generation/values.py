"""Seeded values for generated queries: each is a pair of the wording and the argument it means."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Value:
    """One value as the user words it and as the plan passes it."""

    text: str
    argument: object


@cache
def _words(kind: str) -> list[str]:
    """Read one of the lists of words.yaml, which lies beside this module."""
    import yaml

    path = Path(__file__).with_name("words.yaml")
    lists: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return lists[kind]


def _event_name(rng: random.Random) -> str:
    return f"{rng.choice(_words('subjects'))} {rng.choice(_words('events'))}"


def _person(rng: random.Random) -> Value:
    name = rng.choice(_words("first_names"))
    if rng.random() < 0.15:
        name = f"{name} {rng.choice(_words('last_names'))}"
    return Value(name, name)


def _email(rng: random.Random) -> Value:
    address = f"{rng.choice(_words('first_names')).lower()}@{rng.choice(_words('domains'))}"
    return Value(address, address)


def _phone(rng: random.Random) -> Value:
    number = f"555-{rng.randrange(10_000):04d}"
    return Value(number, number)


def _plain(make: Callable[[random.Random], str]) -> Callable[[random.Random], Value]:
    def build(rng: random.Random) -> Value:
        text = make(rng)
        return Value(text, text)

    return build


def _path(rng: random.Random) -> Value:
    path = f"/docs/{rng.choice(_words('subjects'))}{rng.choice(_words('file_nouns'))}.pdf"
    return Value(path, path)


def _remark(rng: random.Random) -> Value:
    remark = rng.choice(_words("remarks"))
    return Value(f'"{remark}"', remark)


def _place(rng: random.Random) -> Value:
    if rng.random() < 0.7:
        place = rng.choice(_words("places"))
    else:
        street, city = rng.choice(_words("streets")), rng.choice(_words("cities"))
        place = f"{rng.randrange(1, 100)} {street}, {city}"
    return Value(place, place)


def _start(rng: random.Random) -> Value:
    moment = datetime(2024, 1, 1) + timedelta(days=rng.randrange(730), hours=rng.randrange(8, 20))
    return Value(f"on {moment:%Y-%m-%d} at {moment:%H:%M}", f"{moment:%Y-%m-%d %H:%M:%S}")


def _minutes(rng: random.Random) -> Value:
    minutes = rng.choice((15, 30, 45, 90))
    return Value(f"{minutes}-minute", minutes)


def _transport(rng: random.Random) -> Value:
    return rng.choice(
        (Value("by car", "d"), Value("on foot", "w"), Value("by public transport", "r"))
    )


def _priority(rng: random.Random) -> Value:
    return rng.choice((Value("high-priority", 1), Value("urgent", 1)))


def _number(rng: random.Random) -> Value:
    number = rng.randrange(1, 100)
    return Value(str(number), number)


BUILT_IN_VALUES: Mapping[str, Callable[[random.Random], Value]] = {
    "person": _person,
    "email": _email,
    "phone": _phone,
    "event": _plain(_event_name),
    "subject": _plain(lambda rng: f"the {_event_name(rng).lower()}"),
    "file": _plain(
        lambda rng: f"{rng.choice(_words('subjects'))} {rng.choice(_words('file_nouns'))}.pdf"
    ),
    "path": _path,
    "note": _plain(
        lambda rng: f"{rng.choice(_words('subjects'))} {rng.choice(_words('note_nouns'))}"
    ),
    "folder": _plain(lambda rng: rng.choice(_words("folders"))),
    "place": _place,
    "chore": _plain(lambda rng: rng.choice(_words("chores"))),
    "remark": _remark,
    "start": _start,
    "minutes": _minutes,
    "transport": _transport,
    "priority": _priority,
    "number": _number,
}
"""Kinds of value that every catalogue can name; a catalogue adds its own word lists to them."""

INTEGER_KINDS = frozenset({"minutes", "priority", "number"})
"""Kinds whose argument is a whole number; all others give texts."""

REUSABLE_KINDS = frozenset({"person", "file", "note"})
"""Kinds that a query mentions again at times, so that calls share a result."""


def draw(kind: str, own_words: Mapping[str, Sequence[str | int]], rng: random.Random) -> Value:
    """Draw one value of a kind, so that a query says one thing and the plan passes it.

    Args:
        kind: A name in `own_words` or in `BUILT_IN_VALUES`.
        own_words: The catalogue's own word lists.
        rng: Source of randomness.

    Returns:
        The value's wording and its argument.
    """
    if kind in own_words:
        word = rng.choice(own_words[kind])
        return Value(str(word), word)
    return BUILT_IN_VALUES[kind](rng)


def one_hour_after(argument: object) -> str:
    """Give the default end of an event that starts at `argument`.

    Args:
        argument: 'YYYY-MM-DD HH:MM:SS'.

    Returns:
        The time one hour later in the same form.
    """
    start = datetime.strptime(str(argument), "%Y-%m-%d %H:%M:%S")
    return f"{start + timedelta(hours=1):%Y-%m-%d %H:%M:%S}"
