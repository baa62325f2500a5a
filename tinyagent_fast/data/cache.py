"""Keeps examples and rows in Arrow files, so that a second start neither reads nor encodes again.

`load_examples` turns a data file into an `ExampleTable`; `prompts.rows` keeps its token ids with
`cached_table` too. `datasets` writes and maps the files; it is imported on first use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

from tinyagent_fast.config import OnBadEntry, Points
from tinyagent_fast.data.reading import ReadReport, check_head, read_entries
from tinyagent_fast.data.schema import EntryProblem, Example
from tinyagent_fast.errors import DataError, plainly
from tinyagent_fast.runs import sha256_of, unfinished_folder

_SCHEMA_VERSION = 3
CACHE_VARIABLE = "TINYAGENT_FAST_CACHE"
_BATCH_ROWS = 256
_COLUMNS = tuple(field.name for field in fields(Example))

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Name the folder of all caches: TINYAGENT_FAST_CACHE, else `.cache/tinyagent_fast` here."""
    return Path(os.environ.get(CACHE_VARIABLE) or ".cache/tinyagent_fast").absolute()


def cached_table(
    folder: Path, columns: Mapping[str, Any], fill: Callable[[Callable[[Any], None]], Any]
) -> tuple[Any, Any]:
    """Open the table in a cache folder, or fill it.

    The folder gets its name by one rename when all is written, so it is whole or not there, and
    of two processes that fill it at once the second takes what the first has left.

    Args:
        folder: Its name must stand for everything that the table depends on.
        columns: Type of each column, as `datasets.Features` takes it.
        fill: Called with a function that adds one row (a dict); returns what to keep beside the
            rows, as values for JSON. Its errors leave nothing behind.

    Returns:
        The rows as a memory-mapped `datasets.Dataset`, and what `fill` returned.

    Raises:
        DataError: The folder cannot be written.
    """
    try:
        found = _open_table(folder)
        if found is None:
            _fill_table(folder, columns, fill)
            found = _open_table(folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: the cache cannot be written",
            plainly(error),
            f"free some space, or name another folder with {CACHE_VARIABLE}",
        ) from error
    assert found is not None, "a table that was just written can be opened"
    return found


def _open_table(folder: Path) -> tuple[Any, Any] | None:
    """Open a whole table; a damaged one is removed with a warning."""
    if not folder.exists():
        return None
    from datasets import Dataset

    rows = folder / "rows.arrow"
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if rows.stat().st_size != about["rows_bytes"]:
            raise ValueError(f"it has {rows.stat().st_size} bytes, not {about['rows_bytes']}")
        return Dataset.from_file(str(rows)), about["facts"]
    # What Arrow raises for a damaged file is a ValueError or an OSError.
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s: the cache is damaged (%s) and is written again", folder, error)
        shutil.rmtree(folder)
        return None


def _fill_table(
    folder: Path, columns: Mapping[str, Any], fill: Callable[[Callable[[Any], None]], Any]
) -> None:
    from datasets import Features
    from datasets.arrow_writer import ArrowWriter

    with unfinished_folder(folder.parent, "table") as temporary:
        rows = temporary / "rows.arrow"
        with ArrowWriter(
            path=str(rows), features=Features(columns), writer_batch_size=_BATCH_ROWS
        ) as writer:
            facts = fill(writer.write)
            writer.finalize()
        about = {"rows_bytes": rows.stat().st_size, "facts": facts}
        (temporary / "about.json").write_text(json.dumps(about), encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise


@dataclass(frozen=True)
class ExampleTable(Sequence[Example]):
    """Examples of one data file: an immutable sequence that decodes an example when asked for it.

    Slices and `select` give tables over the same memory map. Tables can be pickled; the copy
    opens the cache file again.
    """

    dataset: Any
    """The `datasets.Dataset` with one column per field of `Example`."""
    report: ReadReport
    """What reading the data file found, skipped entries included."""

    @property
    def sha256(self) -> str:
        """The sha256 of the data file, for run records."""
        return self.report.file_sha256

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleTable: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleTable:
        """Return one example, or a table over a slice of them."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return Example(**self.dataset[index])

    def __iter__(self) -> Iterator[Example]:
        """Decode the examples in order, a few hundred at a time."""
        for batch in self.dataset.iter(_BATCH_ROWS):
            for values in zip(*(batch[name] for name in _COLUMNS), strict=True):
                yield Example(**dict(zip(_COLUMNS, values, strict=True)))

    def select(self, indices: Iterable[int]) -> ExampleTable:
        """Return a table over some examples, such as one side of a split, in the given order."""
        return ExampleTable(self.dataset.select(indices), self.report)

    def followed_by(self, other: ExampleTable) -> ExampleTable:
        """Return a table of these examples and those of another; it keeps this one's report."""
        from datasets import concatenate_datasets

        return ExampleTable(concatenate_datasets([self.dataset, other.dataset]), self.report)

    def column(self, name: str) -> list[str]:
        """Return one field of every example without decoding the prompts."""
        values: list[str] = self.dataset[name][:]
        return values


def load_examples(
    path: str | Path, *, on_bad_entry: OnBadEntry, points: Points = "plan"
) -> ExampleTable:
    """Return the examples of a data file, from the cache if it has them, else after reading it.

    What is skipped is logged on cached starts too; points "all" include replan points.

    Raises:
        DataError: The file cannot be used, has no such point, changed while it was read, or the
            cache folder cannot be written.
    """
    path = Path(path).absolute()
    check_head(path)
    sha256 = _remembered_sha256(path)

    def fill(write: Callable[[Any], None]) -> dict[str, Any]:
        reports: list[ReadReport] = []
        for entry in read_entries(path, on_bad_entry=on_bad_entry, on_report=reports.append):
            for example in entry.examples:
                write({name: getattr(example, name) for name in _COLUMNS})
        if reports[0].file_sha256 != sha256:
            raise DataError(
                f"{path}: changed while it was read",
                "its sha256 differs between two passes",
                "start again when the file is complete",
            )
        return asdict(reports[0])

    from datasets import Value

    folder = cache_folder() / f"{sha256}-v{_SCHEMA_VERSION}-{on_bad_entry}"
    dataset, facts = cached_table(folder, dict.fromkeys(_COLUMNS, Value("string")), fill)
    problems = [EntryProblem(**problem) for problem in facts.pop("problems")]
    report = ReadReport(problems=problems, **facts)
    if report.skipped:
        _log.warning(
            "%s: %d of %d entries were left out (%d problems)",
            *(path, report.skipped, report.skipped + report.entries, report.problem_count),
        )
    table = ExampleTable(dataset, report)
    if points == "all":
        return table
    kinds = table.column("kind")
    if points not in kinds:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(kinds).items()))
        raise DataError(f"{path}: has no {points} point", f"it has {found}", "set other points")
    return table.select([row for row, kind in enumerate(kinds) if kind == points])


def _remembered_sha256(path: Path) -> str:
    """Hash a file, unless that was done before for the same path, size, time and inode."""
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    name = hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
    record = cache_folder() / "sources" / name
    try:
        known = record.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    except (OSError, ValueError):
        pass  # No usable record: hashing costs time only.
    sha256 = sha256_of(path)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(f"{record.name}.{os.getpid()}.tmp")
        temporary.write_text(sha256, encoding="ascii")
        temporary.replace(record)
    except OSError as error:
        _log.warning("%s: not written (%s), so the next start hashes the file", record, error)
    return sha256
