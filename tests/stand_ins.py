"""Stand-ins for models, and a planner served in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tinyagent_fast.agent.session import AgentSpec, open_agent
from tinyagent_fast.chat.web import PlannerServer, listen
from tinyagent_fast.inference.engine import Completion, Limits, OnToken, Prompt
from tinyagent_fast.inference.planner import Planner
from tinyagent_fast.prompts.builder import ChosenText, PromptBuilder
from tinyagent_fast.runs import Run

WAIT_S = 20.0


class ScriptedWriter:
    """An engine that writes what a test has put down for a request.

    `gate`, if given, lets each piece through.
    """

    compute_dtype = "float32"

    def __init__(self, answers: Mapping[str, Sequence[str]] | Sequence[str]) -> None:
        self.answers = answers
        self.gate: threading.Semaphore | None = None
        self.asked: list[tuple[str | None, str]] = []
        self.closed = 0
        """Plans that have ended, in whatever way."""
        self.error: BaseException | None = None

    def identity(self) -> Mapping[str, Any]:
        return {}

    def notes(self, prompts: Sequence[Prompt]) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        for index, prompt in enumerate(prompts):
            self.asked.append((prompt.system, prompt.user))
            answers = self.answers
            pieces = answers[prompt.user] if isinstance(answers, Mapping) else answers
            try:
                for piece in pieces:
                    if self.gate is not None:
                        assert self.gate.acquire(timeout=WAIT_S), "the test let nothing through"
                    if on_token is not None:
                        on_token(index, piece)
                if self.error is not None:
                    raise self.error
            finally:
                self.closed += 1
            yield (
                index,
                Completion(
                    text="".join(pieces),
                    stop_reason="stop",
                    new_tokens=len(pieces),
                    prompt_tokens=9,
                    cached_tokens=4,
                    seconds=0.25,
                ),
            )


def planner_with(
    writer: ScriptedWriter, run: Run | None = None, facts: Mapping[str, str] | None = None
) -> Planner:
    prompts = PromptBuilder(system=ChosenText("tools", "a test"), question=("Q: ", ""))
    return Planner(writer, prompts, facts=facts or {"model": "scripted"}, run=run)


@contextmanager
def serving(
    planner: Planner, host: str = "127.0.0.1", agent: AgentSpec | None = None
) -> Iterator[PlannerServer]:
    """Serve a planner and an agent, by default in a sandbox, in a thread, on a free port."""
    server = PlannerServer(
        planner, listen(host, 0), host, open_agent(planner, agent or AgentSpec())
    )
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
