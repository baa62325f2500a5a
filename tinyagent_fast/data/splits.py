"""Divides rows into training and validation by entry, and counts queries that leak across.

Fourth stage of the data flow: takes the rows of `cache.load_examples`, gives row numbers for
`ExampleTable.select`. Two queries count as the same if their normalised forms are equal.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tinyagent_fast.data.schema import Example
from tinyagent_fast.data.table import ExampleTable
from tinyagent_fast.errors import ConfigError, DataError

_SEPARATORS = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Row numbers of both sides, in file order, and the entries behind them.

    `repeated_queries` counts entries whose normalised query an earlier entry has; such entries
    are always on one side together.
    """

    train: list[int]
    validation: list[int]
    train_entries: int
    validation_entries: int
    repeated_queries: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLeak:
    """Queries that two splits share, as distinct queries and as rows of either side."""

    first: str
    second: str
    exact: int
    normalised: int
    rows_in_first: int
    rows_in_second: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRepeats:
    """Rows of one split whose query an earlier row of the same split has."""

    name: str
    rows: int
    exact: int
    normalised: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakReport:
    """Repeated queries within each split and between each pair of splits."""

    within: tuple[SplitRepeats, ...]
    between: tuple[PairLeak, ...]

    @property
    def leaks(self) -> bool:
        """Whether any query is in two splits."""
        return any(pair.normalised for pair in self.between)


def normalise_query(query: str) -> str:
    """Reduce a query to what must differ for two queries to be different.

    Letter case is folded, and each run of white space, punctuation and underscores becomes one
    space: "Call  Ann!" equals "call ann". A query of punctuation only stays as it is.

    Args:
        query: The query as the user wrote it.

    Returns:
        The form to compare.
    """
    folded = query.casefold()
    return _SEPARATORS.sub(" ", folded).strip() or folded.strip()


def split_validation(examples: Sequence[Example], *, validation_entries: int, seed: int) -> Split:
    """Set entries aside for validation, so that no entry and no query is on both sides.

    Which entries are chosen depends on the seed and the queries alone, not on their order.

    Args:
        examples: The rows; all rows of an entry go to the same side.
        validation_entries: How many entries to set aside, exactly.
        seed: Another seed chooses other entries.

    Returns:
        The row numbers of both sides.

    Raises:
        ConfigError: `validation_entries` is negative.
        DataError: Too few entries, or repeated queries that do not add up to that number.
    """
    if validation_entries < 0:
        raise ConfigError(
            f"validation_entries = {validation_entries}",
            "a number of entries cannot be negative",
            "set 0 for no validation, or more",
        )
    keys, queries = _keys_and_queries(examples)
    groups: dict[str, set[str]] = {}
    group_of: list[str] = []
    for key, query in zip(keys, map(normalise_query, queries), strict=True):
        groups.setdefault(query, set()).add(key)
        group_of.append(query)
    entry_count = sum(map(len, groups.values()))
    if validation_entries and validation_entries >= entry_count:
        raise DataError(
            f"validation_entries = {validation_entries:,} of {entry_count:,} entries",
            "no entry would be left for training",
            f"set validation_entries to {entry_count // 10} or less, or give a larger file",
        )
    chosen = _chosen_groups(groups, validation_entries, seed)
    sides: tuple[list[int], list[int]] = ([], [])
    for row, query in enumerate(group_of):
        sides[query in chosen].append(row)
    return Split(
        train=sides[0],
        validation=sides[1],
        train_entries=entry_count - validation_entries,
        validation_entries=validation_entries,
        repeated_queries=entry_count - len(groups),
        seed=seed,
    )


def _keys_and_queries(examples: Sequence[Example]) -> tuple[Sequence[str], Sequence[str]]:
    if isinstance(examples, ExampleTable):
        return examples.entry_keys(), examples.queries()  # Without decoding any prompt.
    rows = [(example.entry_key, example.query) for example in examples]
    return [key for key, _ in rows], [query for _, query in rows]


def _chosen_groups(groups: Mapping[str, set[str]], wanted: int, seed: int) -> set[str]:
    """Choose whole groups, in an order fixed by the seed, that hold just the wanted entries."""

    def order(query: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{query}".encode(), digest_size=16).digest()

    chosen: set[str] = set()
    missing = wanted
    for query in sorted(groups, key=order):
        if 0 < len(groups[query]) <= missing:
            chosen.add(query)
            missing -= len(groups[query])
    if missing:
        reached = wanted - missing
        raise DataError(
            f"validation_entries = {wanted:,} cannot be met exactly",
            "entries with the same query stay together, and their groups do not add up to it",
            f"set validation_entries to {reached:,}",
        )
    return chosen


def leak_report(splits: Mapping[str, Sequence[str]]) -> LeakReport:
    """Count the queries that repeat within a split or are in two of them.

    Args:
        splits: The queries of each split, one per row or entry, by the split's name.

    Returns:
        The counts; pairs in the order of the mapping.
    """
    exact = {name: Counter(queries) for name, queries in splits.items()}
    normal = {name: Counter(map(normalise_query, queries)) for name, queries in splits.items()}
    within = tuple(
        SplitRepeats(
            name=name,
            rows=len(queries),
            exact=len(queries) - len(exact[name]),
            normalised=len(queries) - len(normal[name]),
        )
        for name, queries in splits.items()
    )
    return LeakReport(
        within=within,
        between=tuple(_pair_leak(a, b, exact, normal) for a, b in combinations(splits, 2)),
    )


def _pair_leak(
    first: str,
    second: str,
    exact: Mapping[str, Counter[str]],
    normal: Mapping[str, Counter[str]],
) -> PairLeak:
    shared = normal[first].keys() & normal[second].keys()
    return PairLeak(
        first=first,
        second=second,
        exact=len(exact[first].keys() & exact[second].keys()),
        normalised=len(shared),
        rows_in_first=sum(normal[first][query] for query in shared),
        rows_in_second=sum(normal[second][query] for query in shared),
    )


def leaking_rows(queries: Iterable[str], held_out: Iterable[str]) -> list[int]:
    """Find the training rows whose query is also held out, for a caller that drops them.

    Args:
        queries: The query of each training row.
        held_out: The queries of the test or validation rows.

    Returns:
        The row numbers in `queries`, in order.
    """
    known = set(map(normalise_query, held_out))
    return [row for row, query in enumerate(queries) if normalise_query(query) in known]
