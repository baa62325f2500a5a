"""The text forms of the dataset: messages of a point, and plans."""

from __future__ import annotations

import ast
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.data.messages import conversation_problem, parse_messages, scan_repr
from tinyagent_fast.data.schema import Message, plan_disagreement, plan_steps

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
    assert [(m.role, m.content) for m in parse_messages(raw)] == [
        (m["role"], m["content"]) for m in messages
    ]


@given(MESSAGES)
def test_json_messages_are_read_back_as_json_reads_them(messages: list[dict[str, str]]) -> None:
    raw = json.dumps(messages)
    expected = [(m["role"], m["content"]) for m in json.loads(raw)]
    assert [(m.role, m.content) for m in parse_messages(raw)] == expected


@given(
    st.text("'\"\\nx4 {}N,:r#\u00e9", max_size=30),
    st.text("'\"\\nx4 {}N,:r#\u00e9", max_size=30),
    st.sampled_from("'\""),
)
def test_whatever_the_fast_path_accepts_python_reads_in_the_same_way(
    first: str, second: str, quote: str
) -> None:
    raw = (
        f"[{{'role': 'system', 'content': {quote}{first}{quote}}}, "
        f"{{'role': 'user', 'content': '{second}'}}]"
    )
    scanned = scan_repr(raw)
    if scanned is not None:
        assert literal(raw) == [{"role": role, "content": text} for role, text in scanned]


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "it's",
        'say "x"',
        'it\'s "x"\n',
        "a\\b",
        "\t\x00\x1f\x85\u200b\u2028",
        "\ud800",
        "caf\u00e9 \U0001f600",
        "x" * 5000 + ' it\'s "q" ' * 900,
        "'}, {'role': 'user', 'content': 'x",
    ],
)
def test_the_fast_path_takes_what_repr_writes(text: str) -> None:
    raw = repr([{"role": "system", "content": text}, {"role": "user", "content": "q"}])
    assert scan_repr(raw) == [("system", text), ("user", "q")]


def test_equal_blocks_of_different_quote_kinds_are_not_mixed_up() -> None:
    block = "word " * 600
    for text in (block + "it's", block + 'it\'s "x"', block + '"x"'):
        raw = repr([{"role": "user", "content": text + "\\"}])
        assert parse_messages(raw) == (Message("user", text + "\\"),)


def test_a_plain_text_is_one_user_message() -> None:
    assert parse_messages("Follow [{these}] rules") == (Message("user", "Follow [{these}] rules"),)


def test_human_is_read_as_user() -> None:
    assert parse_messages("[{'role': 'human', 'content': 'q'}]") == (Message("user", "q"),)


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
    assert parse_messages(raw) == (Message("user", "q"),)


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
    assert parse_messages(repr([{"role": "user", "content": text}]))[0].content == text


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ((), "no message"),
        (("system",), "it has system"),
        (("user", "user"), "user, user"),
        (("user", "assistant", "user"), "user, assistant, user"),
        (("user", "system"), "user, system"),
    ],
)
def test_a_conversation_of_another_shape_is_a_problem(roles: tuple[str, ...], reason: str) -> None:
    messages = tuple(Message(role, "text") for role in roles)  # type: ignore[arg-type]
    problem = conversation_problem(messages)
    assert problem is not None
    assert reason in problem


def test_half_a_surrogate_pair_in_a_message_is_a_problem() -> None:
    problem = conversation_problem((Message("user", "a\ud800"),))
    assert problem is not None
    assert "surrogate" in problem


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
