"""Ctrl-C and SIGTERM that no library can swallow: they are noted as well as raised.

A native module that imports another one in the middle of Ctrl-C clears the exception and goes on;
Python 3.11 makes a RuntimeError of one that comes while a class is made, native code a SystemError.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a program to end: the keys of a terminal; `kill`, batch systems and containers."""
_PYTHONS_OWN = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
NAMES: Mapping[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}

_BLOCKED_S = 2.0
"""An event loop that has not taken up a stop signal after so long is blocked by what it runs."""

_noted: list[int] = []
_cancel: list[Callable[[int], object]] = []
"""How the event loop under way is stopped by a signal, while it has not been yet."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C is for a program without a terminal."""


def exit_code(number: int) -> int:
    """Give a signal's exit code as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextmanager
def noting_interrupts(numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Note these signals inside; one that is not Python's own to handle is left alone."""

    def note(number: int, _: object) -> None:
        _noted.append(number)
        if not _cancel:
            raise _interrupt(number)
        _cancel.pop()(number)

    previous = {}
    for number in numbers:
        if signal.getsignal(number) is _PYTHONS_OWN[number]:
            try:
                previous[number] = signal.signal(number, note)
            except ValueError:  # only the main thread may
                break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if previous:  # else they are noted by who called
            _noted.clear()


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; in the main thread a stop signal cancels it and is raised at its end.

    Raised in the midst of an event loop, an exception takes with it what the loop had in hand, and
    a task that waits for that never ends. `asyncio.run` knows this for its own handler only. A loop
    that is blocked has nothing else in hand, and gets the signal once more.

    Raises:
        KeyboardInterrupt: A stop signal came. A second one is raised at once.
    """
    import asyncio

    async def whole() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        here = threading.get_ident()
        assert task is not None

        def cancel(number: int) -> None:
            again = threading.Timer(_BLOCKED_S, lambda: signal.pthread_kill(here, number))
            again.daemon = True
            again.start()
            loop.call_soon_threadsafe(again.cancel)
            loop.call_soon_threadsafe(task.cancel)

        _cancel.append(cancel)
        try:
            return await work
        finally:
            _cancel.clear()

    with noting_interrupts([signal.SIGINT]):  # of Python code; commands note all themselves
        try:
            return asyncio.run(whole())
        finally:
            raise_swallowed_interrupt()  # also where the work ended before it could be cancelled


def _interrupt(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def unwrapping_interrupts() -> Iterator[None]:
    """Let a stop signal leave as itself where whoever was under way made another error of it.

    Raises:
        KeyboardInterrupt: Such an error came from a signal, at whatever remove.
    """
    from tinyagent_fast.errors import UserError

    try:
        yield
    except Exception as error:
        cause = error.__cause__
        if isinstance(error, UserError) and isinstance(cause, KeyboardInterrupt):
            raise  # a command's own word on how it goes on
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__
        if cause is None and isinstance(error, SystemError) and _noted:
            cause = _interrupt(_noted[-1])  # native code does not always say what it came from
        if cause is None:
            raise
        raise cause from None


def raise_swallowed_interrupt() -> None:
    """Raise the signal that came before, if one did; for the beginning of each piece of work.

    Raises:
        KeyboardInterrupt: There was one, and whoever should have ended did not.
    """
    if _noted:
        stop = _interrupt(_noted[-1])
        _noted.clear()
        raise stop
