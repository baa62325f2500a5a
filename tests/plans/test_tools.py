"""Tools: their printed form and the type checks on arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinyagent_fast.errors import DataError
from tinyagent_fast.plans.tools import (
    TINYAGENT,
    TINYAGENT_TOOLS,
    Parameter,
    Tool,
    accepts,
    call_problems,
    signature,
    tools_by_name,
    with_choices,
)

SIGNATURES = """\
create_calendar_event(title: str, start_date: str, end_date: str, location: str, \
invitees: list[str], notes: str, calendar: str) -> str
get_phone_number(name: str) -> str
get_email_address(name: str) -> str
open_and_get_file_path(file_name: str) -> str
summarize_pdf(pdf_path: str) -> str
compose_new_email(recipients: list[str], cc: list[str], subject: str, context: str, \
attachments: list[str]) -> str
reply_to_email(cc: list[str], context: str, attachments: list[str]) -> str
forward_email(recipients: list[str], cc: list[str], context: str, attachments: list[str]) -> str
maps_open_location(location: str) -> str
maps_show_directions(start_location: str, end_location: str, transport: str) -> str
create_note(name: str, content: str, folder: str) -> str
open_note(name: str, folder: str) -> str
append_note_content(name: str, content: str, folder: str) -> str
create_reminder(name: str, due_date: str, notes: str, list_name: str, priority: int, \
all_day: bool) -> str
send_sms(recipients: list[str], message: str) -> str
get_zoom_meeting_link(topic: str, start_time: str, duration: int, \
meeting_invitees: list[str]) -> str
"""


def test_the_16_tools_have_their_signatures_and_their_order() -> None:
    assert "".join(signature(tool) + "\n" for tool in TINYAGENT_TOOLS) == SIGNATURES
    assert list(TINYAGENT) == [tool.name for tool in TINYAGENT_TOOLS]


@pytest.mark.parametrize(
    ("type_", "right", "wrong"),
    [
        ("str", ["", "a", "$1"], [1, True, ["a"], None, 1.0]),
        ("int", [0, -3, "$1", "${12}"], [True, "1", "about $1", 1.0, None]),
        ("bool", [True, False, "$1"], [0, 1, "True", None]),
        ("list[str]", [[], ["a", "$1"], "$1"], ["a", "$1, $2", ("a",), ["a", 1], [["a"]], None]),
    ],
)
def test_arguments_are_checked_against_the_type(
    type_: str, right: list[object], wrong: list[object]
) -> None:
    parameter = Parameter("p", type_)
    assert [value for value in right if not accepts(parameter, value)] == []
    assert [value for value in wrong if accepts(parameter, value)] == []


def test_own_tools_hold_a_model_s_to_fewer_texts_and_to_no_none() -> None:
    known = {"f": Tool("f", (Parameter("p", "str", nullable=True, value="room"),))}
    strict = {"f": Tool("f", (Parameter("p", "str", choices=("a", "b")),))}
    lax = {"f": Tool("f", (Parameter("p", "str", nullable=True),))}
    (held,) = with_choices(known, strict)["f"].parameters
    assert (held.choices, held.nullable, held.value) == (("a", "b"), False, "room")
    assert with_choices(known, lax) == known
    (held,) = with_choices(strict, lax)["f"].parameters
    assert not held.nullable


def test_a_choice_that_is_a_reference_is_refused() -> None:
    for text in ("$5", "${5}"):
        with pytest.raises(DataError, match="earlier call"):
            Parameter("price", "str", choices=(text, "more"))
    assert Parameter("price", "str", choices=("$5 or less", "more"))


def test_where_choices_are_given_only_they_and_whole_references_are_right() -> None:
    limited = Parameter("p", "str", choices=("day", "night"))
    right, wrong = ["day", "night", "$1"], ["noon", "", "the $1", 1, None]
    assert [value for value in right if not accepts(limited, value)] == []
    assert [value for value in wrong if accepts(limited, value)] == []
    assert accepts(replace(limited, nullable=True), None)
    tools = tools_by_name([Tool("light", (limited,))])
    ((kind, told),) = call_problems("light", ["noon"], tools)
    assert kind == "wrong_argument_type" and "day, night" in told


def test_none_is_right_only_where_the_parameter_is_nullable() -> None:
    assert accepts(Parameter("p", "str", nullable=True), None)
    calendar = TINYAGENT["create_calendar_event"].parameters
    nullable = [one.name for one in calendar if accepts(one, None)]
    assert nullable == ["location", "notes", "calendar"]


def test_tools_are_indexed_by_name_in_order_and_duplicates_refused() -> None:
    tools = [Tool(name=name, parameters=()) for name in ("b", "a")]
    assert list(tools_by_name(tools)) == ["b", "a"]
    with pytest.raises(DataError, match="given twice"):
        tools_by_name([*tools, tools[0]])


def test_unusable_tools_and_parameters_are_refused() -> None:
    with pytest.raises(DataError, match="float"):
        Parameter("p", "float")
    with pytest.raises(DataError, match="identifier"):
        Parameter("a b", "str")
    for name in ("join", "", "a-b", "1st"):
        with pytest.raises(DataError, match="tool name"):
            Tool(name=name, parameters=())
    with pytest.raises(DataError, match="occurs twice"):
        Tool(name="f", parameters=(Parameter("p", "str"), Parameter("p", "int")))
