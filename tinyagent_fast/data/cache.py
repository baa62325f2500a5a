"""Keeps the checked rows of a dataset file in an Arrow file, so that a second start is instant.

Third stage of the data flow: `reading` streams the entries in, training and evaluation take an
`ExampleTable` out (see `table`). pyarrow is imported on first use.

In the cache folder, `<sha256>-v<version>-<on_bad_entry>.arrow` holds the rows and the `.json`
beside it the report; `sources/` remembers the sha256 of each data file by size and times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from tinyagent_fast.data.reading import OnBadEntry, Progress, ReadReport, read_entries
from tinyagent_fast.data.schema import Entry, EntryProblem, Example
from tinyagent_fast.data.table import (
    COLUMNS,
    DamagedCache,
    ExampleTable,
    RowStore,
    encoded_row,
    row_crc32,
)
from tinyagent_fast.errors import DataError

Points = Literal["plan", "join", "all"]

SCHEMA_VERSION = 1
CACHE_VARIABLE = "TINYAGENT_FAST_CACHE"
_BATCH_BYTES = 8 * 1024 * 1024
_BATCH_ROWS = 4096
_STALE_S = 24 * 3600.0

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Name the folder of all caches.

    Returns:
        The one named by TINYAGENT_FAST_CACHE, else `.cache/tinyagent_fast` under this folder.
    """
    return Path(os.environ.get(CACHE_VARIABLE) or ".cache/tinyagent_fast").absolute()


def load_examples(
    path: str | Path,
    *,
    on_bad_entry: OnBadEntry,
    cache_dir: str | Path | None = None,
    points: Points = "plan",
    progress: Progress | None = None,
) -> ExampleTable:
    """Return the rows of a data file, from the cache if it has them, else after reading it.

    Args:
        path: The JSON data file.
        on_bad_entry: "error" or "skip", see `reading.read_entries`.
        cache_dir: The cache folder; by default the one named by TINYAGENT_FAST_CACHE, else
            `.cache/tinyagent_fast` under the current folder.
        points: Which points become rows; "all" includes replan points.
        progress: Called with (bytes read, bytes in all) while the file is read.

    Returns:
        The table. Skipped entries are logged as a warning, on cached starts too.

    Raises:
        DataError: The file cannot be used, has no such point, changed while it was read, or the
            cache folder cannot be written.
    """
    path = Path(path).absolute()
    folder = Path(cache_dir).absolute() if cache_dir else cache_folder()
    try:
        identity = _identity(path)
        sha256 = _known_sha256(path, folder, identity) or _file_sha256(path)
    except OSError:
        identity, sha256 = [], ""  # Reading says clearly what is wrong with the file.
    stem = folder / f"{sha256}-v{SCHEMA_VERSION}-{on_bad_entry}"
    store = _open_store(stem) if sha256 else None
    if store is None:
        try:
            _build(path, stem, on_bad_entry, progress)
        except OSError as error:
            raise DataError(
                f"{folder}: the cache cannot be written",
                str(error),
                f"free some space, or name another folder with {CACHE_VARIABLE}",
            ) from error
        store = _open_store(stem)
        assert store is not None, "a cache that was just written can be opened"
    _remember(path, folder, identity, sha256)
    if store.report.skipped:
        _log.warning(
            "%s: %d of %d entries were left out (%d problems)",
            *(path, store.report.skipped, store.report.skipped + store.report.entries),
            store.report.problem_count,
        )
    kinds = store.column("kind", range(store.row_count))
    rows = [row for row, kind in enumerate(kinds) if points in ("all", kind)]
    if not rows:
        counts = ", ".join(f"{count} {kind}" for kind, count in store.point_counts.items())
        raise DataError(f"{path}: has no {points} point", f"it has {counts}", "set other points")
    return ExampleTable(store, rows)


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _file_sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            sha256.update(chunk)
    return sha256.hexdigest()


def _source_record(path: Path, folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return folder / "sources" / f"{name}.json"


def _known_sha256(path: Path, folder: Path, identity: list[int]) -> str | None:
    """Return the remembered sha256 if the file's size, time and inode are still the same."""
    try:
        record = json.loads(_source_record(path, folder).read_text(encoding="utf-8"))
        if record["path"] == str(path) and record["identity"] == identity:
            return str(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # No usable record: the file is hashed again, which costs time only.
    return None


def _remember(path: Path, folder: Path, identity: list[int], sha256: str) -> None:
    target = _source_record(path, folder)
    record = {"path": str(path), "identity": identity, "sha256": sha256}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_text(target, json.dumps(record))
    except OSError as error:
        _log.warning("%s: not written (%s), so the next start hashes the file", target, error)


def _write_text(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)


def _open_store(stem: Path) -> RowStore | None:
    """Open a complete and sound cache file, else return None and say why it is not used."""
    arrow, about = Path(f"{stem}.arrow"), Path(f"{stem}.json")
    if not arrow.exists() and not about.exists():
        return None
    try:
        record = json.loads(about.read_text(encoding="utf-8"))
        if arrow.stat().st_size != record["arrow_bytes"]:
            raise DamagedCache(f"it has {arrow.stat().st_size} bytes, not {record['arrow_bytes']}")
        problems = tuple(EntryProblem(**item) for item in record["report"].pop("problems"))
        report = ReadReport(problems=problems, **record["report"])
        return RowStore(arrow, report, record["point_counts"], record["rows"])
    except (DamagedCache, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: the cache is damaged (%s) and is written again", arrow, error)
        return None


def _build(path: Path, stem: Path, on_bad_entry: OnBadEntry, progress: Progress | None) -> None:
    """Read the data file and write its rows, under a temporary name until all is done."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for old in stem.parent.glob(".*.tmp"):
        if time.time() - old.stat().st_mtime > _STALE_S:
            old.unlink(missing_ok=True)
    temporary = stem.parent / f".{stem.name}.{os.getpid()}.tmp"
    reports: list[ReadReport] = []
    try:
        entries = read_entries(
            path, on_bad_entry=on_bad_entry, progress=progress, on_report=reports.append
        )
        counts = _write_rows(temporary, entries)
        report = reports[0]
        if not stem.name.startswith(report.file_sha256):
            raise DataError(
                f"{path}: changed while it was read",
                "its sha256 differs between two passes",
                "start again when the file is complete",
            )
        record = {
            "rows": counts.total(),
            "arrow_bytes": temporary.stat().st_size,
            "point_counts": dict(sorted(counts.items())),
            "report": asdict(report),
        }
        temporary.replace(f"{stem}.arrow")
        _write_text(Path(f"{stem}.json"), json.dumps(record))
    finally:
        temporary.unlink(missing_ok=True)


def _write_rows(target: Path, entries: Iterator[Entry]) -> Counter[str]:
    """Write one row per point in batches of bounded size; return the points per kind."""
    import pyarrow as pa

    fields: list[pa.Field] = [pa.field(name, pa.large_string()) for name in COLUMNS]
    schema = pa.schema([*fields, pa.field("crc32", pa.uint32())])
    counts: Counter[str] = Counter()
    rows: list[tuple[object, ...]] = []
    size_bytes = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:

        def flush() -> None:
            arrays = [
                pa.array(column, kind.type)
                for column, kind in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            rows.clear()

        for entry in entries:
            for example in entry_examples(entry):
                values = encoded_row(example)
                counts[example.kind] += 1
                rows.append((*values, row_crc32(values)))
                size_bytes += sum(len(value) for value in values if value)
            if size_bytes > _BATCH_BYTES or len(rows) >= _BATCH_ROWS:
                flush()
                size_bytes = 0
        if rows:
            flush()
    return counts


def entry_examples(entry: Entry) -> list[Example]:
    """Turn an entry into one row per point, in order.

    Args:
        entry: A checked entry.

    Returns:
        The rows, each keyed by the entry's key and the position of its point.
    """
    return [
        Example(
            key=f"{entry.key}/{at}",
            entry_key=entry.key,
            kind=point.kind,
            query=entry.query,
            system=point.messages[0].content if len(point.messages) == 2 else None,
            user=point.messages[-1].content,
            output=point.raw_output,
        )
        for at, point in enumerate(entry.points)
    ]
