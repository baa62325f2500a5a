"""CPU threads: one is often faster than all on a shared machine, so both are timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

_REPEATS = 5
_LONG_STEP_S = 2.0
"""A step that takes longer with all threads is work enough for them, and timing would take long."""


def fastest_threads(step: Callable[[], object]) -> int:
    """Time a step with all threads and with one, set the faster number, and return it.

    Args:
        step: A forward and backward pass like those to come.

    Returns:
        The number of threads that torch uses from now on.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    best = (float("inf"), 1)
    for threads in sorted({1, cores or 1}, reverse=True):
        torch.set_num_threads(threads)
        times = []
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
            if threads > 1 and times[0] > _LONG_STEP_S:
                return threads
        # The median without the first, and a clear win only: more threads suffer most when another
        # program runs.
        median = statistics.median(times[1:])
        best = min(best, (median * (1.0 if threads == 1 else 1.15), threads))
    torch.set_num_threads(best[1])
    return best[1]
