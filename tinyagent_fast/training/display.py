"""What a user sees while a run trains: header panel, one line a log step, evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinyagent_fast.training.best import Evaluation

_LINE_EVERY_S = 20.0


class TrainingDisplay:
    """Prints to a console; on a terminal long work also gets a bar."""

    def __init__(self, console: Console) -> None:
        """Keep the console.

        Args:
            console: Where to print.
        """
        self.console = console
        self.timings_s: dict[str, float] = {}
        """Seconds of each piece of long work, by its label; written to timings.json."""
        self._started_s = time.perf_counter()
        self._first_step: int | None = None
        self._paused_s = 0.0

    def say(self, text: str) -> None:
        """Print one line.

        Args:
            text: Plain text.
        """
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """Print the panel that says what this run is.

        Args:
            title: Its title.
            facts: Name and value of each line.
        """
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
        started = time.perf_counter()
        seen = [0, 0]
        if not self.console.is_terminal:
            told = [started]

            def note(done: int, total: int) -> None:
                seen[:] = [done, total]
                if time.perf_counter() - told[0] > _LINE_EVERY_S:
                    told[0] = time.perf_counter()
                    self.say(f"{label}: {done}/{total} {unit}")

            yield note
        else:
            columns = (TextColumn(label), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            with Progress(
                *columns,
                TextColumn(unit),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            ) as progress:
                task = progress.add_task(label, total=None)

                def update(done: int, total: int) -> None:
                    seen[:] = [done, total]
                    progress.update(task, completed=done, total=total)

                yield update
        count = f"{seen[0]} {unit} " if seen[0] else ""
        seconds = time.perf_counter() - started
        self.timings_s[label] = round(seconds, 2)
        self.say(f"{label}: {count}in {seconds:.1f} s")

    def step(self, record: Mapping[str, Any]) -> None:
        """Print one line for a logged step.

        Args:
            record: As written to history.jsonl.
        """
        now = time.perf_counter()
        if self._first_step is None:
            self._first_step, self._started_s, self._paused_s = record["step"], now, 0.0
        done = record["step"] - self._first_step
        left = ""
        if done:
            seconds = (now - self._started_s - self._paused_s) / done
            left = f"  left {_duration(seconds * (record['of'] - record['step']))}"
        self.say(
            f"step {record['step']:>6}/{record['of']}  loss {record['loss']:.4f}  "
            f"lr {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} tokens/s{left}"
        )

    def evaluation(self, new: Evaluation, best: bool) -> None:
        """Print one line for an evaluation.

        Args:
            new: The measurement.
            best: Whether it is the best so far.
        """
        self._paused_s += new.seconds
        mark = "  <- best" if best else ""
        self.say(
            f"step {new.step:>6}  plan success {100 * new.success:.1f} % on {new.samples} "
            f"validation queries, loss {new.loss:.4f} ({new.seconds:.1f} s){mark}"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
