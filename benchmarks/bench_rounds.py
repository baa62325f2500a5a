"""Timing for `bench`: all ways in turns in one process, so that a busy machine slows all of them.

A ratio is made within a round and never across rounds; what is reported is the median of the
rounds' ratios with the smallest and the largest.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """What each way took and gave, round by round."""

    seconds: dict[str, list[float]]
    results: dict[str, Result]
    """Of the first round."""


def in_turns(
    ways: Mapping[str, Callable[[], Result]],
    rounds: int,
    step: Callable[[str], None] = lambda _: None,
) -> Timed[Result]:
    """Run all ways one after the other, and that several times.

    Args:
        ways: Functions by name, in the order in which they run.
        rounds: How often.
        step: Called with a way's name before it runs.

    Returns:
        Seconds of each way in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Result] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            step(name)
            gc.collect()
            started = time.perf_counter()
            found = run()
            seconds[name].append(time.perf_counter() - started)
            results.setdefault(name, found)
    return Timed(seconds, results)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Summarise the rounds of one figure.

    Args:
        values: One for each round.

    Returns:
        Median, smallest, largest and all of them.
    """
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "rounds": [round(v, 5) for v in values],
    }


def summary(
    seconds: Mapping[str, Sequence[float]], samples: Mapping[str, int], baseline: str
) -> dict[str, dict[str, Any]]:
    """Turn seconds into rates and ratios.

    Args:
        seconds: Of each way in each round.
        samples: How many each way did in a round.
        baseline: The way to compare with.

    Returns:
        For each way its seconds, its samples/s, and in each round how many times as many samples/s
        as the baseline it had.
    """
    rates = {name: [samples[name] / s for s in taken] for name, taken in seconds.items()}
    return {
        name: {
            "samples": samples[name],
            "seconds": spread(seconds[name]),
            "samples_per_s": spread(mine),
            "ratio": spread([a / b for a, b in zip(mine, rates[baseline], strict=True)]),
        }
        for name, mine in rates.items()
    }
