"""The sandbox: the 16 tools on a desktop that is not real, its faults, and what counts as done."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinyagent_fast.agent import loop
from tinyagent_fast.agent.loop import AgentSettings, Execution, Pieces
from tinyagent_fast.agent.sandbox import (
    RECOVERABLE,
    Desktop,
    Fault,
    Recorder,
    State,
    choose_fault,
    malformed,
    sandbox_for,
)
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.data.generation.queries import Mix, write_request
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.plans.grammar import Plan, PlanError, Step, parse_plan, render_plan
from tinyagent_fast.plans.tools import TINYAGENT, Parameter, Tool


def execute(tools: Any, text: str, **settings: float) -> Execution:
    async def pieces() -> Pieces:
        yield text

    return asyncio.run(loop.execute(pieces(), tools, AgentSettings(**settings)))


def after(label: str, text: str, *faults: Fault, **settings: float) -> tuple[State, Execution]:
    """Give the state after a text, in a sandbox made for a label."""
    sandbox = sandbox_for(parse_plan(label), faults=faults)
    execution = execute(sandbox.tools, text, **settings)
    return sandbox.state(), execution


LABEL = """\
1. get_email_address("Sid")
2. open_and_get_file_path("Budget Report.pdf")
3. summarize_pdf("$2")
4. compose_new_email(["$1"], [], "The budget", "$3", ["$2"])
5. get_phone_number("Anna")
6. send_sms(["$5"], "Sent it to Sid.")
7. append_note_content("Diary", "Mail sent.", "")
8. get_zoom_meeting_link("Budget", "2026-01-02 10:00:00", 60, ["$1"])
9. create_calendar_event("Budget", "2026-01-02 10:00:00", "2026-01-02 11:00:00", "", ["$1"], \
"$8", None)
10. create_reminder("call Sid", "2026-01-02 09:00:00", "", "", 0, False)
11. forward_email(["$1"], [], "", [])
12. reply_to_email([], "Fine", ["$2"])
13. maps_show_directions("", "Oslo", "d")
14. maps_open_location("Oslo")
15. create_note("Oslo", "$14", "Trips")
16. open_note("Diary", "")
17. join()"""


def test_all_sixteen_tools_work_together() -> None:
    state, execution = after(LABEL, LABEL)
    assert not execution.failed, [c.observation for c in execution.calls if c.status != "done"]
    assert {call.step.tool for call in execution.calls} == set(TINYAGENT)
    assert {table: rows.total() for table, rows in state.changes.items()} == {
        "notes": 2, "mail": 3, "events": 1, "reminders": 1, "messages": 1, "meetings": 1,
    }  # fmt: skip
    mails = {dict(row)["kind"]: dict(row) for row in state.changes["mail"]}
    assert mails["new"]["recipients"] == '["sid@example.org"]'
    assert mails["new"]["attachments"] == '["/docs/budget report.pdf"]'
    assert mails["new"]["content"] == "summary: what budget report.pdf is about"


@pytest.mark.parametrize(
    ("old", "new", "same", "but_wording"),
    [
        ("", "", True, True),
        ('"Sent it to Sid."', '"sent it  to Sid"', True, True),  # wording of no weight
        ('"Sent it to Sid."', '"It is late."', False, True),
        ('"The budget"', '"The costs"', False, True),
        ('get_email_address("Sid")', 'get_email_address("sid")', True, True),
        ('get_email_address("Sid")', 'get_email_address("Anna")', False, False),
        ('10:00:00", 60', '10:00:00", 30', False, False),
        ('"The budget", "$3", ["$2"]', '"The budget", "$3", []', False, False),
        ("11:00:00", "12:00:00", False, False),
        ('"call Sid", "2026-01-02', '"call Sid", "2026-01-03', False, False),
        ('["$5"]', '["Anna"]', True, True),  # a name is looked up, as the app does
        ('send_sms(["$5"], "Sent', 'send_sms(["$5", "$5"], "Sent', True, True),
        ('maps_open_location("Oslo")', 'maps_open_location("Rome")', False, False),
        ("17. join()", '17. send_sms(["$5"], "Sent it to Sid.")\n18. join()', False, False),
        ("17. join()", '17. get_phone_number("Sid")\n18. join()', True, True),  # only looked
    ],
)
def test_arguments_count(old: str, new: str, same: bool, but_wording: bool) -> None:
    target, _ = after(LABEL, LABEL)
    state, _ = after(LABEL, LABEL.replace(old, new, 1) if old else LABEL)
    assert state.reaches(target) == same
    assert state.reaches(target, wording=False) == but_wording


def test_a_request_to_look_something_up_is_not_answered_by_doing_nothing() -> None:
    label = '1. get_phone_number("Anna")\n2. join()'
    target, _ = after(label, label)
    assert not after(label, "1. join()")[0].reaches(target)
    assert not after(label, '1. get_email_address("Anna")\n2. join()')[0].reaches(target)


CATALOGUE = load_catalogue()


def plans() -> st.SearchStrategy[Plan]:
    def make(seed: int) -> Plan:
        request = write_request(CATALOGUE, Mix(), random.Random(seed))
        calls = [
            Step(number=n, tool=c.tool, arguments=c.arguments)
            for n, c in enumerate(request.calls, 1)
        ]
        return Plan((*calls, Step(number=len(calls) + 1, tool="join", arguments=())))

    return st.integers(0, 10_000).map(make)


def reordered(plan: Plan, rng: random.Random) -> str:
    """Write a plan with its independent calls in another order."""
    from tinyagent_fast.plans.grammar import references, substitute

    waiting, numbers, lines = list(plan.steps[:-1]), {}, []
    while waiting:
        ready = [s for s in waiting if references(s.arguments) <= set(numbers)]
        step = rng.choice(ready)
        waiting.remove(step)
        numbers[step.number] = f"${len(lines) + 1}"
        arguments = tuple(substitute(a, numbers) for a in step.arguments)
        lines.append(Step(number=len(lines) + 1, tool=step.tool, arguments=arguments))
    join = Step(number=len(lines) + 1, tool="join", arguments=())
    return render_plan(Plan((*lines, join)))


@given(plans(), st.randoms(use_true_random=False))
def test_a_sandbox_holds_what_a_label_needs_and_order_does_not_matter(
    plan: Plan, rng: random.Random
) -> None:
    # Of a note that several calls write to or read, the order of the calls decides what it holds.
    notes = [s.arguments[0] for s in plan.steps if s.tool.endswith(("_note", "_note_content"))]
    assume(len(notes) == len(set(notes)))
    label = render_plan(plan)
    target, execution = after(label, label)
    assert not execution.failed
    again, _ = after(label, reordered(plan, rng))
    assert again.reaches(target) and target.reaches(again)


@given(plans(), st.randoms(use_true_random=False))
def test_a_recoverable_fault_spoils_a_plan_and_says_that_it_can_be_mended(
    plan: Plan, rng: random.Random
) -> None:
    fault = choose_fault(plan, rng, RECOVERABLE)
    label = render_plan(plan)
    text = malformed(label, rng) if fault.kind == "malformed" else label
    _, execution = after(label, text, fault, call_timeout_s=0.2)
    assert execution.failed
    told = [c.observation for c in execution.calls] + [execution.problem or ""]
    assert any("try again" in text.lower() for text in told)


def mend(label: str, kind: str) -> str:
    """Give the name that the observation proposes."""
    desktop = sandbox_for(parse_plan(label), faults=[Fault(kind=kind, name="Anna")])  # type: ignore[arg-type]
    assert isinstance(desktop, Desktop)
    (call,) = execute(desktop.tools, label).calls
    return re.findall('"(Anna [^"]+)"', call.observation)[0]


@pytest.mark.parametrize("kind", ["renamed", "ambiguous"])
def test_the_name_that_an_observation_gives_leads_to_the_same_contact(kind: str) -> None:
    label = '1. get_phone_number("Anna")\n2. join()'
    target, _ = after(label, label)
    fault = Fault(kind=kind, name="Anna")  # type: ignore[arg-type]
    assert not after(label, label, fault)[0].reaches(target)
    mended = label.replace("Anna", mend(label, kind))
    assert after(label, mended, fault)[0].reaches(target)


def test_an_unknown_contact_is_one_that_no_other_plan_finds() -> None:
    label = '1. get_phone_number("Anna")\n2. join()'
    _, execution = after(label, label, Fault(kind="unknown", name="Anna"))
    assert execution.calls[0].status == "failed"
    assert "try again" not in execution.calls[0].observation.lower()


@pytest.mark.parametrize("kind", ["failing", "slow"])
def test_a_tool_that_fails_once_works_the_next_time(kind: str) -> None:
    label = '1. create_note("a", "b", "")\n2. join()'
    sandbox = sandbox_for(parse_plan(label), faults=[Fault(kind=kind, tool="create_note")])  # type: ignore[arg-type]
    first = execute(sandbox.tools, label, call_timeout_s=0.05)
    assert first.calls[0].status == "failed" and "try again" in first.calls[0].observation.lower()
    assert sandbox.state().changes["notes"].total() == 0
    assert not execute(sandbox.tools, label, call_timeout_s=20).failed
    assert sandbox.state().changes["notes"].total() == 1


def test_an_sms_goes_to_no_address_and_an_email_to_no_number() -> None:
    desktop = Desktop()
    for call in ('send_sms(["ada@example.org"], "hi")', 'forward_email(["555-0101"], [], "", [])'):
        assert execute(desktop.tools, f"1. {call}\n2. join()").calls[0].status == "failed"


def test_a_desktop_can_be_looked_into_afterwards(tmp_path: object) -> None:
    import sqlite3

    path = tmp_path / "desktop.sqlite"  # type: ignore[operator]
    desktop = Desktop(path)
    desktop.add_contact("Sid Iyer")
    execute(desktop.tools, '1. create_note("a", "b", "")\n2. join()')
    desktop.close()
    with sqlite3.connect(path) as database:
        assert database.execute("select email from contacts").fetchall() == [
            ("sid.iyer@example.org",)
        ]
        assert database.execute("select name, content from notes").fetchall() == [("a", "b")]


def test_calls_take_their_time_side_by_side() -> None:
    label = "".join(f'{n}. get_phone_number("P{n}")\n' for n in range(1, 9)) + "9. join()"
    sandbox = sandbox_for(parse_plan(label), time_scale=0.5)
    execution = execute(sandbox.tools, label)
    assert execution.sequential_s > 0.7 and execution.seconds < execution.sequential_s / 2


def test_own_tools_are_recorded_and_their_arguments_count() -> None:
    tools = {
        "find": Tool("find", (Parameter("room", "str"),)),
        "dim": Tool("dim", (Parameter("lamps", "list[str]"), Parameter("percent", "int"))),
    }

    def state(text: str, faults: Sequence[Fault] = ()) -> State:
        sandbox = sandbox_for(parse_plan(label), tools, faults=faults)
        assert isinstance(sandbox, Recorder)
        execute(sandbox.tools, text)
        return sandbox.state()

    label = '1. find("hall")\n2. find("attic")\n3. dim(["$1", "$2"], 50)\n4. join()'
    other = '1. find("attic")\n2. find("hall")\n3. dim(["$2", "$1"], 50)\n4. join()'
    assert state(other).reaches(state(label))
    assert not state(label.replace("50", "60")).reaches(state(label))
    assert not state(label.replace('"hall"', '"cellar"')).reaches(state(label))
    assert not state(label, [Fault(kind="failing", tool="dim")]).reaches(state(label))
    with pytest.raises(ConfigError, match="leave it out"):
        sandbox_for(None, tools, path=Path("kept.sqlite"))


@given(plans(), st.randoms(use_true_random=False))
def test_a_broken_plan_is_no_plan(plan: Plan, rng: random.Random) -> None:
    with pytest.raises(PlanError):
        parse_plan(malformed(render_plan(plan), rng))
