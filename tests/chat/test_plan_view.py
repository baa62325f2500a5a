"""A plan as it is drawn: whatever the text, calls in layers below what they wait for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.chat.plan_view import PlanView, view_plan
from tinyagent_fast.plans.grammar import Plan, Step, parse_plan, render_plan
from tinyagent_fast.plans.graph import plan_dag
from tinyagent_fast.plans.tools import JOIN, Parameter, Tool

TOOLS = {"f": Tool("f", (Parameter("what", "str"),)), "g": Tool("g", ())}


@st.composite
def plans(draw: st.DrawFn) -> str:
    """Write correct plans whose calls refer to any earlier calls."""
    steps = []
    for number in range(1, draw(st.integers(1, 9)) + 1):
        used = sorted(draw(st.sets(st.integers(1, number - 1)))) if number > 1 else []
        text = " ".join(f"${n}" for n in used)
        steps.append(Step(number=number, tool="f", arguments=(text,)))
    steps.append(Step(number=len(steps) + 1, tool=JOIN, arguments=()))
    return render_plan(Plan(tuple(steps)))


def broken_plans() -> st.SearchStrategy[str]:
    pieces = ["1. f(", '"$1"', "2. g()\n", ")", "\n", "3. join()", "7. f($2)\n", "x", "${3}", "0. "]
    return st.lists(st.sampled_from(pieces), max_size=12).map("".join)


def faults_of(view: PlanView, number: int) -> tuple[str, ...]:
    return next(node.problems for node in view.nodes if node.number == number)


@given(plans())
def test_a_correct_plan_has_the_edges_of_its_graph_and_no_problems(text: str) -> None:
    view = view_plan(text, TOOLS)
    assert set(view.edges) == plan_dag(parse_plan(text)).edges
    assert view.joined
    assert not view.has_problems


@given(plans() | broken_plans() | st.text())
def test_every_call_lies_in_a_place_of_its_own_below_what_it_waits_for(text: str) -> None:
    for finished in (True, False):
        view = view_plan(text, TOOLS, finished=finished)
        places = [(node.layer, node.column) for node in view.nodes]
        assert len(set(places)) == len(places)
        assert all(view.nodes[a].layer < view.nodes[b].layer for a, b in view.edges)
        assert [node.column for layer in view.layers for node in layer] == [
            column for layer in view.layers for column in range(len(layer))
        ]
        assert json.loads(json.dumps(view.to_json()))["joined"] == view.joined


@given(plans(), st.data())
def test_while_a_plan_is_written_its_calls_appear_one_by_one_without_problems(
    text: str, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(text)))
    so_far, whole = view_plan(text[:cut], TOOLS, finished=False), view_plan(text, TOOLS)
    assert not so_far.has_problems
    assert len(so_far.nodes) == text[:cut].count("\n")
    assert [node.number for node in so_far.nodes] == [
        node.number for node in whole.nodes[: len(so_far.nodes)]
    ]


def test_calls_that_can_run_at_once_share_a_layer() -> None:
    view = view_plan('1. f("a")\n2. f("b")\n3. f("$1 $2")\n4. f("$3")\n5. join()', TOOLS)
    assert [[node.number for node in layer] for layer in view.layers] == [[1, 2], [3], [4]]


def test_a_layer_is_ordered_so_that_edges_do_not_cross() -> None:
    view = view_plan('1. f("a")\n2. f("b")\n3. f("$2")\n4. f("$1")\n5. join()', TOOLS)
    assert [node.number for node in view.layers[1]] == [4, 3]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("2. fly()", "there is no tool fly"),
        ('2. f("a", "b")', "f takes 1 argument, this call has 2"),
        ("2. g(1)", "g takes 0 arguments, this call has 1"),
        ("2. f(3)", "what must be str"),
        ('2. f("$9")', "step 2 (f) refers to $9, and there is no such step"),
        ('2. f("$2")', "step 2 (f) refers to $2, which is itself"),
        ('2. f("$3")', "step 2 (f) refers to $3, which comes later"),
        ('2. f("$0")', "step 2 (f) refers to $0"),
    ],
)
def test_what_is_wrong_with_a_call_is_said_at_the_call(line: str, fault: str) -> None:
    view = view_plan(f"1. g()\n{line}\n3. g()\n4. join()", TOOLS)
    assert faults_of(view, 2) == (fault,)
    assert faults_of(view, 1) == faults_of(view, 3) == ()


def test_a_bad_reference_hides_no_good_one() -> None:
    view = view_plan('1. g()\n2. f("$1 $2")\n3. join()', TOOLS)
    assert view.edges == ((0, 1),)
    assert faults_of(view, 2) == ("step 2 (f) refers to $2, which is itself",)


def test_an_amount_of_money_is_no_reference() -> None:
    view = view_plan('1. f("at most $500")\n2. join()', TOOLS)
    assert not view.has_problems
    assert view.edges == ()


def test_a_line_that_is_no_call_is_named_with_its_text() -> None:
    view = view_plan("1. g()\nand then\n2. join()", TOOLS)
    assert len(view.problems) == 1
    assert "and then" in view.problems[0]


def test_a_missing_end_is_a_problem_of_finished_plans_only() -> None:
    assert view_plan("1. g()\n", TOOLS, finished=False).problems == ()
    assert view_plan("1. g()\n", TOOLS).problems == ("the text ends without join()",)


def test_without_a_catalogue_the_tools_are_tinyagents() -> None:
    assert not view_plan('1. get_phone_number("Sid")\n2. join()').has_problems
    assert faults_of(view_plan("1. g()\n2. join()"), 1) == ("there is no tool g",)


def test_a_chain_longer_than_pythons_stack_is_drawn() -> None:
    lines = ["1. g()", *(f'{n}. f("${n - 1}")' for n in range(2, 2001))]
    view = view_plan("\n".join(lines), TOOLS)
    assert max(node.layer for node in view.nodes) == 1999


def test_a_reference_to_join_is_a_problem() -> None:
    view = view_plan('2. f("$1")\n1. join()', TOOLS)
    assert faults_of(view, 2) == ("$1 is the result of join",)
    assert view.edges == ()
