"""Streams the entries of a dataset file, each one checked, in bounded memory.

The file is one JSON object as published, or JSON Lines: a line is an entry with its `key`, or an
object of one or more entries.

`schema` checks single entries; `cache` and `report` are the callers. Python's own decoder reads an
entry at a time; `datasets` loads a file that is one object as a whole, and ijson turns half a
surrogate pair into a question mark.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tinyagent_fast.config import OnBadEntry
from tinyagent_fast.data.schema import Entry, EntryProblem, entry_from_json, short_text
from tinyagent_fast.errors import DataError, plainly, printable

_PROBLEMS_SHOWN = 20
PROBLEMS_KEPT = 1000
_CHUNK_BYTES = 256 * 1024
_LFS = b"version https://git-lfs"
_HEAD_PROBLEMS = (
    (_LFS, "it is a git-lfs pointer, not the data", "run `git lfs pull`"),
    (b"\xff\xfe", "it is UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "it is UTF-16 text", "save it as UTF-8"),
)
_OTHER_FORMATS = ("messages", "conversations", "instruction")
"""Keys of a row in other formats, which here are read as keys of entries."""
_CONVERTED = 'data/README.md, "Other formats", turns lists of chats into it'
_LINE_BYTES = 16 << 20
"""A first line that is longer is a whole file on one line, and no line of JSON Lines."""
_SPACE = (" ", "\t", "\n", "\r")
_LONGEST_WORD = len("-Infinity")


@dataclass(slots=True, kw_only=True)
class ReadReport:
    """What one pass over a file found; `problems` holds the first PROBLEMS_KEPT of them."""

    entries: int = 0
    skipped: int = 0
    problems: list[EntryProblem] = field(default_factory=list)
    problem_count: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    file_sha256: str = ""
    json_lines: bool = False
    """Whether each line held an object of its own."""

    def problem_lines(self) -> list[str]:
        """Write the first problems, one a line, and how many more there are."""
        shown = self.problems[:_PROBLEMS_SHOWN]
        lines = [f"{item.key} {item.field or 'entry'}: {item.reason}" for item in shown]
        more = self.problem_count - len(shown)
        return [*lines, f"and {more:,} more problems"] if more else lines

    def skip(self, problems: list[EntryProblem]) -> None:
        """Count an entry that cannot be used."""
        self.skipped += 1
        self.problem_count += len(problems)
        self.problems.extend(problems[: max(0, PROBLEMS_KEPT - len(self.problems))])


class _File:
    """The file, hashed and counted while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.read_bytes = 0

    def read(self, size: int) -> bytes:
        """Read, count and hash so many bytes."""
        return self._counted(self._file.read(size))

    def __iter__(self) -> Iterator[bytes]:
        return map(self._counted, self._file)

    def _counted(self, part: bytes) -> bytes:
        self.sha256.update(part)
        self.read_bytes += len(part)
        return part


class _Member(NamedTuple):
    """A name and its value in an object, and a name that an object within the value has twice."""

    name: str
    value: object
    twice: str | None


class _Object:
    """The text of one JSON object, of which no more is held than its next member takes."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._twice: str | None = None
        self._decode = json.JSONDecoder(
            object_pairs_hook=self._once, parse_constant=self._no_constant
        ).raw_decode

    def members(self) -> Iterator[_Member]:
        """Yield the members in their order; what is wrong is a ValueError or a RecursionError."""
        self._take("{")
        more = self._next() != "}"
        while more:
            if self._next() != '"':
                raise self._error("Expecting a name in double quotes")
            name = str(self._value())
            self._take(":")
            self._twice = None
            yield _Member(name, self._value(), self._twice)
            more = self._next() == ","
            self._at += more
        self._take("}")
        if self._next():
            raise self._error("Extra data")

    def _next(self) -> str:
        """Skip white space and give the next character; an empty text at the end."""
        while (mark := self._text[self._at : self._at + 1]) in _SPACE or (
            not mark and self._more()
        ):
            self._at += len(mark)
        return mark

    def _take(self, mark: str) -> None:
        if self._next() != mark:
            raise self._error(f"Expecting {mark!r}")
        self._at += 1

    def _value(self) -> object:
        self._next()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _LONGEST_WORD or _is_open(error)
                if not cut or not self._more():
                    raise
            else:
                # A number may go on behind what has been read, as `1` and `1e+` do.
                if end < len(self._text) - 2 or not self._more():
                    self._at = end
                    return value

    def _more(self) -> bool:
        """Read on, and twice as much where that was not enough; False at the end."""
        part = self._read(max(_CHUNK_BYTES, len(self._text) - self._at))
        more = self._utf8.decode(part, final=not part)
        if part:
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(part)

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._twice = _repeated(name for name, _ in pairs)
        return found

    def _no_constant(self, name: str) -> None:
        raise self._error(f"{name} is no JSON")

    def _error(self, message: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(message, self._text, self._at)


def _is_open(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string")


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def read_entries(
    path: str | Path,
    *,
    on_bad_entry: OnBadEntry,
    on_report: Callable[[ReadReport], None] | None = None,
) -> Iterator[Entry]:
    """Yield the good entries of a dataset file in file order, one at a time.

    Args:
        path: The JSON file.
        on_bad_entry: "error" raises at the end of the file with all problems counted; good
            entries have been yielded by then, so callers must not keep them. "skip" leaves bad
            entries out and counts them in the report.
        on_report: Called once with the report when the file has been read to its end.

    Yields:
        Checked entries with distinct keys.

    Raises:
        DataError: The file cannot be read as JSON, has no usable entry, or has bad
            entries and `on_bad_entry` is "error".
    """
    path = Path(path)
    started = time.perf_counter()
    check_head(path)
    try:
        report = ReadReport(json_lines=is_json_lines(path))
        with path.open("rb") as opened:
            file = _File(opened)
            keys: set[str] = set()
            for key, value, twice in _decoded(file, path, report):
                if key in keys:
                    oddity = "has a key that an earlier entry has"
                else:
                    oddity = f"gives {short_text(twice)} twice" if twice is not None else ""
                if oddity:
                    report.skip([EntryProblem(printable(key, one_line=True), "", oddity)])
                elif isinstance(entry := entry_from_json(key, value), Entry):
                    report.entries += 1
                    yield entry
                else:
                    report.skip(entry)
                keys.add(key)
    except OSError as error:
        raise _unreadable(path, error) from error
    report.size_bytes = file.read_bytes
    report.seconds = time.perf_counter() - started
    report.file_sha256 = file.sha256.hexdigest()
    if on_report is not None:
        on_report(report)
    if not report.entries and not report.skipped:
        raise DataError(f"{path}: has no entry", "the object is empty", "give a full data file")
    if report.skipped and (on_bad_entry == "error" or not report.entries):
        raise _bad_entries_error(path, report)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read", plainly(error), "check path and rights")


def is_incomplete(path: Path) -> bool:
    """Say whether a file is the beginning of a data file, empty, or a git-lfs pointer."""
    with path.open("rb") as file:
        head = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(max(0, path.stat().st_size - 64))
        tail = file.read().rstrip()
    return not head or (head.startswith((b"{", _LFS)) and not tail.endswith(b"}"))


def check_head(path: Path) -> None:
    """Look at the first bytes of a file.

    Raises:
        DataError: There is no such file, or it is clearly no dataset file.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}",
            "a dataset is one JSON file",
            "give the path of the file, or fetch it as data/README.md says",
        )
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _unreadable(path, error) from error
    for mark, why, fix in _HEAD_PROBLEMS:
        if head.startswith(mark):
            raise DataError(f"{path}: is not a dataset file", why, fix)
    if not head.strip():
        raise DataError(f"{path}: is empty", "it begins with no text", "fetch or export it again")
    if b"\0" in head:
        raise DataError(f"{path}: is not UTF-8 text", "it holds zero bytes", "save it as UTF-8")
    if not head.lstrip().startswith(b"{"):
        start = short_text(head.lstrip()[:20].decode("utf-8", "replace"))
        raise DataError(
            f"{path}: is not a JSON object",
            f"it starts with {start}, not with '{{'",
            "give it as published (one object that maps entry keys to entries), or JSON Lines; "
            f"{_CONVERTED}",
        )


def is_json_lines(path: Path) -> bool:
    """Say whether a file holds an object on each line instead of one in all."""
    with path.open("rb") as file:
        first = file.readline(_LINE_BYTES)
        more = file.read(4096).lstrip()
    if not first.rstrip().endswith(b"}"):
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (more.startswith(b"{") or _is_entry(value))


def _is_entry(value: Mapping[str, object]) -> bool:
    """Tell an entry from an object of entries, whose values are objects."""
    return isinstance(value.get("input"), str) and isinstance(value.get("output"), list)


def _decoded(file: _File, path: Path, report: ReadReport) -> Iterator[_Member]:
    """Yield the entries by their keys, with decoding errors made clear."""
    try:
        yield from _members_of_lines(file) if report.json_lines else _Object(file.read).members()
    except (ValueError, RecursionError) as error:
        after = f"after {report.entries + report.skipped:,} entries"
        if isinstance(error, RecursionError):
            raise DataError(
                f"{path}: is nested too deeply ({after}, near byte {file.read_bytes:,})",
                "no entry of this schema nests more than about ten levels",
                "remove the damaged entry, or export the file again",
            ) from error
        near, reason = file.read_bytes, str(error)
        if isinstance(error, json.JSONDecodeError):
            near -= len(error.doc[error.pos :].encode())
            reason = error.msg
            text = error.doc.rstrip()
            cut = error.pos >= len(text) or not text.endswith("}") or _is_open(error)
            if cut and reason != "Extra data" and not file.read(1):
                raise DataError(
                    f"{path}: ends too early ({after}, near byte {near:,})",
                    "the JSON object is not closed, so the file was cut off",
                    "fetch or copy it again and compare the sizes",
                ) from error
        raise DataError(
            f"{path}: is not valid JSON ({after}, near byte {near:,})",
            short_text(reason, 200),
            "repair that place, or fetch the file again",
        ) from error


def _members_of_lines(file: _File) -> Iterator[_Member]:
    for number, whole in enumerate(file, start=1):
        line = whole.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        if not line.lstrip().startswith(b"{"):
            text = short_text(line.decode("utf-8", "replace"))
            yield _Member(f"line {number}", text, None)
            continue
        members = list(_Object(io.BytesIO(line).read).members())
        value = {member.name: member.value for member in members}
        if not _is_entry(value) and "key" not in value:
            yield from members
            continue
        key = value.get("key")
        twice = (member.twice for member in members if member.twice is not None)
        yield _Member(
            key if isinstance(key, str) else f"line {number}",
            value,
            _repeated(member.name for member in members) or next(twice, None),
        )


def _bad_entries_error(path: Path, report: ReadReport) -> DataError:
    fields = Counter(re.sub(r"\d+", "", item.field) or "entry" for item in report.problems)
    counts = ", ".join(f"{name} {count:,}" for name, count in fields.most_common())
    if report.problem_count > len(report.problems):
        counts = f"of the first {len(report.problems):,}: {counts}"
    other = any(problem.key in _OTHER_FORMATS for problem in report.problems)
    fix = "repair or remove these entries, or leave them out with --data.on-bad-entry skip"
    return DataError(
        f"{path}: {report.skipped:,} of {report.entries + report.skipped:,} entries cannot be "
        f"used ({report.problem_count:,} problems; {counts})",
        "\n    ".join(report.problem_lines()),
        f"it looks like another format: {_CONVERTED}" if other else fix,
    )
