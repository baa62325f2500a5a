"""Ctrl-C and SIGTERM that no library can swallow: they are noted as well as raised.

A native module that imports another one in the middle of Ctrl-C clears the exception and goes on.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a program to end: the keys of a terminal; `kill`, batch systems and containers."""
NAMES: Mapping[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_noted: list[int] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C is for a program without a terminal."""


def exit_code(number: int) -> int:
    """Give a signal's exit code as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def noting_interrupts() -> Iterator[None]:
    """Note every stop signal inside; one that is not Python's own to handle is left alone."""

    def note(number: int, _: object) -> None:
        _noted.append(number)
        raise _interrupt(number)

    previous = {}
    for number, usual in zip(
        STOP_SIGNALS, (signal.default_int_handler, signal.SIG_DFL), strict=True
    ):
        if signal.getsignal(number) is usual:
            try:
                previous[number] = signal.signal(number, note)
            except ValueError:  # only the main thread may
                break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _noted.clear()


def _interrupt(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def noted_interrupt() -> KeyboardInterrupt | None:
    """Give the signal that came, if one did; native code may have made another error of it."""
    return _interrupt(_noted[-1]) if _noted else None


def raise_swallowed_interrupt() -> None:
    """Raise the signal that came before, if one did; for the beginning of each piece of work.

    Raises:
        KeyboardInterrupt: There was one, and whoever should have ended did not.
    """
    if stop := noted_interrupt():
        _noted.clear()
        raise stop
