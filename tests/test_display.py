"""No silent minutes: where the output is no terminal, a line says what goes on and how far."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from tinyagent_fast import display as module
from tinyagent_fast.display import Display


class Clock:
    """A clock that goes on when it is told to."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def lines_of(display: Display) -> list[str]:
    written: Any = display.console.file
    return list(written.getvalue().splitlines())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def display(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Display:
    monkeypatch.setattr(module, "_TICK_S", 60.0)  # the test looks itself
    return Display(Console(file=io.StringIO(), width=200), clock)


def silences(display: Display, clock: Clock, seconds: int) -> list[float]:
    """Let time pass in ticks, and give the seconds from line to line."""
    said, last = [], clock.now_s
    for _ in range(2 * seconds):
        clock.now_s += 0.5
        before = len(lines_of(display))
        display.tell_if_silent()
        if len(lines_of(display)) > before:
            said.append(clock.now_s - last)
            last = clock.now_s
    return said


def test_work_that_says_nothing_is_told_of_at_least_every_ten_seconds(
    display: Display, clock: Clock
) -> None:
    with display.working("training", "steps") as update:
        update(3, 80)
        found = silences(display, clock, 61)
    assert len(found) == 6 and max(found) <= 10
    assert lines_of(display)[-1].startswith("training: 3 of 80 steps, 5")
    assert silences(display, clock, 60) == [], "nothing goes on any more"


@pytest.mark.parametrize(("before", "in_100_s"), [(0, 40), (0, 70), (80, 10)])
def test_the_time_left_is_told_by_the_pace_of_this_session(
    display: Display, clock: Clock, before: int, in_100_s: int
) -> None:
    with display.working("training", "steps") as update:
        update(before, 100)
        silences(display, clock, 10)
        assert "left" not in lines_of(display)[-1], "nothing has been made yet"
        clock.now_s += 90
        update(before + in_100_s, 100)
        display.tell_if_silent()
        number, unit = re.findall(r"about (\d+) (s|min) left", lines_of(display)[-1])[0]
        left_s = 100 * (100 - before - in_100_s) / in_100_s
        assert abs(int(number) * {"s": 1, "min": 60}[unit] - left_s) <= 30
        for done, total in ((100, 100), (1, 300)):  # the end, and the beginning of another file
            update(done, total)
            silences(display, clock, 10)
            assert "left" not in lines_of(display)[-1]


def test_pieces_of_one_name_add_up(display: Display, clock: Clock) -> None:
    for seconds in (3, 4):
        with display.bar("reading data"):
            clock.now_s += seconds
    assert display.timings_s == {"reading data": 7.0}
    assert lines_of(display) == ["reading data: in 3.0 s", "reading data: in 4.0 s"]


def test_bytes_are_said_in_units_that_people_read(display: Display, clock: Clock) -> None:
    with display.bar("merging", "bytes") as update:
        update(12 * 2**20, 3 * 2**30)
        silences(display, clock, 11)
    assert lines_of(display)[0].startswith("merging: 12.0 MiB of 3.0 GiB, ")
    assert lines_of(display)[-1].startswith("merging: 12.0 MiB in ")


def test_who_speaks_is_not_interrupted(display: Display, clock: Clock) -> None:
    with display.working("training"):
        for step in range(30):
            clock.now_s += 5
            display.say(f"step {step}")
            display.tell_if_silent()
    assert lines_of(display) == [f"step {step}" for step in range(30)]


def test_the_innermost_work_is_told_of(display: Display, clock: Clock) -> None:
    with display.working("train"):
        with display.bar("validation", "plans") as update:
            update(1, 4)
            silences(display, clock, 10)
        assert "validation: 1 of 4 plans" in lines_of(display)[0]
        silences(display, clock, 10)
    assert lines_of(display)[-1].startswith("train: ")


@pytest.mark.parametrize("name", ["working", "bar"])
def test_a_thread_looks_while_the_work_keeps_this_one_busy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TICK_S", 0.02)
    monkeypatch.setattr(module, "SILENT_S", 0.1)
    display = Display(Console(file=io.StringIO(), width=200))
    with getattr(display, name)("quantising", "bytes"):
        end = time.monotonic() + 20
        while not lines_of(display) and time.monotonic() < end:
            time.sleep(0.02)
        assert lines_of(display)[0].startswith("quantising: ")


def test_a_terminal_has_its_bar_and_no_such_lines(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    display = Display(console, clock)
    with display.working("training"):
        clock.now_s += 100
        time.sleep(0.1)
    assert lines_of(display) == []


def test_a_reader_that_has_gone_ends_the_lines_and_not_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_TICK_S", 0.01)
    monkeypatch.setattr(module, "SILENT_S", 0.0)
    file = io.StringIO()
    with Display(Console(file=file)).working("training"):
        file.close()
        time.sleep(0.1)
