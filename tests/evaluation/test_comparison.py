"""Two planners compared: figures that follow from their predictions alone, and no silent gaps."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.comparison import (
    PairedComparison,
    bootstrap_interval,
    compare_plans,
)
from tinyagent_fast.evaluation.scoring import Prediction, score_all
from tinyagent_fast.evaluation.statistics import Proportion, mcnemar_exact_p

RIGHT = '1. open_note("n", "")\n2. join()'
RIGHT_OTHERWISE = '1. open_note("n", "") \n2. join()'
WRONG = "1. join()"
Outcomes = Sequence[tuple[bool, bool]]


def predictions(right: Sequence[bool]) -> list[Prediction]:
    return [
        Prediction(
            key=f"k{at}",
            query="open n",
            label=RIGHT,
            prediction=RIGHT if success else WRONG,
            stop_reason="stop",
            new_tokens=5,
        )
        for at, success in enumerate(right)
    ]


def pair(outcomes: Outcomes) -> tuple[list[Prediction], list[Prediction]]:
    return predictions([a for a, _ in outcomes]), predictions([b for _, b in outcomes])


def compare(a: Sequence[Prediction], b: Sequence[Prediction]) -> PairedComparison:
    return compare_plans(score_all(a), score_all(b))


outcome_lists = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(outcome_lists)
def test_figures_count_who_is_right_where(outcomes: Outcomes) -> None:
    got = compare(*pair(outcomes))
    n = len(outcomes)
    assert got.n == n
    assert got.success_a == Proportion(sum(a for a, _ in outcomes), n)
    assert got.success_b == Proportion(sum(b for _, b in outcomes), n)
    assert got.difference == pytest.approx(got.success_b.share - got.success_a.share)
    assert got.only_a == tuple(f"k{at}" for at, o in enumerate(outcomes) if o == (True, False))
    assert got.only_b == tuple(f"k{at}" for at, o in enumerate(outcomes) if o == (False, True))
    assert got.mcnemar_p == mcnemar_exact_p(len(got.only_a), len(got.only_b))
    assert got.identical_texts == sum(a == b for a, b in outcomes)
    low, high = got.interval_95
    assert -1 <= low <= got.difference <= high <= 1


@given(outcome_lists)
def test_the_other_way_round_all_signs_change(outcomes: Outcomes) -> None:
    a, b = pair(outcomes)
    there, back = compare(a, b), compare(b, a)
    assert back.difference == pytest.approx(-there.difference)
    assert back.mcnemar_p == there.mcnemar_p
    low, high = there.interval_95
    # Quantiles of a lattice are taken from below on both sides, so one step may differ.
    assert back.interval_95 == pytest.approx((-high, -low), abs=1.01 / len(outcomes))


@given(outcome_lists, st.randoms())
def test_the_order_of_predictions_does_not_matter(outcomes: Outcomes, rng: random.Random) -> None:
    a, b = pair(outcomes)
    expected = compare(a, b)
    rng.shuffle(b)
    assert compare(a, b) == expected


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(3, 7, 60), (0, 2, 25), (20, 1, 80)])
def test_the_interval_is_that_of_ten_thousand_resamples(only_a: int, only_b: int, n: int) -> None:
    rng = random.Random(0)
    draws = [-1] * only_a + [1] * only_b + [0] * (n - only_a - only_b)
    means = [sum(rng.choices(draws, k=n)) / n for _ in range(10_000)]
    cuts = statistics.quantiles(means, n=40)
    assert bootstrap_interval(only_a, only_b, n) == pytest.approx((cuts[0], cuts[-1]), abs=1.01 / n)


def test_the_interval_of_the_largest_test_file_takes_no_time() -> None:
    started = time.process_time()
    low, high = bootstrap_interval(60, 40, 1022)
    bootstrap_interval(20_000, 25_000, 100_000)
    assert time.process_time() - started < 2
    # The normal approximation, which is good with so many disagreements.
    spread = 1.96 * (100 / 1022 - (20 / 1022) ** 2) ** 0.5 / 1022**0.5
    assert (low, high) == pytest.approx((-20 / 1022 - spread, -20 / 1022 + spread), abs=1.5 / 1022)


def test_planners_that_never_disagree_have_no_difference() -> None:
    got = compare(*pair([(True, True), (False, False)]))
    assert (got.difference, got.interval_95, got.mcnemar_p) == (0.0, (0.0, 0.0), 1.0)


def test_texts_are_compared_to_the_letter_and_success_by_the_plan() -> None:
    a = predictions([True])
    b = [replace(a[0], prediction=RIGHT_OTHERWISE)]
    got = compare(a, b)
    assert (got.success_b.count, got.identical_texts) == (1, 0)


@pytest.mark.parametrize("case", ["none", "fewer", "other keys", "twice"])
def test_predictions_of_different_examples_are_never_compared(case: str) -> None:
    a = predictions([True, False])
    b = {
        "none": [],
        "fewer": a[:1],
        "other keys": [replace(row, key=f"x{row.key}") for row in a],
        "twice": [a[0], a[0]],
    }[case]
    for left, right in ((a, b), (b, a)):
        with pytest.raises(DataError, match="exactly one prediction"):
            compare(left, right)
    with pytest.raises(DataError):
        compare([], [])


def test_predictions_with_different_labels_are_never_compared() -> None:
    a = predictions([True])
    with pytest.raises(DataError, match="different labels"):
        compare(a, [replace(a[0], label=WRONG)])
