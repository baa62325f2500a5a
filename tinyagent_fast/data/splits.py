"""Divides examples into training and validation by entry, and finds queries that leak across.

Two queries count as the same if their normalised forms are equal.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tinyagent_fast.config import Leaks
from tinyagent_fast.data.schema import short_text
from tinyagent_fast.errors import DataError, count_of

_SEPARATORS = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Row numbers of both sides, in file order."""

    train: list[int]
    validation: list[int]


@dataclass(frozen=True, slots=True)
class Repeats:
    """Rows of one split whose query an earlier row of the same split has."""

    name: str
    rows: int
    exact: int
    normalised: int


@dataclass(frozen=True, slots=True)
class Leak:
    """Queries that two splits share, as distinct queries and as rows of either side."""

    first: str
    second: str
    exact: int
    normalised: int
    rows_in_first: int
    rows_in_second: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakReport:
    """Repeated queries within each split and between each pair of splits."""

    within: tuple[Repeats, ...]
    between: tuple[Leak, ...]


def normalise_query(query: str) -> str:
    """Reduce a query to what must differ for two queries to be different.

    Letter case is folded, and each run of white space, punctuation and underscores becomes one
    space: "Call  Ann!" equals "call ann". A query of punctuation only stays as it is.
    """
    folded = query.casefold()
    return _SEPARATORS.sub(" ", folded).strip() or folded.strip()


def split_validation(
    entry_keys: Sequence[str], queries: Sequence[str], *, validation_entries: int, seed: int
) -> Split:
    """Set entries aside for validation, so that no entry and no query is on both sides.

    Which entries are chosen depends on the seed and the queries alone, not on their order. Keys and
    queries are those of each row.

    Raises:
        DataError: Too few entries, or repeated queries that do not add up to that number.
    """
    normalised = [normalise_query(query) for query in queries]
    groups: dict[str, set[str]] = {}
    for key, query in zip(entry_keys, normalised, strict=True):
        groups.setdefault(query, set()).add(key)
    entry_count = sum(map(len, groups.values()))
    if validation_entries and validation_entries >= entry_count:
        raise DataError(
            f"validation_entries = {validation_entries:,} of {entry_count:,} entries",
            "no entry would be left for training",
            "give a larger file"
            + f", or --data.validation-entries {entry_count // 10}" * (entry_count >= 10),
        )
    chosen = _chosen_groups(groups, validation_entries, seed)
    sides: tuple[list[int], list[int]] = ([], [])
    for row, query in enumerate(normalised):
        sides[query in chosen].append(row)
    return Split(train=sides[0], validation=sides[1])


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
        least = min(map(len, groups.values()))
        raise DataError(
            f"validation_entries = {wanted:,} cannot be met exactly",
            "entries with the same query stay together, and their groups do not add up to it",
            f"--data.validation-entries {wanted - missing or least}"
            if len(groups) > 1
            else "give a file with more than one query",
        )
    return chosen


def without_leaks(
    rows: Sequence[int], queries: Sequence[str], held_out: Iterable[str], policy: Leaks
) -> list[int]:
    """Leave out the training rows whose query stands in the test file, as `data.leaks` says.

    `queries` are those of all rows of the training file, `held_out` those of the test file.

    Raises:
        DataError: There are such rows, and the policy is "error"; or no other row is left.
    """
    known = set(map(normalise_query, held_out))
    leaking = [row for row in rows if normalise_query(queries[row]) in known]
    if not leaking or policy == "keep":
        return list(rows)
    if policy == "error" or len(leaking) == len(rows):
        raise DataError(
            f"{len(leaking):,} of {len(rows):,} training rows have a query of the test file",
            f"the first is {short_text(queries[leaking[0]])}: a score on the test file would "
            "count what was trained on",
            "remove these entries from the training file, or leave them out with --data.leaks drop"
            if len(leaking) < len(rows)
            else "give a test file with queries of its own",
        )
    left_out = set(leaking)
    return [row for row in rows if row not in left_out]


def mixture_text(generated: Mapping[str, Any]) -> str:
    """Say how a file's rows and generated ones were mixed.

    Args:
        generated: What data.json of a run has under that name.

    Raises:
        DataError: It is damaged.
    """
    try:
        left_out = generated["left_out"]
        return (
            f"{count_of(generated['own_rows'], 'row')}, {count_of(generated['own_passes'], 'time')}"
            f" each, among {generated['rows']:,} generated ones ({generated['path']}"
            + (f"; {count_of(left_out, 'more')} left out for held-out queries" if left_out else "")
            + ")"
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            "data.json of a run",
            f"what it says of the generated rows is damaged: {error!r}",
            "put the file back as it was written, from another copy, or train again",
        ) from error


def leak_report(splits: Mapping[str, Sequence[str]]) -> LeakReport:
    """Count the queries, one per row or entry, that repeat in a split or stand in two of them."""
    exact = {name: set(queries) for name, queries in splits.items()}
    normal = {name: Counter(map(normalise_query, queries)) for name, queries in splits.items()}
    between = []
    for first, second in combinations(splits, 2):
        shared = normal[first].keys() & normal[second].keys()
        rows = (sum(normal[name][query] for query in shared) for name in (first, second))
        between.append(Leak(first, second, len(exact[first] & exact[second]), len(shared), *rows))
    within = [
        Repeats(name, len(rows), len(rows) - len(exact[name]), len(rows) - len(normal[name]))
        for name, rows in splits.items()
    ]
    return LeakReport(within=tuple(within), between=tuple(between))
