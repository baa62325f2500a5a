"""One entry of a file: defects with their fields, messages of a point, and plans."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_entry import make_entry

from tinyagent_fast.data.schema import (
    Entry,
    Example,
    entry_from_json,
    parse_messages,
    plan_disagreement,
    plan_steps,
)


def test_a_good_entry_becomes_typed_values() -> None:
    entry = entry_from_json("k", make_entry())
    assert isinstance(entry, Entry)
    plan, join = entry.examples
    assert plan == Example(
        key="k/0",
        entry_key="k",
        kind="plan",
        query="Call Ann",
        system="Plan it.",
        user="Question: Call Ann",
        output='1. get_phone_number("Ann")\n2. join()',
    )
    assert (join.key, join.kind, join.system, join.user) == (
        "k/1",
        "join",
        None,
        "Follow the rules.",
    )


@pytest.mark.parametrize(
    ("place", "value", "field", "reason"),
    [
        (("input",), None, "input", "is missing"),
        (("input",), 3, "input", "must be a text, not a whole number"),
        (("input",), "  ", "input", "is empty"),
        (("output",), None, "output", "is missing"),
        (("output",), {}, "output", "must be a list, not an object"),
        (("output",), [], "output", "is empty"),
        (("output", 0), 5, "output[0]", "must be an object"),
        (("output", 0, "type"), "thing", "output[0].type", "must be plan, join or replan"),
        (("output", 0, "type"), "replan", "output[0].type", "must be 'plan', it is 'replan'"),
        (("output", 0, "type"), None, "output[0].type", "is missing"),
        (("output", 0, "raw_input"), None, "output[0].raw_input", "is missing"),
        (("output", 0, "raw_input"), "[{'role'", "output[0].raw_input", "neither a Python"),
        (("output", 0, "raw_input"), "", "output[0].raw_input", "empty user message"),
        (("output", 0, "raw_output"), "", "output[0].raw_output", "is empty"),
        (("output", 0, "raw_output"), "1. join()", "output[0].raw_output", "has 1 steps but"),
        (("output", 0, "parsed_output"), {}, "output[0].parsed_output", "must be a list"),
        (("output", 1, "parsed_output"), [], "output[1].parsed_output", "must be an object"),
        (("output", 0, "id"), None, "output[0].id", "is missing"),
        (("output", 0, "index"), True, "output[0].index", "not true or false"),
        (("closest_5_queries",), [1], "closest_5_queries", "list of texts"),
        (("closest_5_queries",), "q", "closest_5_queries", "list of texts"),
    ],
)
def test_each_defect_is_named_with_its_field(
    place: tuple[Any, ...], value: object, field: str, reason: str
) -> None:
    entry = make_entry()
    inner: Any = entry
    for step in place[:-1]:
        inner = inner[step]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    problems = entry_from_json("k", entry)
    assert isinstance(problems, list)
    assert [problem.field for problem in problems] == [field]
    assert reason in problems[0].reason


def test_all_problems_of_an_entry_are_found_at_once() -> None:
    entry = make_entry()
    del entry["input"]
    entry["output"][0]["raw_output"] = ""
    entry["output"][1]["type"] = 1
    problems = entry_from_json("k", entry)
    assert isinstance(problems, list)
    fields = [problem.field for problem in problems]
    assert fields[:3] == ["input", "output[0].raw_output", "output[1].type"]


@pytest.mark.parametrize("missing", [[], None])
def test_closest_queries_are_optional(missing: object) -> None:
    entry = make_entry()
    entry["closest_5_queries"] = missing
    assert isinstance(entry_from_json("k", entry), Entry)
    del entry["closest_5_queries"]
    assert isinstance(entry_from_json("k", entry), Entry)


def test_an_entry_that_is_no_object_is_a_problem() -> None:
    problems = entry_from_json("k", [1])
    assert isinstance(problems, list)
    assert problems[0].reason == "must be an object, not a list"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no message"),
        ([("system", "x")], "it has system"),
        ([("user", "x"), ("user", "x")], "user, user"),
        ([("user", "x"), ("assistant", "x"), ("user", "x")], "user, assistant, user"),
        ([("user", "x"), ("system", "x")], "user, system"),
        ([("user", "a\ud800")], "surrogate"),
    ],
)
def test_a_conversation_that_is_no_training_row_is_a_problem(
    messages: list[tuple[str, str]], reason: str
) -> None:
    entry = make_entry()
    entry["output"][0]["raw_input"] = [{"role": r, "content": text} for r, text in messages]
    problems = entry_from_json("k", entry)
    assert isinstance(problems, list)
    assert [problem.field for problem in problems] == ["output[0].raw_input"]
    assert reason in problems[0].reason


ANY_TEXT = st.text(
    st.characters(exclude_categories=()) | st.sampled_from("'\"\\\n\r\t\0 \x7f\x85{},:[]Nnxu04")
)
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": ANY_TEXT}), min_size=1, max_size=3
)


def literal(text: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


@given(MESSAGES)
def test_the_repr_of_any_messages_is_read_back_as_python_reads_it(
    messages: list[dict[str, str]],
) -> None:
    raw = repr(messages)
    assert literal(raw) == messages
    assert parse_messages(raw) == [(m["role"], m["content"]) for m in messages]


@given(MESSAGES)
def test_json_messages_are_read_back_as_json_reads_them(messages: list[dict[str, str]]) -> None:
    raw = json.dumps(messages)
    expected = [(m["role"], m["content"]) for m in json.loads(raw)]
    assert parse_messages(raw) == expected


def test_a_plain_text_is_one_user_message() -> None:
    assert parse_messages("Follow [{these}] rules") == [("user", "Follow [{these}] rules")]


def test_human_is_read_as_user() -> None:
    assert parse_messages("[{'role': 'human', 'content': 'q'}]") == [("user", "q")]


@pytest.mark.parametrize(
    "raw",
    [
        [{"role": "user", "content": "q"}],
        '[\n  {"role": "user", "content": "q"}\n]',
        "[{'content': 'q', 'role': 'user'}]",
        " [ { 'role' : 'user', 'content': 'q' } ] ",
        "[{'role': 'user', 'content': '''q'''}]",
    ],
)
def test_other_spellings_of_the_same_list_are_read(raw: object) -> None:
    assert parse_messages(raw) == [("user", "q")]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("[{'role': 'user', 'content': 'q'", "neither a Python literal nor JSON"),
        ("[{'role': 'user', 'content': q}]", "neither a Python literal nor JSON"),
        ("[{'role': 'user', 'content': '\ud800'}]", "neither a Python literal nor JSON"),
        ("[{'role': 'tool', 'content': 'q'}]", "unknown role 'tool'"),
        ("[{'role': 'user'}]", "must have just 'role' and 'content'"),
        ("[{'role': 'user', 'content': 'q', 'name': 'n'}]", "must have just"),
        ("[{'role': 'user', 'content': 3}]", "content must be a text, not a whole number"),
        ("[{'role': 'user', 'content': 'q'}, 5]", "message 1 must be an object"),
        ("[{1, 2}]", "message 0 must be an object, not another type"),
        (7, "must be a text or a list of messages, not a whole number"),
    ],
)
def test_what_is_no_message_list_is_refused_with_the_reason(raw: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_messages(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "[{" + "[" * 100_000,
        "[{'role': 'user', 'content': " + "-" * 50_000 + "1}]",
        "[{'role': 'user', 'content': 1" + "+1" * 50_000 + "}]",
        '[{"role": "user", "content": ' + "[" * 50_000 + "]" * 50_000 + "}]",
        "[{'role': 'user', 'content': " + "9" * 10_000 + "}]",
    ],
)
def test_an_over_deep_literal_is_refused_and_crashes_nothing(raw: str) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|neither a Python|must be"):
        parse_messages(raw)


def test_a_huge_literal_is_read() -> None:
    text = 'it\'s "a" \\ ' * 400_000
    assert parse_messages(repr([{"role": "user", "content": text}])) == [("user", text)]


def test_a_plan_is_read_by_number_until_join() -> None:
    text = 'Thought: see 9. no(1)\n1. a("x)")\nThought: t\n2. b()\n1. c(2)\n3. join()\n4. d()'
    assert [tuple(step) for step in plan_steps(text)] == [("c", "2"), ("b", ""), ("join", "")]


def plan(*calls: str) -> str:
    return "\n".join(f"{number}. {call}" for number, call in enumerate(calls, start=1))


@pytest.mark.parametrize(
    ("args_text", "args"),
    [
        ("", []),
        ('"a", 1, None, True, 1.5', ["a", 1, None, True, 1.5]),
        ("'a', (1, 2)", ["a", [1, 2]]),
        ('["a"]', ["a"]),
        ('["a"]', [["a"]]),
        ('["$1"], "b\\n"', [["$1"], "b\n"]),
        ("$1, [$2]", ["$1, [$2]"]),
        ('"caf\u00e9 it\'s"', ["caf\u00e9 it's"]),
        ('"C:\\d"', ["C:\\d"]),
        ("{1: None}", [{"1": None}]),
        ("[]", []),
    ],
)
def test_arguments_agree_with_their_parsed_form(args_text: str, args: list[object]) -> None:
    parsed: list[object] = [
        {"tool_name": "t", "tool_args": args},
        {"tool_name": "join", "tool_args": []},
    ]
    assert plan_disagreement(plan(f"t({args_text})", "join()"), parsed) is None


@pytest.mark.parametrize(
    ("args_text", "args"),
    [("", [""]), ('"a"', ["b"]), ("1", ["1"]), ("None", ["None"]), ('"a"', []), ("'a' b", ["a"])],
)
def test_arguments_that_differ_are_found(args_text: str, args: list[object]) -> None:
    parsed: list[object] = [{"tool_name": "t", "tool_args": args}]
    reason = plan_disagreement(plan(f"t({args_text})"), parsed)
    assert reason is not None
    assert "step 1" in reason


JSON_ARGS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON_ARGS, max_size=4))
def test_arguments_written_as_a_python_literal_agree_with_themselves(args: list[object]) -> None:
    text = repr(args)[1:-1]
    parsed: list[object] = [{"tool_name": "t", "tool_args": args}]
    assert plan_disagreement(plan(f"t({text})"), parsed) is None


@pytest.mark.parametrize(
    ("raw_output", "parsed", "reason"),
    [
        ("nothing", [], "no line of the form"),
        ("1. a()\n2. join()", [{"tool_name": "a", "tool_args": []}], "2 steps but"),
        ("1. a()", [{"tool_name": "b", "tool_args": []}], "step 1 calls a, parsed_output has b"),
        ("1. a()", [{"tool_name": "a"}], "needs tool_name, tool_args"),
        ("1. a()", ["a"], "needs tool_name, tool_args"),
    ],
)
def test_plans_that_differ_are_found(raw_output: str, parsed: list[object], reason: str) -> None:
    found = plan_disagreement(raw_output, parsed)
    assert found is not None
    assert reason in found


def test_deep_arguments_crash_nothing() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    parsed: list[object] = [{"tool_name": "t", "tool_args": deep}]
    assert plan_disagreement("1. t([1])", parsed) is not None
