"""What becomes of generated plans: join and replan points, with observations that a sandbox makes.

A plan is run with or without a fault. A joiner finishes, tells what cannot be mended, or asks for
another plan; that one does again what was not done, and looks up again what this needs.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tinyagent_fast.agent.loop import (
    AgentSettings,
    Execution,
    execute,
    replan_user_text,
    scratchpad,
    whole_plan,
)
from tinyagent_fast.agent.sandbox import RECOVERABLE, choose_fault, malformed, sandbox_for
from tinyagent_fast.agent.tools import TRY_AGAIN
from tinyagent_fast.data.generation.catalogue import Catalogue
from tinyagent_fast.data.generation.prompts import joiner_prompt
from tinyagent_fast.plans.grammar import (
    JoinerAnswer,
    Plan,
    Step,
    references,
    render_plan,
    substitute,
)
from tinyagent_fast.plans.tools import JOIN

_NAME_GIVEN = re.compile(r'gain with "([^"]+)"|: "([^"]+)", a favourite')
_NAME_ASKED = re.compile(r'contact "([^"]+)"|fit "([^"]+)"')


@dataclass(frozen=True, kw_only=True)
class Point:
    """One call of the model after a plan: what it is asked and what it should write."""

    kind: str
    """`join` or `replan`."""
    user: str
    output: str
    parsed: Any
    """As the published files have it."""


class Outcomes:
    """Plays generated plans through, in a thread of its own, as a notebook has a loop already."""

    def __init__(self, catalogue: Catalogue) -> None:
        """Prepare for the plans of a catalogue."""
        self._tools = {tool.name: tool for tool in catalogue.tools}
        self._answers = {tool.name for tool in catalogue.tools if tool.mention is not None}
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(1, "outcomes")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
        self._loop.close()

    def points(
        self, query: str, user: str, plan: Plan, failure_share: float, rng: random.Random
    ) -> list[Point]:
        """Play a plan through, and write down what a joiner and a planner should say.

        `user` is the planner's user text. There is a join, and after one that replans a replan and
        another join.
        """
        played = self._thread.submit(self._play, query, user, plan, failure_share, rng)
        return played.result()

    def _play(
        self, query: str, user: str, plan: Plan, failure_share: float, rng: random.Random
    ) -> list[Point]:
        fails = rng.random() < failure_share
        fault = choose_fault(plan, rng, (*RECOVERABLE, "unknown")) if fails else None
        text = render_plan(plan)
        if fault is not None and fault.kind == "malformed":
            text = malformed(text, rng)
        sandbox = sandbox_for(plan, self._tools, faults=[fault] if fault else [])
        # No call of the sandbox waits for anything but a slow fault, so any limit will do.
        settings = AgentSettings(call_timeout_s=0.001)

        def run(text: str) -> Execution:
            return self._loop.run_until_complete(execute(whole_plan(text), sandbox.tools, settings))

        first = run(text)
        verdict = self._verdict(first)
        points = [_join(query, [first], verdict)]
        if verdict.action == "Replan":
            again = replan(plan, first, {n: t.changes for n, t in sandbox.tools.items()})
            points.append(
                Point(
                    kind="replan",
                    user=replan_user_text(user, [(first, verdict.thought)]),
                    output=render_plan(again),
                    parsed=[
                        {"tool_name": s.tool, "tool_args": list(s.arguments)} for s in again.steps
                    ],
                )
            )
            second = run(render_plan(again))
            points.append(_join(query, [first, second], self._verdict(second)))
        sandbox.close()
        return points

    def _verdict(self, execution: Execution) -> JoinerAnswer:
        failures = execution.failures
        if any(TRY_AGAIN in failure.lower() for failure in failures):
            return JoinerAnswer("A call failed and can be mended.", "Replan", "")
        if failures:
            told = failures[0].removeprefix("Error: ")
            return JoinerAnswer("A call failed and cannot be mended.", "Finish", told)
        last = execution.calls[-1]
        if last.step.tool in self._answers:
            return JoinerAnswer("The last result is the answer.", "Finish", last.observation)
        return JoinerAnswer("All calls succeeded.", "Finish", "Task completed!")


def replan(plan: Plan, execution: Execution, changes: Mapping[str, bool]) -> Plan:
    """Plan what is left of a plan after a run of it, with what the observations advise.

    Calls that only look something up are made again where their results are needed; what has
    changed something already, as `changes` says by tool, is not done twice: its result is written
    out.
    """
    done = {call.step.number: call for call in execution.calls if call.status == "done"}
    steps = {step.number: step for step in plan.steps if step.tool != JOIN}
    wanted = [number for number in steps if number not in done]
    kept: set[int] = set()
    while wanted:
        number = wanted.pop()
        kept.add(number)
        needs = references(steps[number].arguments) & set(steps)
        wanted += [n for n in needs - kept if n not in done or not changes[steps[n].tool]]
    names = _advised_names(execution)
    filled: dict[int, object] = {n: c.observation for n, c in done.items() if n not in kept}
    filled |= {number: f"${at}" for at, number in enumerate(sorted(kept), 1)}
    made = []
    for at, number in enumerate(sorted(kept), start=1):
        arguments = [substitute(a, filled) for a in steps[number].arguments]
        renamed = tuple(names.get(a, a) if isinstance(a, str) else a for a in arguments)
        made.append(Step(number=at, tool=steps[number].tool, arguments=renamed))
    return Plan((*made, Step(number=len(made) + 1, tool=JOIN, arguments=())))


def _advised_names(execution: Execution) -> dict[str, str]:
    """Find the names that observations give for those that were asked for."""
    names = {}
    for call in execution.calls:
        given, asked = (p.search(call.observation) for p in (_NAME_GIVEN, _NAME_ASKED))
        if call.status == "failed" and given and asked:
            names[next(filter(None, asked.groups()))] = next(filter(None, given.groups()))
    return names


def _join(query: str, executions: Sequence[Execution], verdict: JoinerAnswer) -> Point:
    answer = f"{verdict.action}({verdict.message})" if verdict.message else str(verdict.action)
    return Point(
        kind="join",
        user=joiner_prompt(query, scratchpad(executions)),
        output=f"Thought: {verdict.thought}\nAction: {answer}",
        parsed=dict(vars(verdict)),
    )
