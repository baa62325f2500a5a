"""What a user sees while something takes long: lines, a panel of facts, bars on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinyagent_fast.interrupts import raise_swallowed_interrupt

_LINE_EVERY_S = 20.0


class Display:
    """Prints to a console; on a terminal long work also gets a bar."""

    def __init__(self, console: Console) -> None:
        """Keep the console to print to."""
        self.console = console
        self.timings_s: dict[str, float] = {}
        """Seconds of each piece of long work, by its label; written to timings.json."""

    def say(self, text: str) -> None:
        """Print one line of plain text."""
        raise_swallowed_interrupt()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """Print a panel with the name and value of each line."""
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(f"[bold]{name}[/bold]", value)
        self.console.print(Panel(table, title=title, title_align="left", expand=False))

    @contextmanager
    def bar(self, label: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
        """Show a bar for long work on a terminal, and a line now and then elsewhere.

        Args:
            label: What is being done.
            unit: What is counted.

        Yields:
            A function to call with what is done and the total.
        """
        raise_swallowed_interrupt()
        started = told = time.perf_counter()
        done = 0
        progress = Progress(
            TextColumn(label),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        task = progress.add_task(label, total=None)

        def update(now_done: int, total: int) -> None:
            nonlocal done, told
            done = now_done
            progress.update(task, completed=done, total=total)
            if progress.disable and time.perf_counter() - told > _LINE_EVERY_S:
                told = time.perf_counter()
                self.say(f"{label}: {done}/{total} {unit}")

        with progress:
            yield update
        count = f"{done} {unit} " if done else ""
        seconds = time.perf_counter() - started
        self.timings_s[label] = round(seconds, 2)
        self.say(f"{label}: {count}in {seconds:.1f} s")
