"""Splits by entry and by query, and the leaks between splits."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.data.schema import Example
from tinyagent_fast.data.splits import (
    leak_report,
    leaking_rows,
    normalise_query,
    split_validation,
)
from tinyagent_fast.errors import ConfigError, DataError


def make_rows(queries: list[str], points: int = 1) -> list[Example]:
    return [
        Example(
            key=f"k{entry}/{at}",
            entry_key=f"k{entry}",
            kind="plan",
            query=query,
            system=None,
            user=query,
            output="1. join()",
        )
        for entry, query in enumerate(queries)
        for at in range(points)
    ]


@pytest.mark.parametrize(
    ("query", "normalised"),
    [
        ("Call  Ann!", "call ann"),
        (' "Call_Ann"\n', "call ann"),
        ("STRASSE", "strasse"),
        ("Stra\u00dfe", "strasse"),
        ("Caf\u00e9 at 3:00", "caf\u00e9 at 3 00"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalising_keeps_only_what_makes_queries_differ(query: str, normalised: str) -> None:
    assert normalise_query(query) == normalised


@given(
    st.lists(st.sampled_from(["a", "A!", "b", "c c", "C  c", "d"]) | st.text(max_size=3)),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_no_entry_and_no_query_is_on_both_sides(
    queries: list[str], points: int, wanted: int, seed: int
) -> None:
    rows = make_rows(queries, points)
    try:
        split = split_validation(rows, validation_entries=wanted, seed=seed)
    except DataError:
        return
    sides = (split.train, split.validation)
    assert sorted(split.train + split.validation) == list(range(len(rows)))
    assert len({rows[row].entry_key for row in split.validation}) == wanted
    assert split.train_entries + split.validation_entries == len(queries)
    keys, texts = (
        [{value(rows[row]) for row in side} for side in sides]
        for value in (lambda r: r.entry_key, lambda r: normalise_query(r.query))
    )
    assert not keys[0] & keys[1]
    assert not texts[0] & texts[1]


def test_the_seed_decides_and_the_order_of_the_file_does_not() -> None:
    queries = [f"query {at}" for at in range(200)]
    shuffled = random.Random(0).sample(queries, len(queries))

    def chosen(order: list[str], seed: int) -> set[str]:
        split = split_validation(make_rows(order), validation_entries=20, seed=seed)
        return {order[row] for row in split.validation}

    assert chosen(queries, 1) == chosen(queries, 1) == chosen(shuffled, 1)
    assert chosen(queries, 1) != chosen(queries, 2)


def test_zero_validation_entries_leave_all_rows_for_training() -> None:
    split = split_validation(make_rows(["a", "b"]), validation_entries=0, seed=0)
    assert (split.train, split.validation) == ([0, 1], [])


def test_repeated_queries_are_counted() -> None:
    split = split_validation(make_rows(["a", "A", "b"]), validation_entries=1, seed=0)
    assert split.repeated_queries == 1
    assert split.validation == [2]


def test_too_small_a_file_is_refused_with_what_to_set() -> None:
    rows = make_rows([f"q {at}" for at in range(50)])
    with pytest.raises(DataError, match="set validation_entries to 5 or less"):
        split_validation(rows, validation_entries=50, seed=0)


def test_a_number_that_groups_cannot_make_is_refused_with_what_to_set() -> None:
    rows = make_rows(["a", "A", "b", "B"])
    with pytest.raises(DataError, match="set validation_entries to 2"):
        split_validation(rows, validation_entries=3, seed=0)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be negative"):
        split_validation([], validation_entries=-1, seed=0)


def test_forty_thousand_entries_take_about_a_second() -> None:
    queries = [f'Send "Report {at}" to Ann and Bob, then call Carl at {at}' for at in range(40_000)]
    rows = make_rows(queries)
    started = time.process_time()
    split = split_validation(rows, validation_entries=1000, seed=0)
    assert len(split.validation) == 1000
    assert time.process_time() - started < 5  # A wide margin for slow machines.


def test_leaks_are_counted_within_and_between_splits() -> None:
    report = leak_report({"train": ["a", "a", "A!", "b", "c"], "test": ["A", "b"], "val": ["z"]})
    train, test, validation = report.within
    assert (train.rows, train.exact, train.normalised) == (5, 1, 2)
    assert (test.exact, validation.normalised) == (0, 0)
    pairs = {(pair.first, pair.second): pair for pair in report.between}
    shared = pairs["train", "test"]
    assert (shared.exact, shared.normalised) == (1, 2)
    assert (shared.rows_in_first, shared.rows_in_second) == (4, 2)
    assert pairs["train", "val"].normalised == 0
    assert report.leaks
    assert not leak_report({"train": ["a", "a"], "test": ["b"]}).leaks


def test_rows_that_leak_can_be_found_to_drop_them() -> None:
    assert leaking_rows(["a", "B", "c", "b!"], ["b", "x"]) == [1, 3]
