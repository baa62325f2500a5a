"""Stand-ins for models, and a planner served in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tinyagent_fast.chat.planners import Planner
from tinyagent_fast.chat.prompts import PromptSource
from tinyagent_fast.chat.web import PlannerServer, listen
from tinyagent_fast.chat.writers import Pieces, Written

WAIT_S = 20.0


class ScriptedWriter:
    """Writes what a test has put down for a request; `gate`, if given, lets each piece through."""

    def __init__(self, answers: dict[str, Sequence[str]] | Sequence[str]) -> None:
        self.answers = answers
        self.gate: threading.Semaphore | None = None
        self.asked: list[tuple[str | None, str]] = []
        self.closed = 0
        self.error: Exception | None = None

    def write(self, system: str | None, user: str) -> Pieces:
        self.asked.append((system, user))
        pieces = self.answers if not isinstance(self.answers, dict) else self.answers[user]
        try:
            for piece in pieces:
                if self.gate is not None:
                    assert self.gate.acquire(timeout=WAIT_S), "the test let nothing through"
                yield piece
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1
        return Written(stop_reason="stop", new_tokens=len(pieces), prompt_tokens=9, kept_tokens=4)


def planner_with(writer: ScriptedWriter, **changes: Any) -> Planner:
    prompts = PromptSource(system="tools", source="a test", question=("Q: ", ""))
    return Planner(writer, prompts, facts={"model": "scripted"}, **changes)


@contextmanager
def serving(planner: Planner, host: str = "127.0.0.1") -> Iterator[PlannerServer]:
    """Serve a planner in a thread, on a free port."""
    server = PlannerServer(planner, listen(host, 0), host)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(WAIT_S)


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition, and give what it gave."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT_S:.0f} s in vain for: {what}")
