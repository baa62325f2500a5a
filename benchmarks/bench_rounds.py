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
    cpu_seconds: dict[str, list[float]]
    """Of all threads of this process; what other programs take hardly counts here."""
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
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Result] = {}
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again before every timing
    try:
        for _ in range(rounds):
            for name, run in ways.items():
                step(name)
                gc.collect()
                started, cpu_started = time.perf_counter(), time.process_time()
                found = run()
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)
                results.setdefault(name, found)
    finally:
        gc.unfreeze()
    return Timed(seconds, cpu_seconds, results)


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


def summary(timed: Timed[Any], samples: Mapping[str, int], baseline: str) -> dict[str, Any]:
    """Turn seconds into rates and ratios.

    Args:
        timed: All ways.
        samples: How many each way did in a round.
        baseline: The way to compare with.

    Returns:
        For each way its seconds, its samples/s, and how many times as many samples/s as the
        baseline it had in each round, by the clock and by CPU time.
    """
    return {
        name: {
            "samples": samples[name],
            "seconds": spread(taken),
            "cpu_seconds": spread(timed.cpu_seconds[name]),
            "samples_per_s": spread([samples[name] / s for s in taken]),
            "ratio": spread(_ratios(timed.seconds, samples, name, baseline)),
            "cpu_ratio": spread(_ratios(timed.cpu_seconds, samples, name, baseline)),
        }
        for name, taken in timed.seconds.items()
    }


def _ratios(
    seconds: Mapping[str, Sequence[float]], samples: Mapping[str, int], name: str, baseline: str
) -> list[float]:
    share = samples[name] / samples[baseline]
    return [share * b / a for a, b in zip(seconds[name], seconds[baseline], strict=True)]
