"""What a user sees while something takes long: lines, a panel of facts, bars on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tinyagent_fast.errors import printable
from tinyagent_fast.interrupts import raise_swallowed_interrupt

SILENT_S = 9.0
"""After so long without a line, one says what is going on; with the tick, at least every 10 s."""
_TICK_S = 0.5

Update = Callable[[int, int], None]
"""Is told what is done and how much there is in all; a total of 0 stands for an unknown one."""
Stage = Callable[[str, str], AbstractContextManager[Update]]
"""Begins a piece of long work by its label and unit: `Display.bar`, `Display.working`, `unseen`."""


@dataclass(eq=False)
class _Work:
    """Something that takes long, and how far it is."""

    label: str
    unit: str
    started_s: float
    done: int = 0
    total: int = 0
    first_done: int = 0
    """What was done when it was first told of, such as before a resume."""
    first_s: float = 0.0

    def tell(self, done: int, total: int, now_s: float) -> None:
        """Take up how far the work is; another total is that of another piece, such as a file."""
        if total != self.total or done < self.done:
            self.first_done, self.first_s = done, now_s
        self.done, self.total = done, total

    def line(self, now_s: float) -> str:
        """Say how far the work is, and what is left once its pace is known."""
        known = self.done or self.total
        far = f"{_amount(self.done, self.unit, self.total)}, " if known else ""
        left, made = "", self.done - self.first_done
        if made > 0 and self.total > self.done:
            left_s = (now_s - self.first_s) * (self.total - self.done) / made
            left = f", about {_rounded_time(left_s)} left"
        return f"{self.label}: {far}{now_s - self.started_s:.0f} s so far{left}"


def size_text(size_bytes: int) -> str:
    """Write a size with the unit that suits it, such as `12.0 MiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size_bytes >= 0.1 * 2**power:
            return f"{size_bytes / 2**power:,.1f} {unit}"
    return f"{size_bytes / 2**10:,.1f} KiB"


def _amount(done: int, unit: str, total: int = 0) -> str:
    if unit == "bytes":
        return size_text(done) + (f" of {size_text(total)}" if total else "")
    return f"{done:,}{f' of {total:,}' if total else ''} {unit}".rstrip()


def _rounded_time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@contextmanager
def unseen(_label: str, _unit: str = "") -> Iterator[Update]:
    """Be a stage that nobody is told of."""
    yield lambda _done, _total: None


class Display:
    """Prints to a console; long work gets a bar on a terminal, and no silence elsewhere."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.perf_counter) -> None:
        """Keep the console to print to, and the clock in seconds by which silence is measured."""
        self.console = console
        self._clock = clock
        self._begun_s: dict[str, float] = {}
        self._spent_s: dict[str, float] = {}
        self._said_s = clock()
        self._works: list[_Work] = []

    def say(self, text: str) -> None:
        """Print one line of plain text."""
        raise_swallowed_interrupt()
        self._print(text)

    def _print(self, text: str) -> None:
        self._said_s = self._clock()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """Print a panel with the name and value of each line."""
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(Text(name, style="bold"), Text(printable(value)))
        self.console.print(Panel(table, title=title, title_align="left", expand=False))

    def tell_if_silent(self) -> None:
        """Say what is going on and how far, if nothing was printed for long."""
        works, now_s = self._works[-1:], self._clock()
        if works and now_s - self._said_s >= SILENT_S:
            self._print(works[0].line(now_s))

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds of each piece of long work, also of what is under way, by its label."""
        now_s, seconds = self._clock(), self._spent_s.copy()
        for label, begun_s in self._begun_s.copy().items():
            seconds[label] = seconds.get(label, 0.0) + now_s - begun_s
        return seconds

    @contextmanager
    def timed(self, label: str) -> Iterator[None]:
        """Count the seconds of a piece of work; those of pieces with the same label add up."""
        self._begun_s[label] = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - self._begun_s.pop(label)
            self._spent_s[label] = self._spent_s.get(label, 0.0) + seconds

    @contextmanager
    def working(self, label: str, unit: str = "") -> Iterator[Update]:
        """Let no minute pass in silence where the output is no terminal, while something goes on.

        Works may stand in one another: the innermost is what is told of.

        Yields:
            A function to call with how many of the unit are done, and the total.
        """
        raise_swallowed_interrupt()
        work = _Work(label, unit, self._clock())

        def update(done: int, total: int) -> None:
            work.tell(done, total, self._clock())

        outermost = not self._works
        self._works.append(work)
        over = threading.Event()
        if outermost and not self.console.is_terminal and not self.console.quiet:
            threading.Thread(target=self._watch, args=[over], daemon=True).start()
        try:
            yield update
        finally:
            self._works.remove(work)
            over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_TICK_S):
            try:
                self.tell_if_silent()
            except (OSError, ValueError):  # whoever read the output has gone
                return

    @contextmanager
    def bar(self, label: str, unit: str = "") -> Iterator[Update]:
        """Do as `working`, show a bar on a terminal, and at the end say how long it took."""
        count, begun_s = "", self._clock()
        progress = Progress(
            TextColumn(label),
            BarColumn(),
            DownloadColumn(binary_units=True)
            if unit == "bytes"
            else TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        task = progress.add_task(label, total=None)
        with self.timed(label), self.working(label, unit) as tell, progress:

            def update(done: int, total: int) -> None:
                nonlocal count
                count = f"{_amount(done, unit)} " if done else ""
                progress.update(task, completed=done, total=total or None)
                tell(done, total)

            yield update
        self.say(f"{label}: {count}in {self._clock() - begun_s:.1f} s")
