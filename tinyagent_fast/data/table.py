"""The rows of a cached data file: a sequence that decodes single rows from a memory map.

Third stage of the data flow, beside `cache`, which writes the Arrow file and hands out the table.
pyarrow is imported on first use.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, cast, overload

from tinyagent_fast.data.reading import ReadReport
from tinyagent_fast.data.schema import Example, PointKind
from tinyagent_fast.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("key", "entry_key", "kind", "query", "system", "user", "output")
"""Columns of the Arrow file, one per field of `Example`; `crc32` follows them."""


class DamagedCache(Exception):
    """A cache file is not as it was written."""


class ExampleTable(Sequence[Example]):
    """The rows of one data file: an immutable sequence that decodes a row when it is asked for.

    Slices and `select` give tables over the same memory map. Tables can be pickled; the copy
    opens the cache file again.
    """

    def __init__(self, store: RowStore, rows: Sequence[int]) -> None:
        """Show some rows of a store; `load_examples` is the way to get a table.

        Args:
            store: The opened cache file.
            rows: The positions of the rows in it.
        """
        self._store = store
        self._rows = rows

    @property
    def sha256(self) -> str:
        """The sha256 of the data file, for run records."""
        return self._store.report.file_sha256

    @property
    def report(self) -> ReadReport:
        """What reading the data file found, skipped entries included."""
        return self._store.report

    @property
    def point_counts(self) -> Mapping[str, int]:
        """How many points of each kind the data file has, whatever this table shows."""
        return self._store.point_counts

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleTable: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleTable:
        """Return one row, or a table over a slice of the rows."""
        if isinstance(index, slice):
            return ExampleTable(self._store, self._rows[index])
        return self._store.example(self._rows[index])

    def select(self, indices: Iterable[int]) -> ExampleTable:
        """Return a table over some rows, such as one side of a split.

        Args:
            indices: Positions in this table, in the wanted order.

        Returns:
            A table over the same file.
        """
        return ExampleTable(self._store, [self._rows[index] for index in indices])

    def queries(self) -> list[str]:
        """Return the query of each row without decoding the prompts."""
        return self._store.column("query", self._rows)

    def entry_keys(self) -> list[str]:
        """Return the entry key of each row without decoding the prompts."""
        return self._store.column("entry_key", self._rows)


@dataclass
class RowStore:
    """One opened cache file, checked whole when it is opened."""

    path: Path
    report: ReadReport
    point_counts: Mapping[str, int]
    row_count: int
    _batches: list[pa.RecordBatch] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Open the file and check all that a row's checksum does not cover.

        Raises:
            DamagedCache: The file is not as it was written.
        """
        import pyarrow as pa

        try:
            with pa.memory_map(str(self.path)) as mapped:
                reader = pa.ipc.open_file(mapped)
                batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
            for batch in batches:
                if tuple(batch.schema.names) != (*COLUMNS, "crc32"):
                    raise DamagedCache("its columns are not those of this version")
                for column in batch.columns[:-1]:
                    # As bytes, a full check reads the offsets only, and not the texts.
                    column.view(pa.large_binary()).validate(full=True)
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise DamagedCache(str(error).split("\n")[0]) from error
        self._batches = batches
        self._starts = [0, *accumulate(batch.num_rows for batch in batches)]
        if self._starts[-1] != self.row_count:
            raise DamagedCache(f"it has {self._starts[-1]} rows, not {self.row_count}")

    def __reduce__(self) -> tuple[object, ...]:
        return RowStore, (self.path, self.report, self.point_counts, self.row_count)

    def example(self, row: int) -> Example:
        """Decode one row.

        Args:
            row: Its position in the file.

        Returns:
            The row.

        Raises:
            DataError: Its checksum differs from the one written with it.
        """
        batch_at = bisect_right(self._starts, row) - 1
        batch, at = self._batches[batch_at], row - self._starts[batch_at]
        *texts, crc32 = (column[at] for column in batch.columns)
        values = [None if text.as_buffer() is None else bytes(text.as_buffer()) for text in texts]
        if row_crc32(values) != crc32.as_py():
            raise DataError(
                f"{self.path}: row {row} is damaged",
                "its checksum differs from the one written with it",
                "delete this cache file; the next start writes it again",
            )
        key, entry_key, kind, query, system, user, output = (
            None if value is None else value.decode() for value in values
        )
        return Example(
            key=key or "",
            entry_key=entry_key or "",
            kind=cast(PointKind, kind),
            query=query or "",
            system=system,
            user=user or "",
            output=output or "",
        )

    def column(self, name: str, rows: Sequence[int]) -> list[str]:
        """Read one column of some rows.

        Args:
            name: One of `COLUMNS`.
            rows: Positions in the file.

        Returns:
            The values in that order.
        """
        parts = (batch.column(name).to_pylist() for batch in self._batches)
        values = cast("list[str]", list(chain.from_iterable(parts)))
        return [values[row] for row in rows]


def encoded_row(example: Example) -> list[bytes | None]:
    """Encode an example's fields as they are stored.

    Args:
        example: The row.

    Returns:
        UTF-8 or None, in the order of `COLUMNS`.
    """
    values: list[str | None] = [getattr(example, name) for name in COLUMNS]
    return [None if value is None else value.encode() for value in values]


def row_crc32(values: list[bytes | None]) -> int:
    """Sum up a row, so that a damaged one is noticed when it is read.

    Args:
        values: The row as `encoded_row` gives it.

    Returns:
        Its checksum, in which None and empty texts differ.
    """
    crc32 = 0
    for value in values:
        crc32 = zlib.crc32(b"\0" if value is None else value + b"\xff", crc32)
    return crc32
