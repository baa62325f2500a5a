"""CPU threads: one is often faster than all on a shared machine, so both are timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

_REPEATS = 5
_LONG_STEP_S = 2.0
"""A step that takes longer with all threads is work enough for them, and timing would take long."""


def usable_cores() -> int:
    """Count the cores that this process may run on, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def take_faster_threads(step: Callable[[], object]) -> None:
    """Time a step like those to come with all threads and with one; torch keeps the faster."""
    import torch

    cores, medians_s = usable_cores(), []
    for threads in dict.fromkeys((cores, 1)):
        torch.set_num_threads(threads)
        times = []
        for _ in range(1 + _REPEATS):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
            if threads > 1 and times[0] > _LONG_STEP_S:
                return
        medians_s.append(statistics.median(times[1:]))  # the first one is a warm-up
    # A clear win only: more threads suffer most when another program runs.
    if medians_s[0] * 1.15 < medians_s[-1]:
        torch.set_num_threads(cores)
