"""Intervals and tests: known values and the bounds that must always hold."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.evaluation.statistics import (
    Mean,
    Proportion,
    mcnemar_exact_p,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_the_interval_has_its_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**6), st.data())
def test_the_interval_holds_the_share_and_stays_within_0_and_1(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n) | st.floats(0, n))
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1


def test_a_proportion_has_share_interval_and_json() -> None:
    share = Proportion(8, 10)
    assert share.share == 0.8
    assert share.interval == wilson_interval(8, 10)
    assert share.to_json()["count"] == 8
    with pytest.raises(ValueError, match="no proportion"):
        Proportion(2, 1)


def test_nothing_out_of_nothing_is_no_number_and_null_in_json() -> None:
    assert math.isnan(Proportion(0, 0).share)
    assert math.isnan(Mean.of([]).mean)
    assert Proportion(0, 0).to_json()["share"] is None
    assert json.loads(json.dumps(Mean.of([]).to_json(), allow_nan=False))["mean"] is None


def test_a_mean_of_zeros_and_ones_is_bounded_like_their_share() -> None:
    mean = Mean.of([1.0, 0.0, 1.0, 0.5, 0.5])
    assert (mean.mean, mean.n) == (0.6, 5)
    assert Mean.of([1, 1, 0]).interval == Proportion(2, 3).interval


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024), (9, 1, 22 / 1024)],
)
def test_mcnemar_has_its_known_values(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_exact_p(only_a, only_b) == pytest.approx(p)


def test_mcnemar_works_where_floats_would_overflow() -> None:
    assert 0 < mcnemar_exact_p(1000, 1100) < 0.05
