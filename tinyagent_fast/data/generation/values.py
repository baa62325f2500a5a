"""Seeded values for generated queries: each is a pair of the wording and the argument it means."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

from tinyagent_fast.data.generation.phrases import Either, Kind, Maybe, Phrase, parse_phrase

MOMENT = "%Y-%m-%d %H:%M:%S"
"""How plans write a time."""

_STICKY = frozenset({"occasion", "field", "paper"})
"""Lists of which a request tends to name the same word again, as it is about one thing."""
_STICKS = 0.4


@dataclass(frozen=True)
class Value:
    """One value as the user words it and as the plan passes it."""

    text: str
    argument: object
    until: object = None
    """When what starts then ends, if that is said."""


@cache
def _word_lists() -> dict[str, list[tuple[Phrase, Phrase | None]]]:
    """Read words.yaml, which lies beside this module: what is said, and what it means."""
    import yaml

    path = Path(__file__).with_name("words.yaml")
    lists: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    parsed = {}
    for name, entries in lists.items():
        pairs = (entry.partition(" => ") for entry in entries)
        parsed[name] = [
            (parse_phrase(said), parse_phrase(means) if means else None) for said, _, means in pairs
        ]
    return parsed


@dataclass
class Values:
    """Draws the values of one request."""

    rng: random.Random
    own_words: Mapping[str, Sequence[str | int]]
    """Lists of the catalogue."""
    now: datetime
    """When the request is made; what is said of a day counts from it."""
    _stuck: dict[str, Value] = field(default_factory=dict)

    def draw(self, kind: str) -> Value:
        """Draw one value of a kind: a word of the catalogue's own list, or a built-in value."""
        if kind in self.own_words:
            word = self.rng.choice(self.own_words[kind])
            return Value(str(word), word)
        if kind in _MADE:
            value = _MADE[kind](self)
            return value if isinstance(value, Value) else Value(value, value)
        return self._from_list(kind)

    def _write(self, phrase: Phrase, said: dict[str, Value]) -> str:
        """Write out a phrase without slots; `said` has what its kinds were written as before."""
        text = ""
        for part in phrase:
            if isinstance(part, str):
                text += part
            elif isinstance(part, Kind):
                kind = part.name.lower()
                value = said.get(kind) or self.draw(kind)
                said[kind] = value
                text += value.text if kind == part.name else title_case(value.text)
            elif isinstance(part, Either):
                text += self._write(self.rng.choice(part.wordings), said)
            elif isinstance(part, Maybe) and self.rng.random() < 0.5:
                text += self._write(part.part, said)
        return text

    def unsaid(self, kind: str) -> object:
        """Give the argument of a kind when nothing is said of it: tomorrow, for a time."""
        tomorrow = self.now.date() + timedelta(days=1)
        if kind == "start":
            return f"{tomorrow} 09:00:00"
        return str(tomorrow) if kind == "due" else self.draw(kind).argument

    def _from_list(self, name: str) -> Value:
        stuck = self._stuck.get(name) if name in _STICKY else None
        if stuck is not None and self.rng.random() < _STICKS:
            return stuck
        said, means = self.rng.choice(_word_lists()[name])
        chosen: dict[str, Value] = {}
        text = self._write(said, chosen)
        value = Value(text, text if means is None else self._write(means, chosen))
        if name in _STICKY:
            self._stuck[name] = value
        return value


def title_case(text: str) -> str:
    """Write a name with capitals, except for small words."""
    small = {"the", "a", "of", "for", "to", "on", "and", "my", "in"}
    words = text.split(" ")
    return " ".join(
        word if at and word in small else word[:1].upper() + word[1:]
        for at, word in enumerate(words)
    )


def _word(values: Values, name: str) -> str:
    return values.draw(name).text


def _person(values: Values) -> str | Value:
    chance = values.rng.random()
    if chance < 0.08:
        return _word(values, "relations")
    name = _word(values, "first_names")
    if chance < 0.18:
        name = f"{name} {_word(values, 'last_names')}"
    return Value(f'"{name}"', name) if chance > 0.93 else name


def _email(values: Values) -> str:
    first, last = _word(values, "first_names"), _word(values, "last_names")
    form = values.rng.choice(("{0}.{1}", "{0}.{1}", "{0}{1}", "{0}", "{0}_{1}"))
    local = form.format(first, last)
    address = f"{local}@{_word(values, 'domains')}"
    return address if values.rng.random() < 0.5 else address.lower()


def _phone(values: Values) -> str:
    number = f"{values.rng.randrange(10_000):04d}"
    area = values.rng.randrange(100, 1000)
    form = values.rng.choice(("555-{1}", "555-{1}", "{0}-555-{1}", "+1{0}555{1}", "{0} 555 {1}"))
    return form.format(area, number)


def _file(values: Values) -> str:
    words = title_case(_word(values, "filewords"))
    between = values.rng.choice((" ", "", "_", "", " "))
    return f"{words.replace(' ', between)}.{_word(values, 'ending')}"


def _document(values: Values) -> Value:
    chance = values.rng.random()
    if chance < 0.4:
        text = _word(values, "pages")
        return Value(text, text.removeprefix("the "))
    name = _file(values)
    if chance < 0.5:
        name = name.partition(".")[0]
        return Value(f'the file "{name}"', name)
    forms = [
        '"{}"',
        '"{}"',
        'the file "{}"',
        'the document "{}"',
        'the "{}" file',
        'the "{}"',
        "{}",
    ]
    forms += ['the "{}" document', 'the attached "{}"', 'the file named "{}"']
    if name.endswith(".pdf"):
        forms += ['the PDF file "{}"', 'the PDF "{}"', 'the attached PDF "{}"']
    return Value(values.rng.choice(forms).format(name), name)


def _place(values: Values) -> Value:
    chance = values.rng.random()
    if chance < 0.35:
        text = _word(values, "spots")
    elif chance < 0.5:
        text = f"{values.rng.randrange(1, 300)} {_word(values, 'streets')}"
        if values.rng.random() < 0.3:
            text = f"{text}, {_word(values, 'cities')}"
    else:
        text = _word(values, "landmark")
    quoted = chance >= 0.35 and values.rng.random() < 0.7
    return Value(f'"{text}"' if quoted else text, text)


def _origin(values: Values) -> Value:
    text = _word(values, "base")
    return Value(text, text.strip('"'))


_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _day(values: Values) -> tuple[str, datetime]:
    """Draw a day after now, and how it is said."""
    rng, midnight = values.rng, values.now.replace(hour=0, minute=0)

    def later(days: int) -> datetime:
        return midnight + timedelta(days=days)

    chance = rng.random()
    if chance < 0.3:
        return "tomorrow", later(1)
    if chance < 0.72:
        weekday = rng.randrange(7)
        words = ("next {}", "next {}", "next {}", "on {}", "on {}", "this {}", "on next {}")
        # The first such day after today, whatever the word before it is.
        days = (weekday - midnight.weekday() - 1) % 7 + 1
        return rng.choice(words).format(_WEEKDAYS[weekday]), later(days)
    if chance < 0.78:
        return rng.choice((("next week", later(7)), ("the day after tomorrow", later(2))))
    if chance < 0.84:
        days = rng.randrange(2, 11)
        return f"in {days} days", later(days)
    if chance < 0.88:
        return "today", midnight
    day = later(rng.randrange(1, 300))
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(
        day.day % 10 if day.day not in (11, 12, 13) else 0, "th"
    )
    form = rng.choice(("on {m} {d}", "on {m} {d}{s}", "on the {d}{s} of {m}", "on {i}"))
    return form.format(m=f"{day:%B}", d=day.day, s=suffix, i=f"{day:%Y-%m-%d}"), day


def _clock(values: Values, minutes: int) -> str:
    """Say a time of day."""
    hour, minute = divmod(minutes % 1440, 60)
    half, twelve = "AM" if hour < 12 else "PM", (hour - 1) % 12 + 1
    forms = [f"{twelve}:{minute:02d} {half}"] * 6 + [f"{hour:02d}:{minute:02d}"]
    if minute:
        forms += [f"{twelve}:{minute:02d}{half.lower()}"]
    else:
        forms += [f"{twelve} {half}"] * 3 + [f"{twelve}{half.lower()}"] * 2
        forms += ["noon"] if hour == 12 else []
    return values.rng.choice(forms)


def _minutes_of_day(rng: random.Random) -> int:
    return rng.randrange(8, 21) * 60 + rng.choice((0, 0, 0, 0, 0, 30, 15))


def _start(values: Values) -> Value:
    rng = values.rng
    said, day = _day(values)
    begins = _minutes_of_day(rng)
    if said == "today":
        # So that it is still to come.
        begins = min(max(begins, values.now.hour * 60 + 60), 1380)
    start = day + timedelta(minutes=begins)
    chance = rng.random()
    if chance < 0.12 and said != "today":
        return Value(said, f"{day + timedelta(hours=9):{MOMENT}}")
    if chance < 0.17:
        named = {"in the morning": 9, "in the afternoon": 15, "in the evening": 19}
        word, hour = rng.choice(list(named.items()))
        if said not in ("today", "tomorrow"):
            return Value(f"{said} {word}", f"{day + timedelta(hours=hour):{MOMENT}}")
    if chance < 0.37:
        ends = begins + rng.choice((30, 60, 60, 90, 120, 120, 180))
        times = f"from {_clock(values, begins)} to {_clock(values, ends)}"
        text = f"{times} {said}" if rng.random() < 0.2 else f"{said} {times}"
        return Value(text, f"{start:{MOMENT}}", f"{day + timedelta(minutes=ends):{MOMENT}}")
    time = f"at {_clock(values, begins)}"
    text = f"{time} {said}" if rng.random() < 0.15 else f"{said} {time}"
    text = f"for {text}" if rng.random() < 0.3 and text.startswith(("next", "tomorrow")) else text
    return Value(text, f"{start:{MOMENT}}")


def _due(values: Values) -> Value:
    rng = values.rng
    chance = rng.random()
    if chance < 0.06:
        minutes = rng.choice((10, 20, 30, 60, 120))
        word = f"in {minutes} minutes" if minutes < 60 else f"in {minutes // 60} hours"
        word = "in an hour" if minutes == 60 else word
        return Value(word, f"{values.now + timedelta(minutes=minutes):{MOMENT}}")
    if chance < 0.6:
        said, day = _day(values)
        argument = f"{day:%Y-%m-%d}"
    else:
        start = _start(values)
        if start.until is not None:
            return _due(values)
        said, argument = start.text.removeprefix("for "), str(start.argument)
    if said.startswith(("tomorrow", "next", "today")) and rng.random() < 0.5:
        said = f"{rng.choice(('by', 'by', 'for', 'due'))} {said}"
    elif said.startswith("on ") and rng.random() < 0.3:
        said = f"by {said.removeprefix('on ')}"
    return Value(said, argument)


def _minutes(values: Values) -> Value:
    minutes = values.rng.choice((15, 30, 45, 90))
    return Value(f"{minutes}-minute", minutes)


def _duration(values: Values) -> Value:
    minutes = values.rng.choice((15, 30, 30, 45, 60, 60, 90, 120))
    said = {60: ("1 hour", "60 minutes", "one hour"), 120: ("2 hours", "120 minutes")}
    return Value(values.rng.choice(said.get(minutes, (f"{minutes} minutes",))), minutes)


def _whole(kind: str) -> Callable[[Values], Value]:
    def draw(values: Values) -> Value:
        value = values._from_list(kind)
        return Value(value.text, int(str(value.argument)))

    return draw


def _number(values: Values) -> Value:
    number = values.rng.randrange(1, 100)
    return Value(str(number), number)


_MADE: Mapping[str, Callable[[Values], str | Value]] = {
    "person": _person,
    "email": _email,
    "phone": _phone,
    "file": _file,
    "path": lambda values: f"/docs/{_file(values).replace(' ', '')}",
    "document": _document,
    "place": _place,
    "origin": _origin,
    "start": _start,
    "due": _due,
    "minutes": _minutes,
    "duration": _duration,
    "priority": _whole("priority"),
    "stressed": _whole("stressed"),
    "number": _number,
}

BUILT_IN_VALUES = frozenset(_MADE) | {
    *("event", "titled", "gathering", "about", "topic", "subject", "heading", "note", "folder"),
    *("content", "addition", "chore", "reminded", "remark", "message", "notice", "reminding"),
    *("answer", "covering", "transport", "mode", "details", "occasion", "them"),
}
"""Kinds of value that every catalogue can name."""

INTEGER_KINDS = frozenset({"minutes", "duration", "priority", "stressed", "number"})
"""Kinds whose argument is a whole number; all others give texts."""

REUSABLE_KINDS: Mapping[str, Sequence[Sequence[str]]] = {
    "person": (("him", "her"), ("them", "them", "both of them"), ("them",)),
    "document": (("it", "the file", "the document", "that file"), (), ()),
    "file": ((), (), ()),
    "note": ((), (), ()),
    "place": ((), (), ()),
}
"""Kinds that a query mentions again at times, so that calls share a result, and the words that then
may stand for one, two and more of them."""


def one_hour_after(argument: object) -> str:
    """Give the time one hour after 'YYYY-MM-DD HH:MM:SS' in the same form."""
    start = datetime.strptime(str(argument), MOMENT)
    return f"{start + timedelta(hours=1):{MOMENT}}"


def is_whole_day(argument: object) -> bool:
    """Tell whether a due date has no time."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d", str(argument)) is not None
