"""Tools that touch nothing real: a desktop in an SQLite database, and a recorder for own tools.

A sandbox is made from a label, so that it holds what the label needs; afterwards its state is
compared with the one that the label leads to. Everything it gives depends on arguments only, so
the same calls in any order give the same state.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tinyagent_fast.agent.tools import RunnableTool, ToolError
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.plans.grammar import Plan, Step
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, Tool

FaultKind = Literal["failing", "slow", "renamed", "ambiguous", "unknown", "malformed"]
RECOVERABLE: tuple[FaultKind, ...] = ("failing", "slow", "renamed", "ambiguous", "malformed")
"""Faults that another plan can mend; `unknown` is one that none can."""

LOOKUPS = {"get_phone_number": "phone", "get_email_address": "email"}
"""Tools that look a contact up, with what each gives of it."""
READS = frozenset(
    {*LOOKUPS, "open_and_get_file_path", "summarize_pdf", "maps_open_location"}
    | {"maps_show_directions", "open_note"}
)
"""Tools that change nothing; one more of their calls than needed does no harm."""

_DELAYS_S = {
    "get_zoom_meeting_link": 0.8,
    "summarize_pdf": 2.0,
    "compose_new_email": 0.6,
    "reply_to_email": 0.6,
    "forward_email": 0.6,
    "send_sms": 0.4,
}
_DELAY_S = 0.2
_PEOPLE = {
    "compose_new_email": (0, 1),
    "reply_to_email": (0,),
    "forward_email": (0, 1),
    "create_calendar_event": (4,),
    "send_sms": (0,),
    "get_zoom_meeting_link": (3,),
}
"""Positions of lists of addresses or numbers, where labels have names at times."""
_FILES = {"compose_new_email": 4, "reply_to_email": 2, "forward_email": 3}
_SURNAMES = ("Berg", "Castro", "Dumont", "Eriksen", "Fontana", "Gruber", "Hoang", "Iyer")
_SCHEMA = """
create table contacts (name text, email text, phone text, favourite integer);
create table files (name text, path text, content text);
create table notes (folder text, name text, content text);
create table inbox (sender text, subject text, content text, selected integer);
create table mail (kind text, recipients text, cc text, subject text, content text,
                   attachments text, answers text);
create table events (title text, start text, "end" text, location text, invitees text, notes text,
                     calendar text);
create table reminders (name text, due text, notes text, list text, priority integer,
                        all_day integer);
create table messages (recipients text, content text);
create table meetings (topic text, start text, minutes integer, invitees text, link text);
create table seen (tool text, what text);
"""
_CHANGED = ("notes", "mail", "events", "reminders", "messages", "meetings")
_FREE_TEXT = {"content", "subject", "notes"}
"""Columns whose wording a planner chooses where the user leaves it open."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong in a sandbox; all but `malformed` are its tools' doing."""

    kind: FaultKind
    tool: str = ""
    """Whose first call fails or hangs."""
    name: str = ""
    """The contact that is listed under another name, twice, or not at all."""


@dataclass(frozen=True)
class State:
    """What calls have changed, and what they have looked up or shown."""

    changes: Mapping[str, Counter[tuple[tuple[str, str], ...]]]
    """Rows by table, each with its columns; texts without regard to case, ends and white space."""
    seen: frozenset[tuple[str, str]]

    def reaches(self, label: State, *, wording: bool = True) -> bool:
        """Say whether it is what a label leads to; having looked at more does no harm.

        Without `wording`, free texts are not compared, such as a mail's subject.
        """
        if not label.seen <= self.seen:
            return False
        if wording:
            return self.changes == label.changes
        return self._without_wording() == label._without_wording()

    def _without_wording(self) -> object:
        return {
            table: Counter(
                tuple(cell for cell in row if cell[0] not in _FREE_TEXT) for row in rows.elements()
            )
            for table, rows in self.changes.items()
        }


def sandbox_for(
    label: Plan | None,
    tools: Mapping[str, Tool] | None = None,
    *,
    path: Path | None = None,
    faults: Sequence[Fault] = (),
    time_scale: float = 0.0,
) -> Desktop | Recorder:
    """Make a sandbox that holds what a label needs: its contacts, files and notes.

    Args:
        label: The plan; without one, what is asked for is made up.
        tools: Tools by name; None stands for TinyAgent's own.
        path: As for `Desktop`, and so is the rest.
        faults: What goes wrong.
        time_scale: How fast time goes.

    Raises:
        ConfigError: A file is named for tools that need no database.
    """
    if tools is not None and not set(tools) <= set(TINYAGENT):
        if path is not None:
            why = "calls of a catalogue's own tools are only recorded, without a database"
            raise ConfigError(f"--sandbox {path}", why, "leave it out")
        return Recorder(tools, faults=faults, time_scale=time_scale)
    desktop = Desktop(path, faults=faults, time_scale=time_scale, obliging=label is None)
    for step in label.steps if label else ():
        desktop.furnish(step)
    return desktop


def choose_fault(label: Plan, rng: random.Random, kinds: Sequence[FaultKind]) -> Fault:
    """Choose a fault that strikes a label's plan, of one of some kinds where it can."""
    steps = [step for step in label.steps if step.tool != JOIN]
    names = [s.arguments[0] for s in steps if s.tool in LOOKUPS and s.arguments]
    kind = rng.choice(kinds)
    if kind in ("renamed", "ambiguous", "unknown"):
        if names:
            return Fault(kind=kind, name=str(rng.choice(names)))
        kind = "failing"
    if kind == "malformed" or not steps:
        return Fault(kind="malformed")
    return Fault(kind=kind, tool=rng.choice(steps).tool)


def malformed(plan: str, rng: random.Random) -> str:
    """Break one line of a plan, as small models do: the closing bracket of a call is missing."""
    lines = plan.split("\n")
    at = rng.randrange(max(1, len(lines) - 1))  # join comes last
    lines[at] = lines[at].rstrip().removesuffix(")")
    return "\n".join(lines)


class _Faults:
    """Lets the first call of a tool fail or hang; later ones are well."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.waiting = [fault for fault in faults if fault.tool]
        self.names = {fault.name: fault.kind for fault in faults if fault.name}

    async def strike(self, tool: str) -> None:
        """Let a call of a tool fail as the first fault that waits for it says."""
        for fault in self.waiting:
            if fault.tool == tool:
                self.waiting.remove(fault)
                if fault.kind == "slow":
                    await asyncio.sleep(3600)
                raise ToolError(f"{tool} is not available at the moment. Try again.")


def _number(*parts: object) -> int:
    """Draw a number that depends on nothing but the arguments."""
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _plain(text: object) -> str:
    return " ".join(str("" if text is None else text).casefold().split()).rstrip(".!")


def _texts(arguments: Sequence[object], at: int) -> list[str]:
    """Give the texts of an argument, whether it is one or a list of them."""
    if at >= len(arguments):
        return []
    value = arguments[at]
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _listed(values: Sequence[str]) -> str:
    return json.dumps(sorted(set(values)), ensure_ascii=False)


class Desktop:
    """Contacts, files, mail, calendar, notes, reminders, messages, maps and meetings in SQLite.

    It has the 16 tools of TinyAgent. Names where addresses or numbers are asked for are looked up,
    as the app does.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        faults: Sequence[Fault] = (),
        time_scale: float = 0.0,
        obliging: bool = False,
    ) -> None:
        """Open an empty desktop.

        Args:
            path: File for a new database, or None to keep it in memory.
            faults: What goes wrong.
            obliging: Make contacts, files and notes up when they are asked for.
            time_scale: Calls take this share of the time that such calls take on a desktop.
        """
        self.database = sqlite3.connect(path or ":memory:", isolation_level=None)
        self.database.executescript(_SCHEMA)
        self._faults = _Faults(faults)
        self._time_scale = time_scale
        self._obliging = obliging
        self._furnished: set[str] = set()
        self._add("inbox", "ana@example.org", "Next week", "Shall we meet next week?", 1)
        self.tools: Mapping[str, RunnableTool] = {
            name: RunnableTool(tool=tool, run=partial(self._call, name), changes=name not in READS)
            for name, tool in TINYAGENT.items()
        }

    # --- furnishing

    def furnish(self, step: Step) -> None:
        """Put in place what a call of a label needs."""
        for at in _PEOPLE.get(step.tool, ()):
            for person in _texts(step.arguments, at):
                if not any(c in "@$0123456789" for c in person):
                    self.add_contact(person)
        for file in _texts(step.arguments, _FILES.get(step.tool, len(step.arguments))):
            if "$" not in file:
                self.add_file(file)
        first = next(iter(_texts(step.arguments[:1], 0)), "$")
        if first.startswith("$"):
            return
        if step.tool in LOOKUPS:
            self.add_contact(first)
        elif step.tool in ("open_and_get_file_path", "summarize_pdf"):
            self.add_file(first)
        elif step.tool in ("open_note", "append_note_content"):
            folder = step.arguments[-1] if len(step.arguments) > 1 else ""
            self.add_note(first, f"What {first} says.", str(folder or ""))

    def add_contact(self, name: str) -> None:
        """Add a contact, with an address and a number that follow from the name."""
        if name.casefold() in self._furnished:
            return
        self._furnished.add(name.casefold())
        words = "".join(c if c.isalnum() else " " for c in name.casefold()).split() or ["contact"]
        email = f"{'.'.join(words)}@example.org"
        phone = f"555-{_number('phone', name) % 10_000_000:07d}"
        kind = self._faults.names.get(name)
        at = _number("surname", name) % len(_SURNAMES)
        whole = f"{name} {_SURNAMES[at]}"
        if kind == "unknown":
            return
        self._add("contacts", whole if kind else name, email, phone, int(kind == "ambiguous"))
        if kind == "ambiguous":
            other = f"{name} {_SURNAMES[at - 1]}"
            self._add("contacts", other, f"other.{email}", f"{phone[:-1]}x", 0)

    def add_file(self, name: str) -> None:
        """Add a file by its name or path."""
        path = name if name.startswith("/") else f"/docs/{name}"
        if not self._find("files", "path", path):
            self._add("files", name.rpartition("/")[2], path, f"What {name} is about.")

    def add_note(self, name: str, content: str, folder: str = "") -> None:
        """Add a note."""
        if not self._find("notes", "name", name):
            self._add("notes", folder, name, content)

    def _add(self, table: str, *values: object) -> None:
        marks = ", ".join("?" * len(values))
        self.database.execute(f"insert into {table} values ({marks})", values)

    def _find(self, table: str, column: str, value: str) -> dict[str, Any] | None:
        wanted = value.casefold().strip()
        return next((r for r in self.rows(table) if str(r[column]).casefold() == wanted), None)

    # --- inspecting

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Give a table's rows by column."""
        cursor = self.database.execute(f"select * from {table}")
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def state(self) -> State:
        """Give what the calls so far have led to."""
        changes = {
            table: Counter(
                tuple((name, _comparable(name, value)) for name, value in row.items())
                for row in self.rows(table)
            )
            for table in _CHANGED
        }
        seen = frozenset((row["tool"], row["what"]) for row in self.rows("seen"))
        return State(changes, seen)

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    # --- the tools

    async def _call(self, name: str, *arguments: Any) -> str:
        await self._faults.strike(name)
        if self._time_scale:
            await asyncio.sleep(_DELAYS_S.get(name, _DELAY_S) * self._time_scale)
        if self._obliging:
            self.furnish(Step(number=1, tool=name, arguments=arguments))
        # Nothing waits in what follows, so it happens whole or not at all.
        if name in LOOKUPS:
            found = str(self._contact(arguments[0])[LOOKUPS[name]])
            self._saw(name, found)
            return found
        done: Callable[..., str] = getattr(self, f"_{name}")
        return done(*arguments)

    def _saw(self, tool: str, what: str) -> None:
        self._add("seen", tool, what)

    def _contact(self, name: str) -> dict[str, Any]:
        """Find a contact by the whole name, or by its beginning where only one fits.

        Raises:
            ToolError: There is none, or several fit.
        """
        if (exact := self._find("contacts", "name", name)) is not None:
            return exact
        wanted = name.casefold().strip()
        near = [r for r in self.rows("contacts") if str(r["name"]).casefold().startswith(wanted)]
        if not near or not wanted:
            raise ToolError(f'there is no contact "{name}".')
        first = max(near, key=lambda row: int(row["favourite"]))
        if len(near) == 1:
            raise ToolError(f'there is no contact "{name}". Try again with "{first["name"]}".')
        others = ", ".join(f'"{row["name"]}"' for row in near if row is not first)
        raise ToolError(
            f'several contacts fit "{name}": "{first["name"]}", a favourite, and {others}. '
            "Try again with the favourite."
        )

    def _addresses(self, values: Sequence[str], column: str) -> list[str]:
        """Take addresses or numbers, whichever the column has; names are looked up."""

        def is_one(value: str) -> bool:
            if column == "phone" and "@" in value:
                raise ToolError(f'"{value}" is an e-mail address, not a phone number.')
            return "@" in value or (column == "phone" and any(c.isdigit() for c in value))

        given = [value for value in values if value.strip()]
        return [v if is_one(v) else str(self._contact(v)[column]) for v in given]

    def _paths(self, values: Sequence[str]) -> list[str]:
        for value in values:
            if not self._find("files", "path", value) and not value.startswith("/"):
                raise ToolError(f'there is no file at "{value}".')
        return list(values)

    def _open_and_get_file_path(self, file_name: str) -> str:
        found = self._find("files", "name", file_name) or self._find("files", "path", file_name)
        if found is None:
            raise ToolError(f'there is no file "{file_name}".')
        self._saw("open_and_get_file_path", str(found["path"]))
        return str(found["path"])

    def _summarize_pdf(self, pdf_path: str) -> str:
        found = self._find("files", "path", pdf_path) or self._find("files", "name", pdf_path)
        if found is None:
            raise ToolError(f'there is no file at "{pdf_path}".')
        self._saw("summarize_pdf", str(found["path"]))
        return f"Summary: {found['content']}"

    def _mail(
        self,
        kind: str,
        recipients: Sequence[str],
        cc: Sequence[str],
        subject: str,
        content: str,
        attachments: Sequence[str],
    ) -> None:
        selected = next(row for row in self.rows("inbox") if row["selected"])
        self._add(
            "mail",
            kind,
            _listed(self._addresses(recipients, "email")),
            _listed(self._addresses(cc, "email")),
            subject,
            content,
            _listed(self._paths(attachments)),
            "" if kind == "new" else selected["subject"],
        )

    def _compose_new_email(
        self, recipients: list[str], cc: list[str], subject: str, context: str, files: list[str]
    ) -> str:
        self._mail("new", recipients, cc, subject, context, files)
        return "The email was sent."

    def _reply_to_email(self, cc: list[str], context: str, attachments: list[str]) -> str:
        self._mail("reply", [], cc, "", context, attachments)
        return "The reply was sent."

    def _forward_email(
        self, recipients: list[str], cc: list[str], context: str, attachments: list[str]
    ) -> str:
        self._mail("forward", recipients, cc, "", context, attachments)
        return "The email was forwarded."

    def _create_calendar_event(
        self,
        title: str,
        start: str,
        end: str,
        location: str | None,
        invitees: list[str],
        notes: str | None,
        calendar: str | None,
    ) -> str:
        emails = _listed(self._addresses(invitees, "email"))
        self._add("events", title, start, end, location, emails, notes, calendar)
        return "The event was created."

    def _maps_open_location(self, location: str) -> str:
        self._saw("maps_open_location", _plain(location))
        return f"https://maps.example.org/place/{_number('place', _plain(location)) % 10**6:06d}"

    def _maps_show_directions(self, start: str, end: str, transport: str) -> str:
        way = " > ".join(map(_plain, (start, end, transport)))
        self._saw("maps_show_directions", way)
        return f"https://maps.example.org/route/{_number('route', way) % 10**6:06d}"

    def _create_note(self, name: str, content: str, folder: str) -> str:
        self._add("notes", folder, name, content)
        return "The note was created."

    def _open_note(self, name: str, folder: str) -> str:
        found = self._note(name)
        self._saw("open_note", _plain(name))
        return str(found["content"])

    def _append_note_content(self, name: str, content: str, folder: str) -> str:
        found = self._note(name)
        joined = "\n".join([*filter(None, str(found["content"]).split("\n")), content])
        self.database.execute(
            "update notes set content = ? where name = ?", (joined, found["name"])
        )
        return "The note was extended."

    def _note(self, name: str) -> dict[str, Any]:
        if (found := self._find("notes", "name", name)) is None:
            raise ToolError(f'there is no note "{name}".')
        return found

    def _create_reminder(
        self, name: str, due: str, notes: str, list_name: str, priority: int, all_day: bool
    ) -> str:
        self._add("reminders", name, due, notes, list_name, priority, int(all_day))
        return "The reminder was set."

    def _send_sms(self, recipients: list[str], message: str) -> str:
        self._add("messages", _listed(self._addresses(recipients, "phone")), message)
        return "The message was sent."

    def _get_zoom_meeting_link(
        self, topic: str, start: str, minutes: int, invitees: list[str]
    ) -> str:
        emails = _listed(self._addresses(invitees, "email"))
        number = _number(_plain(topic), start, minutes, emails) % 10**9
        link = f"https://zoom.example.org/j/{number:09d}"
        self._add("meetings", topic, start, minutes, emails, link)
        return link


def _comparable(column: str, value: object) -> str:
    """Write a value so that what makes no difference is not compared: order of lines, case, ends.

    Lists of addresses are sorted already, and lines of a note may have been added in any order.
    """
    if column == "content":
        return "\n".join(sorted(map(_plain, str(value or "").split("\n"))))
    return _plain(value)


class Recorder:
    """A sandbox for any tools: every call succeeds and is written down.

    A call gives its tool's kind of result with a number that follows from the arguments. Which
    tools change something is not known, so what is compared are all calls with their arguments.
    """

    def __init__(
        self, tools: Mapping[str, Tool], *, faults: Sequence[Fault] = (), time_scale: float = 0.0
    ) -> None:
        """Record calls of these tools; arguments as for `Desktop`."""
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self._faults = _Faults(faults)
        self._time_scale = time_scale
        self.tools: Mapping[str, RunnableTool] = {
            name: RunnableTool(tool=tool, run=partial(self._call, name))
            for name, tool in tools.items()
        }

    async def _call(self, name: str, *arguments: object) -> str:
        await self._faults.strike(name)
        if self._time_scale:
            await asyncio.sleep(_DELAY_S * self._time_scale)
        self.calls.append((name, arguments))
        kind = self.tools[name].tool.returns or "done"
        return f"{kind} {_number(name, *arguments) % 10**6:06d}"

    def state(self) -> State:
        """Give all different calls, so that one made again after a fault does not count twice."""
        rows = {
            tuple((str(at), _plain(value)) for at, value in enumerate((name, *arguments)))
            for name, arguments in self.calls
        }
        return State({"calls": Counter(rows)}, frozenset())

    def close(self) -> None:
        """Nothing is held."""
