"""The loop: what runs when, what a failure does, what is left after a stop, and what is said."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.agent import loop
from tinyagent_fast.agent.loop import (
    Agent,
    AgentSettings,
    Execution,
    Pieces,
    RuleJoiner,
    Verdict,
    replan_user_text,
    scratchpad,
)
from tinyagent_fast.agent.tools import RunnableTool, ToolError
from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.engine import Completion, Prompt
from tinyagent_fast.plans.grammar import JoinerAnswer, reference_uses, render_call, substitute
from tinyagent_fast.plans.tools import Parameter, Tool

ASK = Prompt(system=None, user="Question: q")


def runnable(run: Callable[..., Any], *kinds: str, name: str = "act", **more: Any) -> RunnableTool:
    parameters = tuple(Parameter(f"p{at}", kind) for at, kind in enumerate(kinds))
    return RunnableTool(tool=Tool(name, parameters), run=run, **more)


class Script:
    """A writer that writes what a test has put down, in pieces of a few characters."""

    def __init__(self, *plans: str, piece: int = 7) -> None:
        self.plans = list(plans)
        self.piece = piece
        self.asked: list[Prompt] = []

    async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
        self.asked.append(prompt)
        text = self.plans.pop(0)
        for at in range(0, len(text), self.piece):
            yield text[at : at + self.piece]
            await asyncio.sleep(0)
        done(
            Completion(
                text=text, stop_reason="stop", new_tokens=len(text), prompt_tokens=9, seconds=0.5
            )
        )


def agent_with(*tools: RunnableTool, script: Script | None = None, **settings: Any) -> Agent:
    return Agent(
        script or Script(),
        RuleJoiner(),
        {tool.name: tool for tool in tools},
        AgentSettings(**settings),
    )


async def pieces_of(text: str) -> Pieces:
    for at in range(0, len(text), 5):
        yield text[at : at + 5]


def running(agent: Agent, pieces: Pieces) -> Coroutine[Any, Any, Execution]:
    return loop.execute(pieces, agent.tools, agent.settings)


def execute(agent: Agent, text: str) -> Execution:
    return asyncio.run(running(agent, pieces_of(text)))


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(30):
        await asyncio.sleep(0)


@st.composite
def graphs(draw: st.DrawFn) -> list[set[int]]:
    """For each call, from 1 on, the earlier ones that it needs."""
    size = draw(st.integers(1, 9))
    return [draw(st.sets(st.integers(1, n))) if n else set() for n in range(size)]


def plan_of(graph: list[set[int]]) -> str:
    lines = []
    for number, needs in enumerate(graph, start=1):
        references = ", ".join(f'"${n}"' for n in sorted(needs))
        lines.append(f'{number}. act("{number}", [{references}])')
    return "\n".join([*lines, f"{len(graph) + 1}. join()"])


@given(graphs(), st.randoms(use_true_random=False), st.data())
def test_exactly_the_calls_run_whose_results_are_there(
    graph: list[set[int]], choice: Any, data: st.DataObject
) -> None:
    fails = data.draw(st.sets(st.integers(1, len(graph)))) if data.draw(st.booleans()) else set()
    gates: dict[int, asyncio.Event] = {}

    async def act(number: str, given: list[str]) -> str:
        assert given == [f"result {n}" for n in sorted(graph[int(number) - 1])]
        gates[int(number)] = asyncio.Event()
        await gates[int(number)].wait()
        if int(number) in fails:
            raise ToolError("no")
        return f"result {number}"

    async def drive() -> Execution:
        agent = agent_with(runnable(act, "str", "list[str]"))
        work = asyncio.ensure_future(running(agent, pieces_of(plan_of(graph))))
        done: set[int] = set()
        ended: set[int] = set()
        while True:
            await settled()
            ready = {n for n, needs in enumerate(graph, 1) if needs <= done and n not in ended}
            assert {n for n in gates if n not in ended} == ready
            if not ready:
                return await work
            number = choice.choice(sorted(ready))
            ended.add(number)
            done |= {number} - fails
            gates[number].set()

    execution = asyncio.run(drive())
    statuses = {call.step.number: call.status for call in execution.calls}
    for number, needs in enumerate(graph, start=1):
        blocked = any(statuses[n] != "done" for n in needs)
        wanted = "skipped" if blocked else "failed" if number in fails else "done"
        assert statuses[number] == wanted


@given(graphs(), st.integers(0, 30))
def test_a_cancelled_plan_leaves_nothing_running(graph: list[set[int]], turns: int) -> None:
    inside = 0

    async def act(number: str, given: list[str]) -> str:
        nonlocal inside
        inside += 1
        try:
            await asyncio.sleep(0 if int(number) % 2 else 60)
        finally:
            try:
                await asyncio.sleep(0)  # tidying up takes a moment too
            finally:
                inside -= 1
        return number

    async def drive() -> None:
        before = asyncio.all_tasks()
        work = asyncio.ensure_future(
            running(agent_with(runnable(act, "str", "list[str]")), pieces_of(plan_of(graph)))
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        assert inside == 0
        assert asyncio.all_tasks() == before

    asyncio.run(drive())


def test_a_call_starts_while_the_rest_of_the_plan_is_still_written() -> None:
    async def drive() -> None:
        started = asyncio.Event()

        async def act() -> str:
            started.set()
            return "x"

        async def slow_plan() -> Pieces:
            yield "1. act()\n2. a"
            await asyncio.wait_for(started.wait(), 5)
            yield "ct()\n3. join()"

        execution = await running(agent_with(runnable(act)), slow_plan())
        assert [call.status for call in execution.calls] == ["done", "done"]

    asyncio.run(drive())


def test_a_writer_that_fails_ends_the_calls_and_reaches_the_caller() -> None:
    ended = []

    async def act() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def broken() -> Pieces:
        yield "1. act()\n2. act()"
        await settled()
        raise ValueError("the model is gone")

    with pytest.raises(ValueError, match="the model is gone"):
        asyncio.run(running(agent_with(runnable(act)), broken()))
    assert ended == [True]


def test_plain_functions_run_side_by_side_too() -> None:
    both = threading.Barrier(12, timeout=20)
    agent = agent_with(runnable(lambda: both.wait() >= 0))
    plan = "".join(f"{n}. act()\n" for n in range(1, 13)) + "13. join()"
    assert {call.status for call in execute(agent, plan).calls} == {"done"}


def test_a_late_answer_is_a_failure_and_the_call_is_broken_off() -> None:
    ended = []

    async def act() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    execution = execute(agent_with(runnable(act), call_timeout_s=0.05), "1. act()\n2. join()")
    (call,) = execution.calls
    assert call.status == "failed" and "try again" in call.observation
    assert ended == [True] and execution.left_running == ()


def test_a_tool_s_own_time_out_counts() -> None:
    async def act() -> str:
        await asyncio.sleep(0.2)
        return "there"

    agent = agent_with(runnable(act, timeout_s=20.0), call_timeout_s=0.01)
    assert execute(agent, "1. act()\n2. join()").calls[0].observation == "there"


def test_what_cannot_be_broken_off_is_waited_for_and_then_named() -> None:
    may_end = threading.Event()
    slow = runnable(lambda: may_end.wait(20), name="slow")
    agent = agent_with(slow, call_timeout_s=0.05, grace_s=0.05)
    began = time.monotonic()
    execution = execute(agent, "1. slow()\n2. join()")
    assert execution.calls[0].status == "failed"
    assert execution.left_running == ("slow",)
    assert time.monotonic() - began < 10
    may_end.set()
    patient = agent_with(runnable(lambda: time.sleep(0.2)), call_timeout_s=0.05, grace_s=20)
    assert execute(patient, "1. act()\n2. join()").left_running == ()


def test_what_may_still_be_done_is_not_begun_again() -> None:
    begun = []
    may_end = threading.Event()

    def send(value: str) -> str:
        begun.append(value)
        may_end.wait(20)
        return "sent"

    class Stubborn:
        name = "model"

        async def judge(self, request: str, executions: Sequence[Execution], *, last: bool) -> Any:
            return Verdict(answer=JoinerAnswer("", "Finish" if last else "Replan", ""))

    slow = runnable(send, "str", name="send")
    script = Script(*['1. send("A")\n2. send("B")\n3. join()'] * 3)
    agent = agent_with(slow, script=script, call_timeout_s=0.05, grace_s=0.01)
    outcome = run(replace(agent, joiner=Stubborn()))
    assert sorted(begun) == ["A", "B"]
    assert outcome.failed and "may still be done" in outcome.message
    script.plans = ['1. send("A")\n2. join()']
    assert run(agent).replans == 0
    may_end.set()


def test_waiting_is_no_work() -> None:
    async def slow() -> str:
        await asyncio.sleep(0.2)
        return "no number"

    async def number(value: int) -> str:
        return str(value)

    async def refuse(*_: Any) -> bool:
        await asyncio.sleep(0.2)
        return False

    tools = runnable(slow, name="slow", changes=False), runnable(number, "int", name="number")
    agent = agent_with(*tools)
    execution = execute(agent, '1. slow()\n2. number("$1")\n3. join()')
    assert 0.2 <= execution.sequential_s < 0.3
    asked = loop.execute(pieces_of("1. number(1)\n2. join()"), agent.tools, allow=refuse)
    assert asyncio.run(asked).sequential_s == 0


class Breaks(Script):
    """Writes the plans that it has, and then, or where one is not whole, cannot go on."""

    async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
        text = self.plans[0] if self.plans else ""
        if text:
            async for piece in super().plan(prompt, done):
                yield piece
        if not text.endswith("join()"):
            raise ModelError("the prompt", "it is too long", "ask for less")


@pytest.mark.parametrize(
    "plan", ['1. order("eggs")\n2. order("milk")\n3. join()', '1. order("eggs")\n2. order("milk']
)
def test_what_was_done_is_told_where_no_more_can_be_written(plan: str) -> None:
    outcome = run(agent_with(shop("milk"), script=Breaks(plan)))
    assert outcome.failed
    calls = [call.status for one in outcome.rounds for call in one.execution.calls]
    assert calls[0] == "done"
    assert "it is too long" in json.dumps(outcome.to_json())


def test_without_a_call_a_plan_that_cannot_be_written_is_the_caller_s_error() -> None:
    with pytest.raises(ModelError, match="too long"):
        run(agent_with(shop(), script=Breaks()))


def test_where_the_model_cannot_judge_a_rule_does_and_says_so() -> None:
    class Full:
        name = "model"

        async def judge(self, request: str, executions: Sequence[Execution], *, last: bool) -> Any:
            raise ModelError("the prompt", "it is too long", "ask for less")

    told: list[Any] = []
    agent = agent_with(shop(), script=Script('1. order("milk")\n2. join()'))
    agent = replace(
        agent, joiner=Full(), on_event=lambda kind, content: told.append((kind, content))
    )
    outcome = run(agent)
    assert not outcome.failed and outcome.message == "ordered milk"
    (join,) = (content for kind, content in told if kind == "join")
    assert join["by"] == "rule" and "it is too long" in join["thought"]


def test_numbers_beyond_those_of_a_plan_are_passed_on() -> None:
    async def big() -> int:
        return 2**64

    async def count(value: int) -> str:
        return str(value)

    tools = runnable(big, name="big", changes=False), runnable(count, "int", name="count")
    _, call = execute(agent_with(*tools), '1. big()\n2. count("$1")\n3. join()').calls
    assert (call.status, call.observation) == ("done", str(2**64))


def test_what_fails_in_asking_reaches_the_caller() -> None:
    async def ask(*_: Any) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(
            loop.execute(
                pieces_of('1. order("milk")\n2. join()'), agent_with(shop()).tools, allow=ask
            )
        )


def test_any_exception_of_a_tool_is_its_observation() -> None:
    def act() -> None:
        raise StopIteration(3)

    def odd() -> None:
        raise KeyError("lamp")

    tools = runnable(act), runnable(odd, name="odd")
    execution = execute(agent_with(*tools), "1. act()\n2. odd()\n3. join()")
    assert [call.status for call in execution.calls] == ["failed", "failed"]
    assert "KeyError: 'lamp'" in execution.calls[1].observation


async def echo(value: str) -> str:
    return value


@pytest.mark.parametrize(
    ("plan", "ran", "told"),
    [
        ('1. act("a")\n2. gone("b")\n3. act("c")\n4. join()', 1, "no tool gone"),
        ('1. act("a")\nhello there\n3. act("c")\n4. join()', 1, "line 2"),
        ('1. act("a")\n1. act("b")\n2. join()', 1, "twice"),
        ('1. act("a")\n2. act("b")', 2, "join"),
        ('1. act("a")\n2. act("b', 1, "join"),
        ("", 0, "no text"),
        ("".join(f'{n}. act("a")\n' for n in range(1, 200)), 100, "more than 100"),
    ],
)
def test_a_faulty_plan_is_stopped_where_the_fault_is(plan: str, ran: int, told: str) -> None:
    execution = execute(agent_with(runnable(echo, "str")), plan)
    assert [call.status for call in execution.calls] == ["done"] * ran
    assert execution.problem is not None and told in execution.problem
    assert execution.failed


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('act("$2")', "no earlier call"),
        ('act("$7")', "no earlier call"),
        ('act("a", "b")', "takes 1 argument"),
        ("act([1])", "must be str"),
    ],
)
def test_a_faulty_call_fails_and_the_others_run(call: str, told: str) -> None:
    plan = f'1. {call}\n2. act("b")\n3. join()'
    first, second = execute(agent_with(runnable(echo, "str")), plan).calls
    assert first.status == "failed" and told in first.observation
    assert second.status == "done"


def test_dollars_in_a_text_are_no_reference_to_a_later_call() -> None:
    (first, second) = execute(
        agent_with(runnable(echo, "str")), '1. act("costs $500 or $2")\n2. act("a $1")\n3. join()'
    ).calls
    assert first.observation == "costs $500 or $2"
    assert second.observation == "a costs $500 or $2"


RESULTS = st.dictionaries(st.integers(1, 30), st.text(max_size=8), max_size=6)
TEXTS = st.lists(
    st.one_of(
        st.text("a$1{}2", max_size=6),
        st.integers(1, 40).map(lambda n: f"${n}"),
        st.integers(1, 40).map(lambda n: f"${{{n}}}"),
    ),
    max_size=6,
).map("".join)


@given(st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3)), RESULTS)
def test_substitution_fills_in_each_reference_once(value: Any, results: dict[int, str]) -> None:
    filled = substitute(value, results)
    if not any(number in results for number, _ in reference_uses([value])):
        assert filled == value
    if isinstance(value, str):
        parts = [(n, f) for n in results for f in (f"${n}", f"${{{n}}}")]
        # Longest first, each part of the text once: what a result holds is not looked at again.
        expected, at = "", 0
        while at < len(value):
            for number, form in sorted(parts, key=lambda p: -len(p[1])):
                whole_number = not value[at + len(form) : at + len(form) + 1].isdigit()
                if value.startswith(form, at) and (form.endswith("}") or whole_number):
                    expected, at = expected + results[number], at + len(form)
                    break
            else:
                expected, at = expected + value[at], at + 1
        assert filled == expected
    else:
        assert filled == [substitute(item, results) for item in value]


def test_a_whole_reference_keeps_the_kind_of_the_result() -> None:
    assert substitute("$1", {1: ["a", "b"]}) == ["a", "b"]
    assert substitute(["$12", "${1} and $2"], {1: "x", 12: "y"}) == ["y", "x and $2"]


# --- the whole loop


def run(agent: Agent) -> Any:
    return asyncio.run(agent.run("q", ASK))


def flaky(times: int) -> RunnableTool:
    left = times

    async def act(value: str) -> str:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ToolError("busy.", retry=True)
        return value

    return runnable(act, "str")


def test_a_plan_that_works_is_finished_at_once() -> None:
    outcome = run(agent_with(flaky(0), script=Script('1. act("hello")\n2. join()')))
    assert (outcome.replans, outcome.failed, outcome.message) == (0, False, "hello")
    assert outcome.cost()["calls"] == 1 and outcome.cost()["new_tokens"] > 0


def test_what_can_be_mended_is_planned_again_and_the_model_sees_what_happened() -> None:
    script = Script('1. act("one")\n2. join()', '1. act("two")\n2. join()')
    outcome = run(agent_with(flaky(1), script=script))
    assert (outcome.replans, outcome.failed, outcome.message) == (1, False, "two")
    again = script.asked[1].user
    assert again.startswith(ASK.user + "\nPrevious Plan:\n")
    assert 'act("one")\nObservation: Error: busy; try again' in again
    assert again.endswith("Current Plan:\n\n")


def shop(*closed: str, **more: Any) -> RunnableTool:
    """A tool that changes something, which refuses some texts."""

    async def order(value: str) -> str:
        if value in closed:
            raise ToolError("the shop is closed, try again")
        return f"ordered {value}"

    return runnable(order, "str", name="order", **more)


def look(found: bool) -> RunnableTool:
    async def look() -> str:
        if not found:
            raise ToolError("nothing there, try again")
        return "milk"

    return runnable(look, name="look", changes=False)


@pytest.mark.parametrize(
    ("plans", "failed"),
    [
        (['1. order("milk")\n2. join()', '1. act("hello")\n2. join()'], True),
        (['1. order("milk")\n2. join()'] * 2 + ['1. act("hello")\n2. join()'], True),
        (['1. order("milk")\n2. join()', '1. act("x")\n2. order("eggs")\n3. join()'], False),
        (['1. order("eggs")\n2. order("milk")\n3. join()', "1. join()"], True),
        (['1. look()\n2. order("$1")\n3. join()', '1. act("hello")\n2. join()'], True),
        (["1. look()\n2. join()", '1. act("hello")\n2. join()'], False),
        (
            ['1. order("milk")\n2. order("salt")\n3. join()', '1. order("oil")\n2. join()'],
            True,
        ),
        (
            [
                '1. order("milk")\n2. order("salt")\n3. join()',
                '1. order("oil")\n2. order("rye")\n3. join()',
            ],
            False,
        ),
    ],
)
@pytest.mark.parametrize("by", ["rule", "model"])
def test_what_failed_to_change_and_is_left_out_later_is_not_done(
    plans: list[str], failed: bool, by: str
) -> None:
    class Content:
        name = "model"

        async def judge(self, request: str, executions: Sequence[Execution], *, last: bool) -> Any:
            done = len(executions) == len(plans)
            return Verdict(answer=JoinerAnswer("", "Finish" if done else "Replan", "All is well."))

    agent = agent_with(shop("milk", "salt"), look(False), flaky(0), script=Script(*plans))
    outcome = run(agent if by == "rule" else replace(agent, joiner=Content()))
    assert outcome.failed == failed == outcome.to_json()["failed"]
    assert outcome.replans == len(plans) - 1
    assert ("order(" in outcome.message and "Not done" in outcome.message) == failed
    assert ("succeeded" in outcome.rounds[-1].verdict.answer.thought) == (
        by == "rule" and not failed
    )


def test_a_refused_change_that_is_left_out_later_is_not_done() -> None:
    plans = ['1. order("eggs")\n2. look()\n3. join()', '1. act("hello")\n2. join()']
    agent = agent_with(shop(), look(False), flaky(0), script=Script(*plans))

    async def refuse(tool: RunnableTool, arguments: Sequence[object]) -> bool:
        return tool.name != "order"

    outcome = run(replace(agent, allow=refuse))
    assert outcome.failed and 'order("eggs")' in outcome.message


def test_what_an_earlier_plan_changed_is_not_done_twice() -> None:
    ran: list[tuple[str, list[str]]] = []

    async def order(shop: str, things: list[str]) -> list[str]:
        ran.append((shop, things))
        return [f"{len(ran)} of {thing}" for thing in things]

    order_tool = runnable(order, "str", "list[str]", name="order")
    fails = '1. order("a", ["x"])\n2. act("")\n3. look()\n4. join()'
    plan = '1. order("a", ["x"])\n2. act("$1")\n3. order("a", ["y"])\n4. look()\n5. join()'
    asked: list[str] = []

    async def allow(tool: RunnableTool, arguments: Sequence[object]) -> bool:
        asked.append(tool.name)
        return True

    lookups: list[str] = []
    see = runnable(lambda: lookups.append("x"), name="look", changes=False)
    tools, script = (order_tool, flaky(1), see), Script(fails, plan)
    outcome = run(replace(agent_with(*tools, script=script), allow=allow))
    assert ran == [("a", ["x"]), ("a", ["y"])] and len(lookups) == 2
    again = outcome.rounds[1].execution
    assert [c.status for c in again.calls] == ["done before", "done", "done", "done"]
    assert again.calls[0].observation == outcome.rounds[0].execution.calls[0].observation
    assert again.calls[1].observation == '["1 of x"]'  # what it gave then is passed on
    assert not outcome.failed and "done before" in json.dumps(outcome.to_json())
    assert sorted(asked) == ["act", "act", "order", "order"]
    assert outcome.cost()["calls"] == 6


def test_what_was_done_before_does_not_make_up_for_another_call_of_the_tool() -> None:
    first = '1. order("eggs")\n2. order("milk")\n3. join()'
    script = Script(first, '1. order("eggs")\n2. join()')
    outcome = run(agent_with(shop("milk"), script=script))
    assert outcome.failed and 'order("milk")' in outcome.message


def test_a_call_is_shown_as_the_tool_is_asked() -> None:
    give = runnable(lambda: ["onions", "cream"], name="give", changes=False)
    plan = '1. give()\n2. act(["$1"])\n3. join()'
    asked = []

    async def refuse(tool: RunnableTool, arguments: Sequence[object]) -> bool:
        asked.append(render_call(tool.name, arguments))
        return False

    agent = agent_with(give, runnable(str, "list[str]"), script=Script(plan))
    outcome = run(replace(agent, allow=refuse))
    assert asked == ['act(["onions", "cream"])'] == [outcome.rounds[0].execution.calls[1].shown()]


def test_replans_are_limited() -> None:
    script = Script(*['1. act("x")\n2. join()'] * 3)
    outcome = run(agent_with(flaky(9), script=script, max_replans=2))
    assert (outcome.replans, outcome.failed) == (2, True)
    assert "busy" in outcome.message


def test_a_joiner_that_wants_yet_another_plan_is_given_up_on() -> None:
    class Stubborn:
        name = "model"

        async def judge(self, request: str, executions: Sequence[Execution], *, last: bool) -> Any:
            return Verdict(answer=JoinerAnswer("", "Replan", ""))

    agent = agent_with(flaky(0), script=Script(*['1. act("x")\n2. join()'] * 2), max_replans=1)
    outcome = run(replace(agent, joiner=Stubborn()))
    assert outcome.gave_up and outcome.failed and outcome.replans == 1
    assert outcome.message.startswith("Not done")
    agent = agent_with(flaky(9), script=Script('1. act("x")\n2. join()'), max_replans=0)
    assert "busy" in run(replace(agent, joiner=Stubborn())).message


def test_whatever_a_tool_gives_can_be_told_and_passed_on() -> None:
    class Odd:
        def __repr__(self) -> str:
            return "odd"

    circle: list[Any] = []
    circle.append(circle)
    for value in (Odd(), [Odd(), 2**80], {(1, 2): 3}, float("inf"), b"x", circle, "\ud800"):
        give = runnable(lambda value=value: value, name="give")
        plan = '1. give()\n2. act(["$1"])\n3. join()'
        execution = execute(agent_with(give, runnable(str, "list[str]")), plan)
        calls = [call.to_json() for call in execution.calls]
        json.dumps(calls, ensure_ascii=False).encode()
        assert [call["status"] for call in calls] == ["done", "done"]
        assert scratchpad([execution]).encode().count(b"Observation: ") == 2


@pytest.mark.parametrize(
    ("error", "replans"),
    [
        (ToolError("closed", retry=True), 1),
        (ToolError("Closed. Try again with another shop.", retry=True), 1),
        (ToolError("closed, try again"), 1),
        (ToolError("closed"), 0),
        (ToolError("closed", retry=False), 0),
    ],
)
def test_a_tool_says_by_retry_that_another_plan_can_mend_it(error: ToolError, replans: int) -> None:
    def act() -> None:
        raise error

    script = Script("1. act()\n2. join()", "1. join()")
    outcome = run(agent_with(runnable(act), script=script))
    assert outcome.replans == replans
    assert outcome.rounds[0].execution.failures[0].lower().count("try again") == replans


def test_a_failure_that_nothing_mends_is_told_at_once() -> None:
    def act() -> None:
        raise ToolError("the lamp is broken")

    outcome = run(agent_with(runnable(act), script=Script("1. act()\n2. join()")))
    assert outcome.replans == 0 and outcome.failed and "the lamp is broken" in outcome.message


def test_changes_are_asked_for_and_what_is_refused_is_not_done() -> None:
    ran = []
    tools = (
        runnable(lambda: ran.append("write"), name="write"),
        runnable(lambda: ran.append("look"), name="look", changes=False),
    )
    agent = agent_with(*tools, script=Script("1. write()\n2. look()\n3. join()"))
    asked = []

    async def refuse(tool: RunnableTool, arguments: Sequence[object]) -> bool:
        asked.append(tool.name)
        return False

    outcome = run(replace(agent, allow=refuse))
    assert (asked, ran) == (["write"], ["look"])
    assert [call.status for call in outcome.rounds[0].execution.calls] == ["refused", "done"]


def test_events_tell_the_whole_story_in_plain_values() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    agent = agent_with(flaky(1), script=Script(*['1. act("x")\n2. join()'] * 2))
    run(replace(agent, on_event=lambda kind, content: events.append((kind, dict(content)))))
    kinds = [kind for kind, _ in events if kind != "text"]
    one = ["plan", "call", "start", "observation", "join"]
    assert kinds == [*one, *one, "end"]
    json.dumps(events)


def test_prompts_show_calls_with_their_results_filled_in() -> None:
    plan = '1. act("x")\n2. act("$1 y")\n3. join()'
    execution = execute(agent_with(runnable(echo, "str")), plan)
    text = 'act("x")\nObservation: x\nact("x y")\nObservation: x y'
    assert scratchpad([execution]) == text
    assert scratchpad([execution, execution]) == f"{text}\n\n{text}"
    assert '2. act("x y")\nObservation: x y\n' in replan_user_text("u", [(execution, "t")])


def test_a_long_observation_is_shortened_in_prompts_and_says_so() -> None:
    execution = execute(agent_with(runnable(lambda: "x" * 5000, name="act")), "1. act()\n2. join()")
    assert len(scratchpad([execution])) < 2200
    assert "(3000 more characters)" in scratchpad([execution])
    assert len(execution.calls[0].observation) == 5000


@pytest.fixture(autouse=True)
def _no_threads_of_other_tests() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("tool "):
            thread.join(5)
