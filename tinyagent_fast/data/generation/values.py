"""Seeded values for generated queries: each is a pair of the wording and the argument it means."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Value:
    """One value as the user words it and as the plan passes it."""

    text: str
    argument: object


_FIRST_NAMES = ["Anna", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Liam", "Mona", "Nora", "Omar", "Paula", "Quinn", "Rosa", "Sami", "Tara", "Umar", "Vera", "Willem", "Xenia", "Yusuf", "Zoe", "Amir", "Bea", "Cleo", "Dario", "Emil", "Freya", "Gino", "Hana"]
_LAST_NAMES = ["Adler", "Brandt", "Costa", "Dahl", "Evans", "Fischer", "Gomez", "Haas", "Ito", "Jensen", "Keller", "Lopez"]
_SUBJECTS = ["Budget", "Design", "Garden", "Harbor", "Launch", "Marketing", "Museum", "Nursery", "Orchard", "Product", "Quarterly", "River", "Safety", "School", "Sprint", "Summer", "Team", "Travel", "Village", "Winter"]
_EVENTS = (
    ["Review", "Meeting", "Workshop", "Dinner", "Rehearsal", "Kickoff", "Retrospective", "Picnic", "Training", "Call"]
)
_FILE_NOUNS = ["Report", "Plan", "Summary", "Budget", "Agenda", "Invoice", "Contract", "Brochure", "Schedule", "Notes"]
_NOTE_NOUNS = (
    ["Ideas", "Checklist", "Minutes", "Questions", "Shopping", "Packing", "Draft", "Goals", "Recipes", "Journal"]
)
_FOLDERS = ["Work", "Private", "Travel", "Projects", "Archive", "Family"]
_STREETS = ["Station Street", "Old Mill Road", "Harbor Square", "Lake View", "North Bridge", "Market Place"]
_CITIES = ["Bergen", "Cork", "Delft", "Ghent", "Lyon", "Malmo", "Porto", "Turin"]
_PLACES = ["the airport", "the central station", "the town hall", "City Park", "the public library"]
_CHORES = ["water the plants", "call the dentist", "pay the rent", "renew my passport", "return the books", "book the tickets", "send the invoice", "clean the kitchen", "charge the camera", "order new filters"]
_REMARKS = ["I will be ten minutes late", "thanks for the quick answer", "please have a look", "see you on Monday", "the room has changed", "bring your own laptop", "everything is ready", "I agree with the proposal", "we start without you", "the numbers are final", "call me when you are free", "sounds good to me"]
_DOMAINS = ["example.com", "example.org", "mail.example"]


def _event_name(rng: random.Random) -> str:
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_EVENTS)}"


def _person(rng: random.Random) -> Value:
    name = rng.choice(_FIRST_NAMES)
    if rng.random() < 0.3:
        name = f"{name} {rng.choice(_LAST_NAMES)}"
    return Value(name, name)


def _email(rng: random.Random) -> Value:
    address = f"{rng.choice(_FIRST_NAMES).lower()}@{rng.choice(_DOMAINS)}"
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
    path = f"/docs/{rng.choice(_SUBJECTS)}{rng.choice(_FILE_NOUNS)}.pdf"
    return Value(path, path)


def _remark(rng: random.Random) -> Value:
    remark = rng.choice(_REMARKS)
    return Value(f'"{remark}"', remark)


def _place(rng: random.Random) -> Value:
    if rng.random() < 0.5:
        place = rng.choice(_PLACES)
    else:
        place = f"{rng.randrange(1, 100)} {rng.choice(_STREETS)}, {rng.choice(_CITIES)}"
    return Value(place, place)


def _start(rng: random.Random) -> Value:
    day = datetime(2024, 1, 1) + timedelta(days=rng.randrange(730), hours=rng.randrange(8, 20))
    if rng.random() < 0.5:
        text = f"on {day:%Y-%m-%d} at {day:%H:%M}"
    else:
        text = f"on {day:%B} {day.day} {day.year} at {day.hour % 12 or 12} {day:%p}"
    return Value(text, f"{day:%Y-%m-%d %H:%M:%S}")


def _minutes(rng: random.Random) -> Value:
    minutes = rng.choice((15, 30, 45, 90))
    return Value(f"{minutes}-minute", minutes)


def _transport(rng: random.Random) -> Value:
    return rng.choice(
        (Value("by car", "d"), Value("on foot", "w"), Value("by public transport", "r"))
    )


def _priority(rng: random.Random) -> Value:
    return rng.choice((Value("high-priority", 1), Value("urgent", 1)))


BUILT_IN_VALUES: Mapping[str, Callable[[random.Random], Value]] = {
    "person": _person,
    "email": _email,
    "phone": _phone,
    "event": _plain(_event_name),
    "subject": _plain(lambda rng: f"the {_event_name(rng).lower()}"),
    "file": _plain(lambda rng: f"{rng.choice(_SUBJECTS)} {rng.choice(_FILE_NOUNS)}.pdf"),
    "path": _path,
    "note": _plain(lambda rng: f"{rng.choice(_SUBJECTS)} {rng.choice(_NOTE_NOUNS)}"),
    "folder": _plain(lambda rng: rng.choice(_FOLDERS)),
    "place": _place,
    "chore": _plain(lambda rng: rng.choice(_CHORES)),
    "remark": _remark,
    "start": _start,
    "minutes": _minutes,
    "transport": _transport,
    "priority": _priority,
    "number": lambda rng: (lambda n: Value(str(n), n))(rng.randrange(1, 100)),
}
"""Kinds of value that every catalogue can name; a catalogue adds its own word lists to them."""

REUSABLE_KINDS = frozenset({"person", "file", "note"})
"""Kinds that a query mentions again at times, so that calls share a result."""


def draw(kind: str, own_words: Mapping[str, Sequence[str]], rng: random.Random) -> Value:
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
        return Value(word, word)
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
