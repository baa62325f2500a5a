"""Splits by entry and by query, and the leaks between splits."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.data.splits import (
    Split,
    leak_report,
    normalise_query,
    split_validation,
    without_leaks,
)
from tinyagent_fast.errors import DataError


def split(
    queries: list[str], validation_entries: int, seed: int = 0, points: int = 1
) -> tuple[list[str], list[str], Split]:
    """Split entries with these queries and so many rows each; keys and queries of the rows too."""
    keys = [f"k{at}" for at in range(len(queries)) for _ in range(points)]
    texts = [query for query in queries for _ in range(points)]
    found = split_validation(keys, texts, validation_entries=validation_entries, seed=seed)
    return keys, texts, found


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
    try:
        keys, texts, found = split(queries, wanted, seed, points)
    except DataError:
        return
    assert sorted(found.train + found.validation) == list(range(len(keys)))
    assert len({keys[row] for row in found.validation}) == wanted
    for values in (keys, [normalise_query(text) for text in texts]):
        train, validation = (
            {values[row] for row in side} for side in (found.train, found.validation)
        )
        assert not train & validation


def test_the_seed_decides_and_the_order_of_the_file_does_not() -> None:
    queries = [f"query {at}" for at in range(200)]
    shuffled = random.Random(0).sample(queries, len(queries))

    def chosen(order: list[str], seed: int) -> set[str]:
        return {order[row] for row in split(order, 20, seed)[2].validation}

    assert chosen(queries, 1) == chosen(queries, 1) == chosen(shuffled, 1)
    assert chosen(queries, 1) != chosen(queries, 2)


def test_zero_validation_entries_leave_all_rows_for_training() -> None:
    found = split(["a", "b"], 0)[2]
    assert (found.train, found.validation) == ([0, 1], [])


def test_entries_with_the_same_query_stay_together() -> None:
    assert split(["a", "A", "b"], 1)[2].validation == [2]


def test_too_small_a_file_is_refused_with_what_to_set() -> None:
    with pytest.raises(DataError, match=r"--data\.validation-entries 5"):
        split([f"q {at}" for at in range(50)], 50)
    with pytest.raises(DataError) as error:
        split(["a", "b", "c"], 3)
    assert error.value.fix == "give a larger file"


def test_a_number_that_groups_cannot_make_is_refused_with_what_to_set() -> None:
    with pytest.raises(DataError, match=r"--data\.validation-entries 2"):
        split(["a", "A", "b", "B"], 3)


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6), wanted=st.integers(1, 60))
def test_what_is_said_of_a_number_that_cannot_be_met_can_be_followed(
    sizes: list[int], wanted: int
) -> None:
    queries = [f"q {query}" for query, size in enumerate(sizes) for _ in range(size)]
    wanted = min(wanted, len(queries) - 1)
    try:
        split(queries, wanted)
    except DataError as error:
        _, _, number = error.fix.partition("--data.validation-entries ")
        assert number or len(sizes) == 1
        if number:
            assert len(split(queries, int(number))[2].validation) == int(number) > 0


def test_forty_thousand_entries_take_about_a_second() -> None:
    queries = [f'Send "Report {at}" to Ann and Bob, then call Carl at {at}' for at in range(40_000)]
    started = time.process_time()
    assert len(split(queries, 1000)[2].validation) == 1000
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


def test_rows_that_leak_are_left_out_kept_or_an_error() -> None:
    queries = ["a", "B", "c", "b!"]
    assert without_leaks([0, 1, 3], queries, ["b", "x"], "drop") == [0]
    assert without_leaks([0, 1, 3], queries, ["b", "x"], "keep") == [0, 1, 3]
    assert without_leaks([2, 0], queries, ["b", "x"], "error") == [2, 0]
    with pytest.raises(DataError, match="2 of 3 training rows"):
        without_leaks([0, 1, 3], queries, ["b"], "error")
    with pytest.raises(DataError, match="queries of its own"):
        without_leaks([1, 3], queries, ["b"], "drop")
