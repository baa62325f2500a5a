"""The GBNF of plans: it lets through what `render_plan` writes, and nothing that is no plan."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinyagent_fast.plans.gbnf import MAX_CALLS, MAX_LIST_ITEMS, MAX_TEXT_UNITS, plan_grammar
from tinyagent_fast.plans.grammar import (
    END_OF_PLAN,
    Plan,
    PlanError,
    Step,
    parse_plan,
    references,
    render_plan,
)
from tinyagent_fast.plans.graph import plan_dag
from tinyagent_fast.plans.tools import TINYAGENT, Parameter, Tool, accepts, tools_by_name

TOOLS = tools_by_name(
    [
        Tool("find", (Parameter("name", "str"),)),
        Tool("send", (Parameter("to", "list[str]"), Parameter("text", "str", nullable=True))),
        Tool("wait", (Parameter("minutes", "int"), Parameter("quiet", "bool"))),
        Tool("ping", ()),
    ]
)

_TOKEN = re.compile(
    r'"(?P<text>(?:[^"\\]|\\.)*)"|(?P<set>\[(?:[^\]\\]|\\.)*\])|(?P<name>[a-z][a-z0-9-]*)'
    r"|\{(?P<low>\d+)(?P<comma>,)?(?P<high>\d+)?\}|(?P<sign>[()|?])|(?P<space>\s+)"
)


class Grammar:
    """A matcher for the part of GBNF that is used, written apart from what writes it.

    Strings are matched by a regular expression, for speed; everything else by following rules.
    """

    def __init__(self, text: str) -> None:
        self.rules: dict[str, Any] = {}
        for line in re.split(r"\n(?=[a-z#])", text.strip()):
            if not line.startswith("#"):
                name, _, body = line.partition(" ::= ")
                assert name not in self.rules, f"{name} is defined twice"
                self.rules[name] = self._alternatives(list(self._tokens(body)))
        self._strings: dict[str, re.Pattern[str]] = {}

    def _tokens(self, body: str) -> Iterator[re.Match[str]]:
        at = 0
        while at < len(body):
            token = _TOKEN.match(body, at)
            assert token, f"no GBNF: {body[at : at + 40]!r}"
            at = token.end()
            if token.lastgroup != "space":
                yield token
            else:
                # llama.cpp ends a rule at a line break, unless an alternative is still to come.
                assert "\n" not in token[0] or body[: token.start()].endswith("|")

    def _alternatives(self, tokens: list[re.Match[str]]) -> Any:
        choices: list[list[Any]] = [[]]
        while tokens and tokens[0]["sign"] != ")":
            token = tokens.pop(0)
            if token["sign"] == "|":
                choices.append([])
            elif token["sign"] == "(":
                choices[-1].append(self._alternatives(tokens))
                assert tokens.pop(0)["sign"] == ")"
            elif token["sign"] == "?" or token["low"]:
                low = int(token["low"] or 0)
                high = int(token["high"]) if token["high"] else 1 if token["sign"] else low
                choices[-1].append(("repeat", choices[-1].pop(), low, high))
            elif token["name"]:
                choices[-1].append(("rule", token["name"]))
            elif token["set"]:
                choices[-1].append(("set", re.compile(_python_set(token["set"]))))
            else:
                choices[-1].append(("text", json.loads(token[0])))
        return ("choice", choices)

    def matches(self, text: str) -> bool:
        return len(text) in self._ends(("rule", "root"), text, frozenset({0}))

    def _ends(self, node: Any, text: str, starts: frozenset[int]) -> frozenset[int]:
        kind = node[0]
        if not starts:
            return starts
        if kind == "text":
            return frozenset(s + len(node[1]) for s in starts if text.startswith(node[1], s))
        if kind == "set":
            return frozenset(s + 1 for s in starts if node[1].match(text, s))
        if kind == "rule":
            if node[1].startswith("str-"):
                found = (self._string(node[1]).match(text, s) for s in starts)
                return frozenset(m.end() for m in found if m)
            return self._ends(self.rules[node[1]], text, starts)
        if kind == "repeat":
            ends = starts if node[2] == 0 else frozenset()
            for times in range(1, node[3] + 1):
                starts = self._ends(node[1], text, starts)
                if not starts:
                    break
                ends |= starts if times >= node[2] else frozenset()
            return ends
        ends = frozenset()
        for sequence in node[1]:
            reached = starts
            for part in sequence:
                reached = self._ends(part, text, reached)
            ends |= reached
        return ends

    def _string(self, name: str) -> re.Pattern[str]:
        if name not in self._strings:
            self._strings[name] = re.compile(self._regex(("rule", name)))
        return self._strings[name]

    def _regex(self, node: Any) -> str:
        if node[0] == "text":
            return re.escape(node[1])
        if node[0] == "set":
            return str(node[1].pattern)
        if node[0] == "rule":
            return self._regex(self.rules[node[1]])
        if node[0] == "repeat":
            return f"(?:{self._regex(node[1])}){{{node[2]},{node[3]}}}"
        return "(?:" + "|".join("".join(map(self._regex, parts)) for parts in node[1]) + ")"


def _python_set(text: str) -> str:
    """Translate a set; Python has no characters beyond U+10FFFF, so none to leave out."""
    text = text.replace(r"\U00110000-\U001FFFFF", "")
    return "[" + text[1:-1].replace("[", r"\[") + "]"


@cache
def grammar_of(which: str) -> Grammar:
    return Grammar(plan_grammar({"test": TOOLS, "tinyagent": TINYAGENT}[which]))


def accepted(text: str, which: str = "test") -> bool:
    return grammar_of(which).matches(text)


GOOD = """\
1. find("Sid")
2. send(["$1", "x@y.z"], "see $1, it costs $ 5 (or $, or $$), \\"now\\"\\n\\\\ $")
Thought: one more
3. wait("$2", True)
4. send("$1", None)
5. wait(-12, "$3")
6. ping()
7. join()<END_OF_PLAN>"""


def test_a_plan_with_every_kind_of_argument_is_accepted() -> None:
    parse_plan(GOOD)
    assert accepted(GOOD)
    assert accepted("1. join()<END_OF_PLAN>")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (END_OF_PLAN, ""),
        (END_OF_PLAN, f"{END_OF_PLAN}\n"),
        ("1. find", " 1. find"),
        ("1. find", "2. find"),
        ("3. wait", "4. wait"),
        ("6. ping()\n", ""),
        ("7. join()", "7. ping()"),
        ("7. join()", "7. join(1)"),
        ("6. ping", "6. join"),
        ("6. ping", "6. pong"),
        ("6. ping()", '6. ping("x")'),
        ('find("Sid")', "find()"),
        ('find("Sid")', 'find("Sid", "x")'),
        ('find("Sid")', 'find(name="Sid")'),
        ('find("Sid")', "find(None)"),
        ('find("Sid")', "find('Sid')"),
        ('find("Sid")', 'find(["Sid"])'),
        ('find("Sid")', 'find("Sid)'),
        ('find("Sid")', 'find("Sid"")'),
        ('find("Sid")', 'find("$1")'),
        ('find("Sid")', 'find("after $2")'),
        ('find("Sid")', 'find("$0")'),
        ('find("Sid")', 'find("$500")'),
        ('find("Sid")', 'find("$$2")'),
        ('find("Sid")', 'find("${1}")'),
        ('find("Sid")', 'find("S\nid")'),
        ('find("Sid")', 'find("S\\x00id")'),
        ('find("Sid")', 'find("S\\qid")'),
        ('find("Sid")', 'find("\x7f")'),
        ('["$1", "x@y.z"]', '["$12", "x@y.z"]'),
        ('["$1", "x@y.z"]', '["${1}", "x@y.z"]'),
        ('["$1", "x@y.z"]', '["$1" "x@y.z"]'),
        ('["$1", "x@y.z"]', '[["$1"], "x@y.z"]'),
        ('["$1", "x@y.z"]', '["$1", 2]'),
        ('["$1", "x@y.z"]', '"x@y.z"'),
        ("-12", "012"),
        ("-12", "1.5"),
        ("-12", '"12"'),
        ("-12", "1234567890"),
        ("True", "true"),
        ("True", "1"),
        ("Thought: one more", "Thought: "),
        ("Thought: one more", "Because"),
    ],
)
def test_what_is_no_plan_of_these_tools_is_not_accepted(old: str, new: str) -> None:
    changed = GOOD.replace(old, new, 1)
    assert changed != GOOD
    assert not accepted(changed)


def test_only_the_choices_of_a_parameter_can_be_written() -> None:
    odd = 'say "hi"\n'
    limited = Parameter("scene", "str", choices=("film", odd), nullable=True)
    tools = tools_by_name([Tool("set", (limited, Parameter("text", "str")))])
    grammar = Grammar(plan_grammar(tools))

    def matches(*scenes: str | None) -> bool:
        steps = [Step(number=n, tool="set", arguments=(s, "x")) for n, s in enumerate(scenes, 1)]
        plan = Plan((*steps, Step(number=len(steps) + 1, tool="join", arguments=())))
        return grammar.matches(render_plan(plan) + END_OF_PLAN)

    assert matches("film", odd, None, "$2")
    for wrong in ("films", "", "$1", "fil"):
        assert not matches(wrong)
    assert not matches("film", "the $1")


def test_lengths_are_bounded_at_the_stated_sizes() -> None:
    def plan(text: str) -> str:
        return f'1. find("{text}")\n2. join(){END_OF_PLAN}'

    def plan_of_list(items: int) -> str:
        listed = ", ".join('"x"' for _ in range(items))
        return f'1. send([{listed}], "")\n2. join(){END_OF_PLAN}'

    for unit in ("x", "\\n", "\U0001f600"):
        assert accepted(plan(unit * MAX_TEXT_UNITS))
        assert not accepted(plan(unit * (MAX_TEXT_UNITS + 1)))
    assert accepted(plan_of_list(0))
    assert accepted(plan_of_list(MAX_LIST_ITEMS))
    assert not accepted(plan_of_list(MAX_LIST_ITEMS + 1))


def test_a_plan_has_at_most_so_many_calls() -> None:
    def plan(calls: int) -> str:
        lines = [f"{n}. ping()" for n in range(1, calls + 1)]
        return "\n".join([*lines, f"{calls + 1}. join(){END_OF_PLAN}"])

    assert accepted(plan(MAX_CALLS))
    assert not accepted(plan(MAX_CALLS + 1))
    assert Grammar(plan_grammar({})).matches(plan(0))


# What a string may hold: no reference by accident, and only control characters with an escape.
_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\r\t$ {1"))
_MISTAKEN = re.compile(r"[$]+[0-9{]")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw plans of `TOOLS` whose references name earlier steps."""
    steps = []
    for number in range(1, draw(st.integers(0, 14)) + 1):
        text = _TEXT.map(lambda t: _MISTAKEN.sub("", t))
        if number > 1:
            whole = st.integers(1, number - 1).map(lambda n: f"${n}")
            inside = st.tuples(text, whole, st.sampled_from([" ", ". ", "$", "$ ", ""]))
            text = text | whole | inside.map("".join)
        else:
            whole = st.nothing()
        kinds: Mapping[str, st.SearchStrategy[object]] = {
            "str": text,
            "int": st.integers(-(10**9) + 1, 10**9 - 1) | whole,
            "bool": st.booleans() | whole,
            "list[str]": st.lists(text, max_size=4) | whole,
        }
        tool = draw(st.sampled_from(list(TOOLS.values())))
        arguments = tuple(
            draw(kinds[p.type] | st.none() if p.nullable else kinds[p.type])
            for p in tool.parameters
        )
        thought = draw(st.none() | st.sampled_from(["next", "it costs $5 \u00e9"]))
        steps.append(Step(number=number, tool=tool.name, arguments=arguments, thought=thought))
    return Plan((*steps, Step(number=len(steps) + 1, tool="join", arguments=())))


@given(plan=plans())
@settings(max_examples=150, deadline=None)
def test_every_plan_as_it_is_rendered_is_accepted(plan: Plan) -> None:
    text = render_plan(plan) + END_OF_PLAN
    assert parse_plan(text) == plan
    assert accepted(text)


@given(plan=plans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_plan_can_be_gone_on_with_behind_any_of_its_calls(
    plan: Plan, data: st.DataObject
) -> None:
    plan = Plan(tuple(replace(step, thought=None) for step in plan.steps))
    text = render_plan(plan) + END_OF_PLAN
    kept = data.draw(st.integers(0, min(len(plan.steps) - 1, MAX_CALLS - 1)))
    begun = plan.steps[:kept]
    assert Grammar(plan_grammar(TOOLS, begun=begun)).matches(text)
    if begun:
        other = replace(begun[0], tool="ping", arguments=("other",))
        assert not Grammar(plan_grammar(TOOLS, begun=(other, *begun[1:]))).matches(text)


def test_the_next_call_can_be_held_to_some_tools_and_to_results_of_the_right_kinds() -> None:
    tools = tools_by_name(
        [
            Tool("find", (Parameter("name", "str"),), returns="person"),
            Tool("look", (Parameter("at", "int", nullable=True),), returns="sight"),
            Tool(
                "send",
                (
                    Parameter("to", "list[str]", sources=("person",)),
                    Parameter("text", "str", sources=("sight", "person")),
                    Parameter("how", "str"),
                ),
            ),
            Tool("ping", ()),
        ]
    )
    begun = parse_plan('1. find("Sid \\"É\\"")\n2. look(None)\n3. ping()\n4. join()').steps[:3]
    grammar = Grammar(plan_grammar(tools, begun=begun, following=["send"]))
    there = render_plan(Plan(begun)) + "\n"

    def accepts_next(call: str, then: str = "") -> bool:
        end = 5 + then.count("\n")
        return grammar.matches(f"{there}4. {call}\n{then}{end}. join(){END_OF_PLAN}")

    for call in (
        'send(["$1", "x", ""], "it is $2, seen by $1", "as $1, $2")',
        'send("$1", "$2", "$3")',
        'send("$3", "a kind that is not known: $3", "")',
        'send(["$", "a $ b"], "costs $ 5 (or $$), $", "$ 5")',
        'send([], "no reference", "")',
    ):
        assert accepts_next(call), call
        assert accepts_next(call, '5. find("$2 or $4")\n6. look(1)\n'), "free again"
    for call in (
        'send(["$2"], "", "")',
        'send("$2", "", "")',
        'send(["$1"], "$4", "")',
        'send(["$1"], "", "$4")',
        'send(["$1"], "costs $5", "")',
        'send(["$1"], "${1}", "")',
        'send(["$12"], "", "")',
        'find("Sid")',
        "join()",
    ):
        assert not accepts_next(call), call
    assert not grammar.matches(f"{there}4. join(){END_OF_PLAN}")


@given(plan=plans())
@settings(max_examples=60, deadline=None)
def test_where_no_sources_are_known_the_next_call_is_as_free_as_any(plan: Plan) -> None:
    plan = Plan(tuple(replace(step, thought=None) for step in plan.steps))
    assume(len(plan.steps) > 1)
    *begun, last, _join = plan.steps
    grammar = Grammar(plan_grammar(TOOLS, begun=begun, following=[last.tool]))
    assert grammar.matches(render_plan(plan) + END_OF_PLAN)


def faults(plan: Plan) -> list[str]:
    """Say what a plan of TinyAgent's tools has that the grammar must not let through."""
    found = []
    for position, step in enumerate(plan.steps, start=1):
        if step.number != position or any(not 0 < n < position for n in references(step.arguments)):
            found.append(f"{position}: number or reference")
        tool = TINYAGENT.get(step.tool)
        if step.tool != "join":
            parameters = () if tool is None else tool.parameters
            if tool is None or len(parameters) != len(step.arguments):
                found.append(f"{position}: tool or arity")
            elif not all(map(accepts, parameters, step.arguments)):
                found.append(f"{position}: kind of argument")
    return found


@pytest.fixture(scope="module")
def server(tiny_gguf: dict[str, Path]) -> Iterator[Any]:
    """Serve a model with random weights, which writes whatever the grammar lets it."""
    pytest.importorskip("xllamacpp", reason="sampling needs the package xllamacpp")
    from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer

    with LlamaServer(
        LlamaCppSettings(model=tiny_gguf["f16"], slots=1, context_tokens_per_slot=8192, threads=1)
    ) as running:
        yield running


def test_every_text_that_llama_cpp_samples_at_temperature_1_is_a_plan(server: Any) -> None:
    grammar = plan_grammar(TINYAGENT)
    whole, referring = 0, 0
    for seed in range(10):
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": seed}
        # Quotes and dollars more often than at random: short strings, and many references.
        sampling["logit_bias"] = [['"', 5.0], ["\n", 6.0], ["$", 5.0], ["1", 3.0]]
        body = {"prompt": "Plan:\n", "n_predict": 6000, "grammar": grammar, **sampling}
        answer = server.request("POST", "/completion", body)
        if answer["stop_type"] == "limit":
            continue
        text = answer["content"]
        plan = parse_plan(text)
        whole += 1
        assert faults(plan) == []
        assert text.endswith(END_OF_PLAN)
        plan_dag(plan)
        referring += any(references(step.arguments) for step in plan.steps)
        # Bytes that are no character arrive as U+FFFD, so the texts can be compared.
        assert accepted(text, "tinyagent")
    assert whole >= 6
    assert referring >= 1


def test_every_label_of_the_real_data_without_a_fault_is_accepted(real_data: Path) -> None:
    """Faults are wrong arguments, and forms that `render_plan` never writes, such as comments."""
    labels, let_through = 0, 0
    for name in ("training_data.json", "testing_data.json"):
        entries = json.loads((real_data / name).read_text(encoding="utf-8"))
        for key, entry in entries.items():
            label = entry["output"][0]["raw_output"]
            labels += 1
            if accepted(label + END_OF_PLAN, "tinyagent"):
                let_through += 1
                continue
            try:
                plan = parse_plan(label)
            except PlanError:
                continue
            assert faults(plan) or render_plan(plan) != label, (key, label)
    assert labels > 200
    assert let_through >= 0.98 * labels
