"""Ctrl-C that no library can swallow: it is noted as well as raised.

A native module that imports another one in the middle of Ctrl-C clears the exception and goes on.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_noted: list[int] = []


@contextmanager
def noting_interrupts() -> Iterator[None]:
    """Note every Ctrl-C inside; where it is not Python's own to handle, it is left alone."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:
        yield
        return

    def note(number: int, _: object) -> None:
        _noted.append(number)
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        _noted.clear()


def raise_swallowed_interrupt() -> None:
    """Raise the Ctrl-C that came before, if there was one; for the beginning of each piece of work.

    Raises:
        KeyboardInterrupt: There was one, and whoever should have ended did not.
    """
    if _noted:
        _noted.clear()
        raise KeyboardInterrupt
