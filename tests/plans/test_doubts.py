"""Doubts: arguments of another kind than their parameters take, by what a catalogue says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.chat.requests import read_requests
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.plans.doubts import doubts, not_asked_for, without_repeats
from tinyagent_fast.plans.grammar import (
    Plan,
    PlanError,
    Step,
    parse_plan,
    render_call,
    render_plan,
    substitute,
)
from tinyagent_fast.plans.tools import TINYAGENT, tools_by_name

TOOLS = tools_by_name(load_catalogue().tools)
LOOK_UP = (
    '1. get_email_address("Sid")\n2. get_phone_number("Ada")\n3. open_and_get_file_path("x")\n'
)


def doubted(calls: str) -> list[tuple[int, set[str]]]:
    plan = parse_plan(calls + f"\n{calls.count(chr(10)) + 2}. join()")
    return [(len(doubt.before), set(doubt.instead)) for doubt in doubts(plan, TOOLS)]


@pytest.mark.parametrize(
    "call",
    [
        'forward_email(["$1", "a@b.org"], [], "", ["$3"])',
        'send_sms(["$2", "+1 555 0100", "(555) 010-020"], "On my way")',
        'send_sms("$2", "costs $ 5 and $9")',
        'create_calendar_event("x", "2024-01-01", "2024-01-01", None, "$1", "", None)',
        'summarize_pdf("/docs/x.pdf")',
        'send_sms(["911", "Ada: +1 555 0100", "(112)"], "")',
        'forward_email(["Ada <a@b.org>"], ["a@b.org, c@d.org"], "", [])',
        'open_note("a@b.org", "$1")',
    ],
)
def test_what_a_parameter_takes_is_not_doubted(call: str) -> None:
    assert doubted(f"{LOOK_UP}4. {call}") == []


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        ('send_sms(["$1"], "")', {"send_sms"}),
        ('send_sms(["$2"], "Here it is: $3")', {"summarize_pdf", "get_zoom_meeting_link"}),
        ('forward_email(["$1"], ["$2"], "", [])', {"forward_email"}),
        ('forward_email(["Sid"], [], "", [])', {"get_email_address"}),
        ('send_sms(["Ada"], "")', {"get_phone_number"}),
        ('send_sms(["sid1234@b.org"], "")', {"get_phone_number"}),
        ('compose_new_email(["$1"], [], "", "see $1", [])', {"maps_open_location", "open_note"}),
    ],
)
def test_other_kinds_are_doubted_with_what_may_be_called_instead(
    call: str, instead: set[str]
) -> None:
    (found,) = doubted(f"{LOOK_UP}4. {call}")
    assert found[0] == 3
    assert instead <= found[1]
    assert (len(found[1]) == 1) == (len(instead) == 1)


def test_what_the_plan_itself_calls_too_late_is_what_is_meant() -> None:
    late = f'{LOOK_UP}4. send_sms(["$2"], "$3")\n5. maps_open_location("here")'
    assert doubted(late) == [(3, {"maps_open_location"})]


def test_an_address_is_not_looked_up() -> None:
    (found,) = doubted('1. get_email_address("a@b.org")')
    assert found == (0, set(TOOLS) - {"get_email_address"})
    assert doubted('1. get_phone_number("a@b.org")') == []


def test_only_a_look_up_of_what_was_given_is_needless() -> None:
    plan = parse_plan(
        '1. get_phone_number("911")\n2. send_sms(["Ada"], "")\n3. summarize_pdf("$1")\n4. join()'
    )
    found = doubts(plan, TOOLS)
    assert [doubt.needless for doubt in found] == [True, False, False]
    assert [doubt.why for doubt in found] == [
        "get_phone_number is given what it looks up",
        "recipients takes phone number, and 'Ada' is none",
        "pdf_path takes file path, and $1 is phone number",
    ]


@given(
    before=st.sampled_from(["", "Ada ", "Ada <", "Ada, ", "c@d.org, "]),
    address=st.from_regex(r"[a-z]{1,6}@[a-z]{1,6}\.org", fullmatch=True),
    after=st.sampled_from(["", ">", ", c@d.org", " (work)"]),
)
def test_what_holds_an_address_is_never_doubted(before: str, address: str, after: str) -> None:
    held = json.dumps([f"{before}{address}{after}"])
    assert doubted(f'1. forward_email({held}, {held}, "", [])') == []


def test_each_doubtful_call_is_named_once() -> None:
    found = doubted(
        '1. send_sms(["Ada", "Sid"], "")\n2. forward_email(["$1", "Sid"], ["Sid"], "", [])'
    )
    assert [before for before, _ in found] == [0, 1]


def test_nothing_is_said_where_kinds_are_not_known_or_no_listed_tool_would_help() -> None:
    plan = parse_plan('1. open_note("x", "")\n2. send_sms(["$1"], "")\n3. join()')
    assert doubts(plan, TINYAGENT) == []
    assert doubts(plan, {name: TOOLS[name] for name in ("open_note", "send_sms")}) == []
    assert len(doubts(plan, TOOLS)) == 1
    assert doubts(plan, TOOLS | {"open_note": TINYAGENT["open_note"]}) == [], "of its result"


def test_the_plans_of_typed_requests_are_not_doubted() -> None:
    for entry in read_requests(Path(__file__).parents[1] / "requests.json"):
        assert doubts(parse_plan(entry.label or ""), TOOLS) == [], entry.request


def test_few_labels_of_the_real_data_are_doubted(real_data: Path) -> None:
    """Some pass phone numbers as attendees, or a place as an attachment; none is ruled out."""
    labels, found = 0, 0
    for name in ("training_data.json", "testing_data.json"):
        for entry in json.loads((real_data / name).read_text(encoding="utf-8")).values():
            labels += 1
            try:
                found += bool(doubts(parse_plan(entry["output"][0]["raw_output"]), TOOLS))
            except PlanError:
                continue
    assert labels > 200
    assert found < 0.2 * labels


def unsaid(request: str, *calls: str) -> set[int]:
    lines = [f"{n}. {call}" for n, call in enumerate((*calls, "join()"), start=1)]
    return set(not_asked_for(parse_plan("\n".join(lines)), TOOLS, request))


@pytest.mark.parametrize(
    ("request_", "call", "told"),
    [
        ("text Uncle Joe", 'get_phone_number("Joe")', False),
        ("text uncle joe", 'get_phone_number("Uncle Joe")', False),
        ("text Uncle Joe", 'get_phone_number("Dad")', True),
        ("text Uncle Joe", 'get_phone_number("Aunt Joe")', True),
        ("write to O'Neil", 'get_email_address("O\'Neil")', False),
        ("open report-v2.pdf", 'open_and_get_file_path("report-v2.pdf")', False),
        ("open report-v2.pdf", 'open_and_get_file_path("report-v3.pdf")', True),
        ("安娜にメールして", 'get_email_address("安娜")', False),
        ("安娜にメールして", 'get_email_address("健太")', True),
        ("a note", 'create_note("Shopping", "milk", "")', False),  # it may be put into own words
        ("text Joe", 'get_phone_number("")', False),
        ("text Joe", "get_phone_number(None)", False),
    ],
)
def test_a_name_that_nobody_said_is_told(request_: str, call: str, told: bool) -> None:
    assert unsaid(request_, call) == ({1} if told else set())


def test_what_earlier_calls_found_need_not_be_said() -> None:
    calls = ('open_and_get_file_path("plan.pdf")', 'summarize_pdf("$1")')
    assert unsaid("summarise plan.pdf", *calls) == set()


def test_names_of_typed_requests_and_almost_all_of_real_ones_are_said(
    request: pytest.FixtureRequest,
) -> None:
    for entry in read_requests(Path(__file__).parents[1] / "requests.json"):
        assert not_asked_for(parse_plan(entry.label or ""), TOOLS, entry.request) == {}
    real_data: Path = request.getfixturevalue("real_data")
    looked_up, told = 0, 0
    for entry in json.loads((real_data / "training_data.json").read_text("utf-8")).values():
        try:
            plan = parse_plan(entry["output"][0]["raw_output"])
        except PlanError:
            continue
        looked_up += sum(step.tool.startswith(("get_email", "get_phone")) for step in plan.steps)
        told += len(not_asked_for(plan, TOOLS, entry["input"]))
    assert looked_up > 400
    assert told < 0.05 * looked_up


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps: list[Step] = []
    for number in range(1, draw(st.integers(1, 9))):
        found = [s.number for s in steps if s.tool in ("get_phone_number", "summarize_pdf")]
        one = draw(st.sampled_from([*(f"${n}" for n in found), "Ada", "Bo"]))
        two = draw(st.sampled_from([*(f"see ${{{n}}}" for n in found), "hi"]))
        calls: dict[str, tuple[object, ...]] = {
            "get_phone_number": (one,),
            "summarize_pdf": (one,),
            "send_sms": ([one, "1"], two),
            "create_note": ("a", two, ""),
        }
        tool = draw(st.sampled_from(list(calls)))
        steps.append(Step(number=number, tool=tool, arguments=calls[tool]))
    return Plan((*steps, Step(number=len(steps) + 1, tool="join", arguments=())))


def unfolded(plan: Plan) -> list[str]:
    """Each call with the calls that it refers to written out in place of the references."""
    written: dict[int, object] = {}
    for step in plan.steps:
        call = render_call(step.tool, [substitute(value, written) for value in step.arguments])
        written[step.number] = f"<{call}>"
    return [str(call) for call in written.values()]


@given(plans())
def test_leaving_repeats_out_changes_nothing_but_how_often_is_looked_up(plan: Plan) -> None:
    shorter = without_repeats(plan, TOOLS)
    assert [step.number for step in shorter.steps] == list(range(1, len(shorter.steps) + 1))
    assert without_repeats(shorter, TOOLS) == shorter
    before, after = unfolded(plan), unfolded(shorter)
    changing = ("<send_sms", "<create_note", "<join")
    assert [c for c in before if c.startswith(changing)] == [
        c for c in after if c.startswith(changing)
    ]
    assert list(dict.fromkeys(after)) == list(dict.fromkeys(before))
    assert len(after) <= len(before)


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (
            '1. open_note("x", "")\n2. open_note("x", "")\n3. send_sms(["$1", "$2"], "")',
            '1. open_note("x", "")\n2. send_sms(["$1"], "")',
        ),
        (
            '1. open_note("x", "")\n2. append_note_content("x", "more", "")\n3. open_note("x", "")',
            None,
        ),
        ('1. create_note("x", "", "")\n2. create_note("x", "", "")', None),
        ('1. get_phone_number("Ada")\n2. get_phone_number("ada")', None),
        (
            '1. open_note("x", "")\n2. open_note("x", "")\n3. create_note("y", "${1}0", "")',
            None,
        ),
    ],
)
def test_only_what_is_surely_the_same_is_left_out(written: str, left: str | None) -> None:
    plan = parse_plan(f"{written}\n{written.count(chr(10)) + 2}. join()")
    wanted = written if left is None else left
    wanted = f"{wanted}\n{wanted.count(chr(10)) + 2}. join()"
    assert render_plan(without_repeats(plan, TOOLS)) == wanted
