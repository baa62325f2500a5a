"""How sure a measured share is, and whether two planners differ.

Few lines, so that scoring needs no scipy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Bound a share by the 95 % Wilson score interval, which holds for few cases and near 0 and 1.

    A sum of scores between 0 and 1 may be given for the successes too (`Mean`). Without any case
    the bounds are 0 and 1.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.975)
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding must not leave a bound that excludes the share itself.
    low = 0.0 if successes == 0 else min(share, (centre - spread) / scale)
    high = 1.0 if successes == n else max(share, (centre + spread) / scale)
    return max(0.0, low), min(1.0, high)


def mcnemar_exact_p(only_a: int, only_b: int) -> float:
    """Test whether two planners differ on the same examples, by those where just one is right.

    Returns:
        The two-sided p-value of the exact (binomial) McNemar test; 1.0 if they never disagree.

    Source: Q. McNemar, Psychometrika 12 (1947), 153-157; exact form of the test.
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


@dataclass(frozen=True)
class Proportion:
    """A count out of a total."""

    count: int
    total: int

    def __post_init__(self) -> None:
        """Raise ValueError unless 0 <= count <= total."""
        if not 0 <= self.count <= self.total:
            raise ValueError(f"{self.count} of {self.total} is no proportion")

    @property
    def share(self) -> float:
        """Count by total; not a number if the total is 0."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        return wilson_interval(self.count, self.total)

    def to_json(self) -> dict[str, object]:
        """Give plain values; the share is null without cases."""
        return {
            "count": self.count,
            "total": self.total,
            "share": self.share if self.total else None,
            "interval_95": list(self.interval),
        }


@dataclass(frozen=True)
class Mean:
    """The mean of scores between 0 and 1.

    The interval is Wilson's with the sum of scores in the place of the count. Scores between 0
    and 1 with mean m vary by m(1 - m) at most, which is what Wilson assumes, so the interval is
    rather too wide than too narrow.
    """

    sum: float
    n: int

    @classmethod
    def of(cls, scores: Iterable[float]) -> Mean:
        """Average scores between 0 and 1."""
        values = list(scores)
        return cls(math.fsum(values), len(values))

    @property
    def mean(self) -> float:
        """The mean; not a number without scores."""
        return self.sum / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """A conservative 95 % interval of the mean."""
        return wilson_interval(self.sum, self.n)

    def to_json(self) -> dict[str, object]:
        """Give plain values; the mean is null without scores."""
        return {
            "n": self.n,
            "mean": self.mean if self.n else None,
            "interval_95": list(self.interval),
        }
