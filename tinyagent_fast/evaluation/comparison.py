"""Two planners on the same queries: is one better, and how sure is that?

Export holds a quantised file against the one it was made from; `eval`, `compare` and reports say
what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.scoring import ScoredPlan
from tinyagent_fast.evaluation.statistics import Proportion, mcnemar_exact_p

_NEVER = 1e-40
"""Sums less probable than this are left out: they change no digit of a bound, but all would be
kept in a time that grows with the square of the examples."""


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Planner b beside planner a, on the same examples.

    `difference` is b's share of successes less a's; its interval says nothing where the two never
    disagree, which on few examples proves little. `only_a` and `only_b` are the keys that just one
    of them gets right; `identical_texts` counts predictions that are the same to the letter.
    """

    n: int
    success_a: Proportion
    success_b: Proportion
    difference: float
    interval_95: tuple[float, float]
    mcnemar_p: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    identical_texts: int

    def to_json(self) -> dict[str, object]:
        """Give plain values, shares with their intervals."""
        return {
            **vars(self),
            "success_a": self.success_a.to_json(),
            "success_b": self.success_b.to_json(),
            "interval_95": list(self.interval_95),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
        }

    def points(self) -> str:
        """Write the difference in percentage points, as `-1.5 (-3.0 to +0.5)`."""
        # Adding 0.0 makes -0.0 a plain zero.
        share, low, high = (
            f"{100 * value + 0.0:+.1f}" for value in (self.difference, *self.interval_95)
        )
        return f"{share} ({low} to {high})"


def compare_plans(a: Sequence[ScoredPlan], b: Sequence[ScoredPlan]) -> PairedComparison:
    """Compare the plans of two planners for the same examples, in any order.

    Raises:
        DataError: The plans are not for the same examples, or there are none.
    """
    by_key = {plan.prediction.key: plan for plan in b}
    keys = {plan.prediction.key for plan in a}
    if not a or keys != set(by_key) or not len(keys) == len(a) == len(b):
        raise DataError(
            f"{len(a)} and {len(b)} predictions to compare",
            "both must hold exactly one prediction of each of the same examples",
            "evaluate both on the same test file with the same --limit",
        )
    only_a: list[str] = []
    only_b: list[str] = []
    both = identical = 0
    for plan in a:
        row, other = plan.prediction, by_key[plan.prediction.key]
        if row.label != other.prediction.label:
            raise DataError(
                f"prediction {row.key}",
                "the two planners were given different labels for it",
                "evaluate both on the same test file",
            )
        right_a, right_b = plan.score.success, other.score.success
        both += right_a and right_b
        identical += row.prediction == other.prediction.prediction
        if right_a != right_b:
            (only_a if right_a else only_b).append(row.key)
    n = len(a)
    return PairedComparison(
        n=n,
        success_a=Proportion(both + len(only_a), n),
        success_b=Proportion(both + len(only_b), n),
        difference=(len(only_b) - len(only_a)) / n,
        interval_95=bootstrap_interval(len(only_a), len(only_b), n),
        mcnemar_p=mcnemar_exact_p(len(only_a), len(only_b)),
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        identical_texts=identical,
    )


def bootstrap_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Bound a paired difference by the percentile bootstrap over examples.

    An example adds -1, 0 or 1 to the difference, so what endless resampling tends to can be
    computed outright: the sum of n independent draws. That leaves no seed to choose.

    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    import numpy as np

    draw = np.array([only_a, n - only_a - only_b, only_b]) / n
    total, first = np.ones(1), 0  # the distribution of draws, from its first sum that matters
    for bit in bin(n)[2:]:  # by repeated doubling
        total, first = np.convolve(total, total), 2 * first
        if bit == "1":
            total = np.convolve(total, draw)
        likely = np.flatnonzero(total > _NEVER)
        total, first = total[likely[0] : likely[-1] + 1], first + int(likely[0])
    cumulative = np.cumsum(total)
    bounds = np.searchsorted(cumulative, np.array([0.025, 0.975]) * cumulative[-1])
    low, high = (first + int(bound) - n for bound in bounds)
    return low / n, high / n
