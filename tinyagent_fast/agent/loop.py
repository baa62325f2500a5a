"""Plan, run, judge, and plan again: the loop of an agent, after LLMCompiler.

A plan's calls start while it is still being written, as soon as what they need is done, and side by
side. A call that fails becomes an observation; what needs its result is not run, and says so.

Source: github.com/SqueezeAILab/LLMCompiler (the loop and the texts it puts together).
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

from tinyagent_fast.agent.tools import TRY_AGAIN, RunnableTool, ToolError, as_text
from tinyagent_fast.errors import UserError, count_of
from tinyagent_fast.inference.engine import Completion, Prompt
from tinyagent_fast.plans.grammar import (
    JoinerAnswer,
    Step,
    read_plan,
    reference_uses,
    render_call,
    substitute,
)
from tinyagent_fast.plans.tools import JOIN, call_problems

Status = Literal["done", "done before", "failed", "skipped", "refused"]
"""`done before` is what an earlier plan of the same request did, and is not done again."""

_MAX_CALLS = 100
_DEEPEST_LIST = 20
_LONGEST_OBSERVATION_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class CallRecord:
    """What became of one call of a plan."""

    step: Step
    status: Status
    arguments: tuple[object, ...]
    """With results filled in, as far as they were there; converted where the tool was asked."""
    value: object = None
    """What the tool gave; None unless it is done."""
    observation: str
    """The same as a text, or why there is no result."""
    needs: tuple[int, ...] = ()
    """Numbers of the calls whose results it uses."""
    changes: bool = False
    """Its tool changes something, so a plan that leaves it out leaves it undone."""
    unsettled: bool = False
    """It took too long and could not be broken off, so it may still be done."""
    started_s: float
    """Since the plan began: when the tool was asked, or else when what it needs was there."""
    ended_s: float

    @property
    def is_done(self) -> bool:
        """Whether its result is there, from this plan or an earlier one."""
        return self.status in ("done", "done before")

    def shown(self) -> str:
        """Write the call with results filled in, for a prompt or a person."""
        return _shown(self.step.tool, self.arguments)

    def to_json(self) -> dict[str, Any]:
        """Give plain values for a trace."""
        return {
            "number": self.step.number,
            "tool": self.step.tool,
            "arguments": [_plain(argument) for argument in self.arguments],
            "call": self.shown(),
            "needs": list(self.needs),
            "status": self.status,
            "observation": self.observation,
            "started_s": round(self.started_s, 3),
            "ended_s": round(self.ended_s, 3),
        }


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A plan that was run."""

    text: str
    calls: tuple[CallRecord, ...]
    """In the order of the plan, join left out."""
    problem: str | None = None
    """Why the rest of the plan was not run, if so; an observation as others."""
    left_running: tuple[str, ...] = ()
    """Tools that did not end when they were told to: plain functions cannot be broken off."""

    @property
    def failed(self) -> bool:
        """Whether anything of the plan was not done."""
        return self.problem is not None or not all(call.is_done for call in self.calls)

    @property
    def failures(self) -> tuple[str, ...]:
        """Observations of what failed or was refused, then why the plan was stopped, if it was."""
        of_calls = (c.observation for c in self.calls if c.status in ("failed", "refused"))
        return (*of_calls, *([self.problem] if self.problem else []))

    @property
    def sequential_s(self) -> float:
        """Time that the calls would take one after another."""
        return sum(call.ended_s - call.started_s for call in self.ran)

    @property
    def seconds(self) -> float:
        """Time from the first call's start to the last one's end."""
        ran = self.ran
        return max((c.ended_s for c in ran), default=0) - min((c.started_s for c in ran), default=0)

    @property
    def ran(self) -> list[CallRecord]:
        """The calls that were tried in this plan."""
        return [call for call in self.calls if call.status in ("done", "failed")]


def left_undone(executions: Sequence[Execution]) -> list[CallRecord]:
    """Find the calls of earlier plans that should have changed something and did not.

    A later call of the same tool that is done makes up for all whose texts and numbers are among
    its own, as where two recipients become one list; else for one, as its arguments may well have
    been corrected.
    """
    left: list[CallRecord] = []
    for execution in executions[:-1]:
        left = _still_undone(left, execution)
        left += [call for call in execution.calls if call.changes and not call.is_done]
    return _still_undone(left, executions[-1])


def _still_undone(left: Sequence[CallRecord], later: Execution) -> list[CallRecord]:
    remaining, others = list(left), []
    done = [call for call in later.calls if call.status == "done"]
    for call in done:
        parts = set(_parts(call.arguments))
        same = [c for c in remaining if c.step.tool == call.step.tool]
        contained = [c for c in same if parts.issuperset(_parts(c.arguments))]
        remaining = [c for c in remaining if c not in contained]
        if not contained:
            others.append(call)
    for call in others:
        corrected = next((c for c in remaining if c.step.tool == call.step.tool), None)
        remaining = [c for c in remaining if c is not corrected]
    return remaining


def _parts(value: object) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _parts(item)
    else:
        yield as_text(value)


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Limits of the loop."""

    max_replans: int = 2
    """How often another plan is made at most."""
    call_timeout_s: float = 30.0
    """Longest time for one call; a tool may have its own."""
    grace_s: float = 2.0
    """How long a call that was broken off may take to end."""


Allow = Callable[[RunnableTool, Sequence[object]], Awaitable[bool]]
OnEvent = Callable[[str, Mapping[str, Any]], None]
Pieces = AsyncGenerator[str, None]
"""A plan's text as it is written; closing it breaks the writer off."""


async def allow_all(_tool: RunnableTool, _arguments: Sequence[object]) -> bool:
    """Allow every change, as in a sandbox."""
    return True


async def execute(
    pieces: Pieces,
    tools: Mapping[str, RunnableTool],
    settings: AgentSettings = AgentSettings(),
    *,
    allow: Allow = allow_all,
    on_event: OnEvent = lambda _kind, _content: None,
    before: Sequence[Execution] = (),
) -> Execution:
    """Run a plan while it is being written.

    Cancelling it, and leaving it in any other way, leaves no call running; plain functions, which
    cannot be broken off, are waited for up to `grace_s` and then named. A call that changes
    something, and that a plan of `before` did with the same arguments, or may still be doing, is
    not run again: what it gave then stands. The rest beside the plan's text is as for `Agent`.

    Raises:
        UserError: No plan can be written, before anything was carried out; later such an error is
            the plan's problem, so that what was done is not lost.
    """
    return await _Plan(tools, settings, allow, on_event, before).run(pieces)


async def whole_plan(text: str) -> Pieces:
    """Give a plan that is there already in one piece, for `execute`."""
    yield text


class _TimedOut(Exception):
    """A call took too long; not one of the errors that a tool may raise itself."""


@dataclass(eq=False)
class _Plan:
    """One plan under way: a task for each call, which waits for the tasks that it needs."""

    tools: Mapping[str, RunnableTool]
    settings: AgentSettings
    allow: Allow
    on_event: OnEvent
    before: Sequence[Execution]
    began: float = field(default_factory=time.perf_counter)
    tasks: dict[int, asyncio.Task[CallRecord]] = field(default_factory=dict)
    inner: dict[asyncio.Future[Any], str] = field(default_factory=dict)
    """What runs inside calls, with the tool's name, until it has really ended."""

    async def run(self, pieces: Pieces) -> Execution:
        """Start the calls of a plan as its lines come, and wait for all of them."""
        try:
            text, problem = await self.read(pieces)
            if self.tasks:
                await asyncio.wait(self.tasks.values())
        finally:
            left = await self.stop()
        calls = tuple(task.result() for task in self.tasks.values())
        return Execution(text=text, calls=calls, problem=problem, left_running=left)

    async def read(self, pieces: Pieces) -> tuple[str, str | None]:
        """Take a plan to its end or to what is wrong with it, which is given beside the text."""
        text, done_chars = "", 0
        try:
            async with aclosing(pieces) as written:
                async for piece in written:
                    text += piece
                    self.on_event("text", {"piece": piece})
                    while (end := text.find("\n", done_chars)) >= 0:
                        done_chars = end + 1
                        problem = self.start_calls(text[:done_chars], whole=False)
                        if problem is not None:
                            return text, problem
        except UserError as error:
            if not self.tasks and not any(one.calls for one in self.before):
                raise
            return text, f"Error: no more of the plan could be written: {error.what}: {error.why}"
        return text, self.start_calls(text, whole=True)

    def start_calls(self, text: str, *, whole: bool) -> str | None:
        """Start what the text has newly; give what is wrong with it, which ends the plan."""
        reading = read_plan(text)
        told = next(
            (p for p in reading.problems if whole or p.code not in ("no_join", "empty")), None
        )
        steps = [step for step in reading.steps if step.tool != JOIN]
        for step in steps[len(self.tasks) :]:
            if step.number in self.tasks:
                break  # `told` says so
            if step.tool not in self.tools:
                return _stopped(f"there is no tool {step.tool}")
            if len(self.tasks) == _MAX_CALLS:
                return _stopped(f"it has more than {_MAX_CALLS} calls")
            earlier = [number for number in self.tasks if number < step.number]
            self.tasks[step.number] = asyncio.create_task(self.call(step, earlier))
            self.on_event("call", {"number": step.number, "tool": step.tool})
        return None if told is None else _stopped(told.message)

    async def call(self, step: Step, earlier: Sequence[int]) -> CallRecord:
        """Wait for the calls that one needs, then run it."""
        tool = self.tools[step.tool]
        uses = reference_uses(step.arguments)
        needs = tuple(sorted({number for number, _ in uses if number in earlier}))
        if needs:
            await asyncio.wait([self.tasks[number] for number in needs])
        started = self.now()
        before = {number: self.tasks[number].result() for number in needs}
        values = {number: call.value for number, call in before.items() if call.is_done}
        arguments = tuple(substitute(argument, values) for argument in step.arguments)

        def ended(
            status: Status, observation: str, value: object = None, *, unsettled: bool = False
        ) -> CallRecord:
            record = CallRecord(
                step=step,
                status=status,
                arguments=arguments,
                value=value,
                observation=observation,
                needs=needs,
                changes=tool.changes,
                unsettled=unsettled,
                started_s=started,
                ended_s=self.now(),
            )
            self.on_event("observation", record.to_json())
            return record

        if missing := [call for call in before.values() if not call.is_done]:
            names = ", ".join(f"${c.step.number} ({c.step.tool})" for c in missing)
            return ended("skipped", f"Not run: it needs the result of {names}.")
        astray = [number for number, whole in uses if whole and number not in earlier]
        if astray:
            return ended("failed", f"Error: ${astray[0]} is no earlier call; {TRY_AGAIN}.")
        for _, wrong in call_problems(step.tool, step.arguments, {step.tool: tool.tool}):
            return ended("failed", f"Error: {wrong}; {TRY_AGAIN}.")
        try:
            arguments = tuple(tool.arguments(arguments))
        except ToolError as error:
            return ended("failed", f"Error: {error}")
        if was := self.begun_before.get(_shown(tool.name, arguments)):
            if was.unsettled:
                return ended("failed", was.observation, unsettled=True)
            return ended("done before", was.observation, was.value)
        if tool.changes and not await self.allow(tool, arguments):
            return ended("refused", "Not done: it was not allowed.")
        try:
            started = self.now()
            self.on_event("start", {"number": step.number, "arguments": list(arguments)})
            limit = tool.timeout_s or self.settings.call_timeout_s
            value = await self.bounded(tool, arguments, limit)
            observation = as_text(value)
        except _TimedOut:
            late = f"Error: {step.tool} gave no answer in time"
            if tool.changes and not tool.is_async:  # a second time might do it twice
                return ended("failed", f"{late}, and may still be done.", unsettled=True)
            return ended("failed", f"{late}; {TRY_AGAIN}.")
        except ToolError as error:
            return ended("failed", f"Error: {error}")
        except Exception as error:  # a tool may fail in any way; the joiner sees how
            return ended("failed", f"Error: {type(error).__name__}: {error}")
        return ended("done", observation, value)

    @cached_property
    def begun_before(self) -> Mapping[str, CallRecord]:
        """What earlier plans changed, or may still be changing, by how a call is written."""
        changing = [c for one in self.before for c in one.calls if c.changes]
        return {c.shown(): c for c in changing if c.status == "done" or c.unsettled}

    async def bounded(self, tool: RunnableTool, arguments: Sequence[object], limit: float) -> Any:
        """Run a tool; on a time-out or when the call is cancelled, break it off."""
        if tool.is_async:
            inner: asyncio.Future[Any] = asyncio.ensure_future(tool.run(*arguments))
        else:
            inner = in_thread(tool.run, *arguments)
        self.inner[inner] = tool.name
        inner.add_done_callback(self.forget)
        try:
            done, _ = await asyncio.wait([inner], timeout=limit)
            if not done:
                raise _TimedOut
        except (asyncio.CancelledError, _TimedOut):
            if tool.is_async:
                inner.cancel()
            raise
        return inner.result()

    def forget(self, inner: asyncio.Future[Any]) -> None:
        """Take a call that has ended off the list of those that run."""
        del self.inner[inner]
        if not inner.cancelled():
            inner.exception()  # that of a call which timed out is no news any more

    async def stop(self) -> tuple[str, ...]:
        """Cancel what has not ended, and wait for its end, but not for ever."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        if self.inner:
            await asyncio.wait(list(self.inner), timeout=self.settings.grace_s)
        return tuple(self.inner.values())

    def now(self) -> float:
        """Give the seconds since the plan began."""
        return time.perf_counter() - self.began


def _shown(tool: str, arguments: Sequence[object]) -> str:
    return render_call(tool, [_plain(argument) for argument in arguments])


def _plain(value: object, depth: int = 0) -> Any:
    """Give what plans and traces can hold; whatever else a tool gave stands as its text."""
    if isinstance(value, list) and depth < _DEEPEST_LIST:
        return [_plain(item, depth + 1) for item in value]
    number = isinstance(value, (int, float)) and abs(value) < 2**63
    return value if value is None or number else as_text(value)


def _stopped(why: str) -> str:
    return f"Error: the plan was stopped, as {why}. Correct this and {TRY_AGAIN}."


def in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Run a plain function in a thread of its own, so that any number run side by side.

    Nothing waits for the thread when the program ends or the future is cancelled.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

    def work() -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = context.run(function, *arguments)
        except StopIteration as stop:  # no future can hold one
            error = RuntimeError(f"StopIteration: {stop}")
        except BaseException as raised:  # raised again where the result is awaited
            error = raised
        with suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, daemon=True).start()
    return future


# --- texts for the model


def observed(execution: Execution) -> list[tuple[str, str]]:
    """List calls and observations as prompts show them; a problem of the plan is that of join."""
    pairs = [(call.shown(), _shortened(call.observation)) for call in execution.calls]
    if execution.problem is not None:
        pairs.append((f"{JOIN}()", execution.problem))
    return pairs


def scratchpad(executions: Sequence[Execution]) -> str:
    """Write what all plans so far gave, for a joiner."""
    rounds = (
        "\n".join(f"{call}\nObservation: {seen}" for call, seen in observed(one))
        for one in executions
    )
    return "\n\n".join(rounds)


def replan_user_text(user: str, rounds: Sequence[tuple[Execution, str]]) -> str:
    """Write the user text that asks for another plan.

    Args:
        user: That of the first plan.
        rounds: The plans so far, each with the joiner's thought.
    """
    parts = [user]
    for execution, thought in rounds:
        lines = (f"{n}. {c}\nObservation: {o}\n" for n, (c, o) in enumerate(observed(execution), 1))
        parts.append("Previous Plan:\n\n" + "\n".join(lines) + f"\n\nThought: {thought}\n")
    return "\n".join([*parts, "Current Plan:\n\n"])


def _shortened(text: str) -> str:
    """Keep a long observation's beginning for a prompt, and say what is missing."""
    if len(text) <= _LONGEST_OBSERVATION_CHARS:
        return text
    more = len(text) - _LONGEST_OBSERVATION_CHARS
    return f"{text[:_LONGEST_OBSERVATION_CHARS]} ... ({more} more characters)"


# --- the loop


class Writer(Protocol):
    """What writes plans."""

    def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
        """Write the plan that a prompt asks for, piece by piece; `done` gets the whole."""
        ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a joiner decided."""

    answer: JoinerAnswer
    completion: Completion | None = None
    """What the model wrote, if one judges."""
    by: str = ""
    """Who decided, where it was not the agent's joiner."""


class Joiner(Protocol):
    """What judges the observations of plans."""

    name: ClassVar[str]
    """`model`, or `rule` where a fixed rule decides."""

    async def judge(self, request: str, executions: Sequence[Execution], *, last: bool) -> Verdict:
        """Decide between Finish and Replan; with `last` no other plan will be made."""
        ...


class RuleJoiner:
    """Finish if every call is done; Replan if an observation says to try again."""

    name: ClassVar = "rule"

    async def judge(self, request: str, executions: Sequence[Execution], *, last: bool) -> Verdict:
        """Decide by the last plan; of a failure that cannot be mended, say which it is."""
        execution = executions[-1]
        failures = execution.failures
        mendable = any(TRY_AGAIN in failure.lower() for failure in failures)
        if not failures:
            left = "The last plan left out what had failed." if left_undone(executions) else ""
            answer = JoinerAnswer(left or "All calls succeeded.", "Finish", _answer(execution))
        elif mendable and not last:
            answer = JoinerAnswer("A call failed, and can be tried again.", "Replan", "")
        else:
            answer = JoinerAnswer("A call failed.", "Finish", failures[0])
        return Verdict(answer=answer)


def _answer(execution: Execution) -> str:
    """Give the results that no other call used."""
    used = {number for call in execution.calls for number in call.needs}
    leaves = [c.observation for c in execution.calls if c.step.number not in used]
    return "; ".join(leaves) or "There was nothing to do."


@dataclass(frozen=True, kw_only=True)
class Round:
    """One plan, what it gave, and the verdict on it."""

    execution: Execution
    plan: Completion | None
    """What the model wrote, where it came to an end."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request."""

    request: str
    rounds: tuple[Round, ...]
    gave_up: bool
    """The joiner wanted another plan when no more was allowed."""
    seconds: float

    @property
    def message(self) -> str:
        """What no plan got done, then the joiner's last words; without any, what is the matter."""
        last = self.rounds[-1]
        said = last.verdict.answer.message
        if left := self.left_undone:
            told = "; ".join(f"{c.shown()}: {_reason(c.observation)}" for c in left)
            return f"Not done: {told}" + f"\nThe last plan: {said}" * bool(said)
        if said or not self.failed:
            return said or "Done."
        why = last.execution.failures or ("another plan was wanted, and no more are allowed",)
        return f"Not done: {_reason(why[0])}"

    @property
    def left_undone(self) -> list[CallRecord]:
        """Calls of earlier plans that failed to change something, and that no later one made up."""
        return left_undone([r.execution for r in self.rounds])

    @property
    def replans(self) -> int:
        """Plans after the first one."""
        return len(self.rounds) - 1

    @property
    def failed(self) -> bool:
        """Whether the last plan, or all of them, left anything undone."""
        return self.gave_up or self.rounds[-1].execution.failed or bool(self.left_undone)

    def to_json(self) -> dict[str, Any]:
        """Give plain values for a trace: plans with their calls, verdicts, and what it cost."""
        return {
            "request": self.request,
            "message": self.message,
            "failed": self.failed,
            "gave_up": self.gave_up,
            "rounds": [
                {
                    "plan": r.execution.text,
                    "calls": [call.to_json() for call in r.execution.calls],
                    "problem": r.execution.problem,
                    "left_running": list(r.execution.left_running),
                    **vars(r.verdict.answer),
                }
                for r in self.rounds
            ],
            "seconds": round(self.seconds, 3),
            "cost": {name: round(value, 3) for name, value in self.cost().items()},
        }

    def cost_sentence(self) -> str:
        """Say what it cost; calls are made while the plan is still written."""
        cost = self.cost()
        tokens = count_of(cost["new_tokens"], "token")
        replans = f", {count_of(self.replans, 'replan')}" * bool(self.replans)
        return (
            f"{count_of(cost['calls'], 'call')}, {cost['calls_one_after_another_s']:.1f} s of work "
            f"within {cost['calls_s']:.1f} s while plans were written, {tokens} in "
            f"{cost['model_s']:.1f} s{replans}"
        )

    def cost(self) -> dict[str, float]:
        """Sum tokens, calls and seconds."""
        both = [w for r in self.rounds for w in (r.plan, r.verdict.completion)]
        written = [completion for completion in both if completion is not None]
        executions = [r.execution for r in self.rounds]
        return {
            "new_tokens": sum(w.new_tokens for w in written),
            "prompt_tokens": sum(w.prompt_tokens for w in written),
            "calls": sum(len(e.ran) for e in executions),
            "model_s": sum(w.seconds for w in written),
            "calls_s": sum(e.seconds for e in executions),
            "calls_one_after_another_s": sum(e.sequential_s for e in executions),
        }


def _reason(observation: str) -> str:
    return observation.removeprefix("Error: ").removeprefix("Not done: ")


@dataclass(frozen=True)
class Agent:
    """A writer of plans, tools and a joiner, put together."""

    writer: Writer
    joiner: Joiner
    tools: Mapping[str, RunnableTool]
    """By name; plans may call no others."""
    settings: AgentSettings = AgentSettings()
    allow: Allow = field(default=allow_all, kw_only=True)
    """Asked before each call that changes something, with converted arguments."""
    on_event: OnEvent = field(default=lambda _kind, _content: None, kw_only=True)
    """Told what happens: `plan`, `text`, `call`, `start`, `observation`, `problem`, `join` (once
    all calls of a plan have ended) and `end`, with plain values."""

    async def run(self, request: str, prompt: Prompt) -> Outcome:
        """Answer a request: plan, run and judge, until it is finished or no replan is left.

        Args:
            request: What the user asked for, for the joiner.
            prompt: Asks for the first plan.

        Raises:
            UserError: No plan can be written, before anything was carried out.
        """
        began = time.perf_counter()
        rounds: list[Round] = []
        gave_up = False
        while True:
            number = len(rounds)
            last = number == self.settings.max_replans
            asked = prompt
            if rounds:
                told = [(r.execution, r.verdict.answer.thought) for r in rounds]
                asked = replace(prompt, user=replan_user_text(prompt.user, told))
            self.on_event("plan", {"number": number, "system": asked.system, "user": asked.user})
            done: list[Completion] = []
            execution = await execute(
                self.writer.plan(asked, done.append),
                self.tools,
                self.settings,
                allow=self.allow,
                on_event=self.on_event,
                before=[r.execution for r in rounds],
            )
            if execution.problem is not None:
                self.on_event("problem", {"observation": execution.problem})
            executions = [*(r.execution for r in rounds), execution]
            verdict = await self._judged(request, executions, last=last)
            answer = verdict.answer
            plan = done[-1] if done else None
            rounds.append(Round(execution=execution, plan=plan, verdict=verdict))
            self.on_event("join", {"by": verdict.by or self.joiner.name, **vars(answer)})
            if answer.action != "Replan":
                break
            if last:
                gave_up = True
                break
        outcome = Outcome(
            request=request,
            rounds=tuple(rounds),
            gave_up=gave_up,
            seconds=time.perf_counter() - began,
        )
        self.on_event(
            "end",
            {
                "message": outcome.message,
                "failed": outcome.failed,
                "gave_up": gave_up,
                "seconds": round(outcome.seconds, 3),
                **outcome.cost(),
            },
        )
        return outcome

    async def _judged(
        self, request: str, executions: Sequence[Execution], *, last: bool
    ) -> Verdict:
        """Let the joiner decide; where it cannot, a rule does, as what was done must be told."""
        try:
            return await self.joiner.judge(request, executions, last=last)
        except UserError as error:
            rule = RuleJoiner()
            verdict = await rule.judge(request, executions, last=True)
            told = f"The model could not judge ({error.what}: {error.why}), so a rule did. "
            told += verdict.answer.thought
            return replace(verdict, answer=replace(verdict.answer, thought=told), by=rule.name)
