"""Time and memory of a function in a process of its own; on Linux."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_EVERY_S = 0.02


def measured(step: Callable[..., Mapping[str, Any] | None], *arguments: Any) -> dict[str, Any]:
    """Run a module's function in a new process.

    Returns:
        Its seconds, CPU seconds, peak_mib (what the process itself holds, without pages of mapped
        files) and peak_rss_mib (with them); then what the function gave.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, step, arguments).result()


def _measure(step: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    peak_mib = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak_mib
        while not done.wait(_EVERY_S):
            peak_mib = max(peak_mib, _status_mib("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    try:
        given = step(*arguments)
    finally:
        seconds = time.perf_counter() - started
        done.set()
        thread.join()
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(time.process_time(), 2),
        "peak_mib": peak_mib,
        "peak_rss_mib": round(_status_mib("VmHWM"), 1),
        **(given or {}),
    }


def _status_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024
