"""Streams the entries of a dataset file, each one checked, in bounded memory.

The file is one JSON object as published, or JSON Lines: a line is an entry with its `key`, or an
object of one or more entries.

`schema` checks single entries; `cache` and `report` are the callers. The file is decoded with
ijson and not with `datasets`, whose JSON reader loads a file that is one object as a whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tinyagent_fast.data.schema import Entry, EntryProblem, entry_from_json, printable, short_text
from tinyagent_fast.errors import DataError

OnBadEntry = Literal["error", "skip"]

_PROBLEMS_SHOWN = 20
PROBLEMS_KEPT = 1000
_CHUNK_BYTES = 64 * 1024
_LFS = b"version https://git-lfs"
_HEAD_PROBLEMS = (
    (_LFS, "it is a git-lfs pointer, not the data", "run `git lfs pull`"),
    (b"\xef\xbb\xbf", "it starts with a byte order mark", "save it as UTF-8 without BOM"),
    (b"\xff\xfe", "it is UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "it is UTF-16 text", "save it as UTF-8"),
)
_OTHER_FORMATS = ("messages", "conversations", "instruction")
"""Keys of a row in other formats, which here are read as keys of entries."""
_CONVERTED = 'data/README.md, "Other formats", turns lists of chats into it'
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)', re.DOTALL)
# ijson's memory grows with the square of the depth; the schema needs a depth of about ten.
_DEEPEST = 1000
_LINE_BYTES = 16 << 20
"""A first line that is longer is a whole file on one line, and no line of JSON Lines."""
_ANY_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Escapes one after the other, so that a backslash that is escaped itself begins none.
_ESCAPE = re.compile(
    rb"\\(?:[^u]|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|u([dD][89a-fA-F][0-9a-fA-F]{2})|u)"
)
_BETWEEN_ESCAPES = (b" ", b",", b"}", b")")
_HALF = "\ufdd0"
"""Stands before the four digits of half a surrogate pair on the way through ijson, whose C library
turns it into a question mark; no text has this character, which Unicode keeps for such uses."""
_HALF_DIGITS = re.compile(_HALF + "([0-9a-fA-F]{4})")


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


class _Object(dict[str, Any]):
    """An object of the file as ijson builds it, which remembers a key that came again."""

    again_seen = False
    """Whether any object of the file has such a key: each file has a class of its own."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.again = key
            type(self).again_seen = True
        super().__setitem__(key, value)


class _Nesting:
    """Counts how deep a JSON text is nested; brackets within its texts do not count."""

    def __init__(self) -> None:
        self.deepest = self._depth = 0
        self._in_text = False
        self._backslash = b""

    def add(self, chunk: bytes) -> None:
        text = (b'"' if self._in_text else b"") + self._backslash + chunk
        odd = (len(text) - len(text.rstrip(b"\\"))) % 2
        text, self._backslash = text[: len(text) - odd], text[len(text) - odd :]
        self._in_text = False
        outside = _TEXT.sub(self._left_out, text)
        for bracket in outside.translate(None, _ALL_BUT_BRACKETS):
            self._depth += 1 if bracket in b"[{" else -1
            self.deepest = max(self.deepest, self._depth)

    def _left_out(self, text: re.Match[bytes]) -> bytes:
        self._in_text = not text[1]  # only the last one of a chunk may be open
        return b""


class _Source:
    """The file as ijson reads it: hashed, counted and guarded against deep nesting."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.sha256 = hashlib.sha256()
        self.read_bytes = 0
        self.has_halves = False
        """Whether half a surrogate pair has come by."""
        self.objects: type[_Object] = type("_ObjectOfFile", (_Object,), {})
        self._file, self._path = file, path
        self._held_back = b""
        self._nesting: _Nesting | None = None
        # No more levels can be open than brackets have come since the last entry's end.
        self._openings: list[int] = []

    def read(self, size: int = -1) -> bytes:
        """Give the next bytes, halves of surrogate pairs marked; an escape is never cut."""
        while chunk := self._file.read(size):
            self._look_at(chunk)
            text = self._held_back + chunk
            # None of these bytes is part of an escape, so none is cut behind them.
            end = 1 + max(map(text.rfind, _BETWEEN_ESCAPES))
            text, self._held_back = text[:end], text[end:]
            if text:
                return self._marked(text)
        text, self._held_back = self._held_back, b""
        return self._marked(text)

    def lines(self) -> Iterator[bytes]:
        """Yield lines, halves of surrogate pairs marked."""
        for line in self._file:
            self._openings.clear()
            self._nesting = None
            self._look_at(line, first=True)
            yield self._marked(line)

    def entry_came(self) -> None:
        """Take note that ijson is at the top level within the last two chunks."""
        del self._openings[:-2]

    def _look_at(self, chunk: bytes, *, first: bool = False) -> None:
        """Refuse deep nesting; exact counting takes long, so it begins where it can matter."""
        before = 0 if first else self.read_bytes
        self.sha256.update(chunk)
        self.read_bytes += len(chunk)
        self._openings.append(chunk.count(b"[") + chunk.count(b"{"))
        if self._nesting is None and sum(self._openings) > _DEEPEST:
            self._nesting = _Nesting()
            with self._path.open("rb") as file:
                while before and (earlier := file.read(min(before, _CHUNK_BYTES))):
                    self._nesting.add(earlier)
                    before -= len(earlier)
        if self._nesting is not None:
            self._nesting.add(chunk)
            if self._nesting.deepest > _DEEPEST:
                raise DataError(
                    f"{self._path}: nested more than {_DEEPEST:,} levels deep near byte "
                    f"{self.read_bytes:,}",
                    "no entry of this schema nests more than about ten levels",
                    "remove the damaged entry, or export the file again",
                )

    def _marked(self, text: bytes) -> bytes:
        return _ESCAPE.sub(self._mark, text) if _ANY_SURROGATE.search(text) else text

    def _mark(self, escape: re.Match[bytes]) -> bytes:
        if escape[1] is None:
            return escape[0]
        self.has_halves = True
        return _HALF.encode() + escape[1]


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
    report = ReadReport()
    check_head(path)
    try:
        with path.open("rb") as file:
            source = _Source(file, path)
            keys: set[str] = set()
            for key, value, oddity in _decoded(source, path, report):
                if key in keys:
                    oddity = "has a key that an earlier entry has"  # noqa: PLW2901
                if oddity is not None:
                    report.skip([EntryProblem(printable(key), "", oddity)])
                elif isinstance(entry := entry_from_json(key, value), Entry):
                    report.entries += 1
                    yield entry
                else:
                    report.skip(entry)
                keys.add(key)
    except OSError as error:
        raise _unreadable(path, error) from error
    report.size_bytes = source.read_bytes
    report.seconds = time.perf_counter() - started
    report.file_sha256 = source.sha256.hexdigest()
    if on_report is not None:
        on_report(report)
    if not report.entries and not report.skipped:
        raise DataError(f"{path}: has no entry", "the object is empty", "give a full data file")
    if report.skipped and (on_bad_entry == "error" or not report.entries):
        raise _bad_entries_error(path, report)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read", str(error), "check path and rights")


def is_incomplete(path: Path) -> bool:
    """Say whether a file is the beginning of a data file, empty, or a git-lfs pointer."""
    with path.open("rb") as file:
        head = file.read(64).lstrip()
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
            head = file.read(4096)
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


def _decoded(
    source: _Source, path: Path, report: ReadReport
) -> Iterator[tuple[str, object, str | None]]:
    """Yield key and value of each entry and what is odd in it, with decoding errors made clear."""
    import ijson

    report.json_lines = is_json_lines(path)
    pairs = _pairs_of_lines if report.json_lines else _pairs
    try:
        for key, value in pairs(source):
            source.entry_came()
            oddity = _given_twice(value) if source.objects.again_seen else None
            if not source.has_halves:
                yield key, value, oddity
                continue
            try:
                yield _restored(key), _restored(value), oddity
            except RecursionError:
                yield _restored(key), None, "is nested too deeply"
    except (ijson.JSONError, UnicodeDecodeError) as error:
        done = f"after {report.entries + report.skipped:,} entries, near byte {source.read_bytes:,}"
        text = str(error)
        if "premature EOF" in text:
            raise DataError(
                f"{path}: ends too early ({done})",
                "the JSON object is not closed, so the file was cut off",
                "fetch or copy it again and compare the sizes",
            ) from error
        reason = text.removeprefix("b'").removeprefix('b"').split("\n")[0].split("\\n")[0]
        raise DataError(
            f"{path}: is not valid JSON ({done})",
            short_text(reason, 200),
            "repair that place, or fetch the file again",
        ) from error


def _pairs(source: _Source) -> Iterator[tuple[str, object]]:
    return _pairs_of(source, source.objects)


def _pairs_of(file: Any, objects: type[_Object]) -> Iterator[tuple[str, object]]:
    import ijson

    yield from ijson.kvitems(file, "", map_type=objects, use_float=True, buf_size=_CHUNK_BYTES)


def _pairs_of_lines(source: _Source) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(source.lines(), start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith(b"{"):
            yield f"line {number}", short_text(line.decode("utf-8", "replace"))
            continue
        pairs = list(_pairs_of(io.BytesIO(line), source.objects))
        value = source.objects()
        for name, part in pairs:
            value[name] = part
        if _is_entry(value) or "key" in value:
            key = value.get("key")
            yield (key if isinstance(key, str) else f"line {number}"), value
        else:
            yield from pairs


def _given_twice(value: object) -> str | None:
    """Find a key that an object within an entry has twice."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, _Object) and hasattr(part, "again"):
            return f"gives {short_text(part.again)} twice"
        if isinstance(part, dict | list):
            pending.extend(part.values() if isinstance(part, dict) else part)
    return None


def _restored(value: Any) -> Any:
    """Turn marks of halves of surrogate pairs into these, so that `schema` finds them."""
    if isinstance(value, str):
        return _HALF_DIGITS.sub(lambda digits: chr(int(digits[1], 16)), value)
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if isinstance(value, dict):
        return {_restored(name): _restored(item) for name, item in value.items()}
    return value


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
