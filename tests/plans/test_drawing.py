"""A plan as a graph: laid out without overlaps, with marks at what differs or is wrong."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.plans.drawing import (
    MAX_CALLS,
    PlanDrawing,
    draw_plan,
    mark_differences,
)
from tinyagent_fast.plans.grammar import parse_plan
from tinyagent_fast.plans.graph import plan_dag, same_dag
from tinyagent_fast.plans.tools import Parameter, Tool

TOOLS = {
    "f": Tool("f", (Parameter("what", "str"),)),
    "g": Tool("g", ()),
    "h": Tool("h", (Parameter("what", "str"),)),
}
Calls = Sequence[tuple[str, frozenset[int]]]


@st.composite
def call_lists(draw: st.DrawFn, most: int = 7) -> list[tuple[str, frozenset[int]]]:
    """Give calls with the positions of those that each depends on."""
    return [
        (
            draw(st.sampled_from(("f", "g", "h"))),
            draw(st.frozensets(st.integers(0, at - 1), max_size=3)) if at else frozenset(),
        )
        for at in range(draw(st.integers(0, most)))
    ]


@st.composite
def reordered(draw: st.DrawFn) -> tuple[Calls, Calls]:
    """Give calls and the same calls in another order that keeps references backward."""
    calls = draw(call_lists())
    left, order = list(range(len(calls))), list[int]()
    while left:
        order.append(draw(st.sampled_from([at for at in left if calls[at][1] <= set(order)])))
        left.remove(order[-1])
    place = {old: new for new, old in enumerate(order)}
    return calls, [(calls[old][0], frozenset(place[x] for x in calls[old][1])) for old in order]


def plan(calls: Calls) -> str:
    lines = []
    for number, (tool, needed) in enumerate(calls, start=1):
        used = " ".join(f"${at + 1}" for at in sorted(needed))
        # g takes no argument, so that only f and h can depend on something.
        lines.append(f'{number}. {"h" if tool == "g" and used else tool}("{used}")')
    return "\n".join([*lines, f"{len(calls) + 1}. join()"]).replace('g("")', "g()")


def broken_plans() -> st.SearchStrategy[str]:
    pieces = ["1. f(", '"$1"', "2. g()\n", ")", "\n", "3. join()", "7. f($2)\n", "x", "${3}", "0. "]
    return st.lists(st.sampled_from(pieces), max_size=12).map("".join)


any_text = st.builds(plan, call_lists()) | broken_plans() | st.text()


def problems_of(drawing: PlanDrawing, number: int) -> tuple[str, ...]:
    return next(step.problems for step in drawing.steps if step.number == number)


def marked(label: str, prediction: str) -> tuple[PlanDrawing, PlanDrawing]:
    return mark_differences(draw_plan(label, TOOLS), draw_plan(prediction, TOOLS))


def count_marks(drawings: Sequence[PlanDrawing]) -> int:
    steps = sum(step.mark != "same" for drawing in drawings for step in drawing.steps)
    return steps + sum(mark != "same" for drawing in drawings for mark in drawing.edges.values())


# Reading and layers


@given(st.builds(plan, call_lists()))
def test_a_correct_plan_has_the_edges_of_its_graph_and_no_problems(text: str) -> None:
    drawing = draw_plan(text, TOOLS)
    assert set(drawing.edges) == plan_dag(parse_plan(text)).edges
    assert drawing.joined
    assert not drawing.all_problems


@given(any_text, st.booleans())
def test_every_call_has_a_place_of_its_own_behind_what_it_waits_for(
    text: str, finished: bool
) -> None:
    drawing = draw_plan(text, TOOLS, finished=finished)
    places = [(step.layer, step.place) for step in drawing.steps]
    assert len(set(places)) == len(places)
    assert all(drawing.steps[a].layer < drawing.steps[b].layer for a, b in drawing.edges)
    for layer in drawing.layers:
        assert [step.place for step in layer] == list(range(len(layer)))
    assert json.loads(json.dumps(drawing.to_json()))["joined"] == drawing.joined


@given(st.builds(plan, call_lists()), st.data())
def test_while_a_plan_is_written_its_calls_appear_one_by_one_without_problems(
    text: str, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(text)))
    so_far, whole = draw_plan(text[:cut], TOOLS, finished=False), draw_plan(text, TOOLS)
    assert not so_far.all_problems
    assert len(so_far.steps) == text[:cut].count("\n")
    assert [step.number for step in so_far.steps] == [
        step.number for step in whole.steps[: len(so_far.steps)]
    ]


def test_calls_that_can_run_at_once_share_a_layer_ordered_so_that_edges_do_not_cross() -> None:
    drawing = draw_plan('1. f("a")\n2. f("b")\n3. f("$2")\n4. f("$1")\n5. f("$3 $4")\n', TOOLS)
    assert [[step.number for step in layer] for layer in drawing.layers] == [[1, 2], [4, 3], [5]]


@pytest.mark.parametrize(
    ("line", "problem"),
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
def test_what_is_wrong_with_a_call_is_said_at_the_call(line: str, problem: str) -> None:
    drawing = draw_plan(f"1. g()\n{line}\n3. g()\n4. join()", TOOLS)
    assert problems_of(drawing, 2) == (problem,)
    assert problems_of(drawing, 1) == problems_of(drawing, 3) == ()
    assert problem.split(",", maxsplit=1)[0][:25] in drawing.to_svg()


def test_a_bad_reference_hides_no_good_one() -> None:
    drawing = draw_plan('1. g()\n2. f("$1 $2")\n3. join()', TOOLS)
    assert list(drawing.edges) == [(0, 1)]
    assert problems_of(drawing, 2) == ("step 2 (f) refers to $2, which is itself",)


def test_an_amount_of_money_is_no_reference() -> None:
    drawing = draw_plan('1. f("at most $500")\n2. join()', TOOLS)
    assert not drawing.all_problems
    assert not drawing.edges


def test_a_reference_to_join_is_a_problem() -> None:
    drawing = draw_plan('2. f("$1")\n1. join()', TOOLS)
    assert problems_of(drawing, 2) == ("$1 is the result of join",)
    assert not drawing.edges


def test_a_line_that_is_no_call_and_a_missing_end_are_problems_of_the_text() -> None:
    assert ["and then" in said for said in draw_plan("1. g()\nand then\n2. join()").problems] == [
        True
    ]
    assert draw_plan("1. g()\n", TOOLS, finished=False).problems == ()
    assert draw_plan("1. g()\n", TOOLS).problems == ("the text ends without join()",)


def test_without_tools_they_are_tinyagents() -> None:
    assert not draw_plan('1. get_phone_number("Sid")\n2. join()').all_problems
    assert problems_of(draw_plan("1. g()\n2. join()"), 1) == ("there is no tool g",)


def test_a_plan_without_end_is_drawn_so_far_and_the_rest_counted() -> None:
    lines = ["1. g()", *(f'{n}. f("${n - 1}")' for n in range(2, 2001))]
    drawing = draw_plan("\n".join(lines), TOOLS)
    assert (len(drawing.steps), drawing.left_out) == (MAX_CALLS, 2000 - MAX_CALLS)
    for drawn in (drawing.to_svg(), drawing.to_text()):
        assert f"{2000 - MAX_CALLS} more calls are not drawn" in drawn


# Drawings


def boxes_of(root: ET.Element) -> list[tuple[float, float, float, float]]:
    return [
        (
            float(r.get("x", 0)),
            float(r.get("y", 0)),
            float(r.get("width", 0)),
            float(r.get("height", 0)),
        )
        for r in root.iter("rect")
    ]


def svg(drawing: PlanDrawing) -> ET.Element:
    text = drawing.to_svg("label").replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
    return ET.fromstring(text)


@given(any_text)
def test_no_two_boxes_overlap_and_all_lie_in_the_drawing(text: str) -> None:
    root = svg(draw_plan(text, TOOLS))
    boxes = boxes_of(root)
    for (x, y, w, h), (x2, y2, _, h2) in itertools.combinations(boxes, 2):
        assert abs(x - x2) >= w or y + h <= y2 or y2 + h2 <= y
    for x, y, w, h in boxes:
        assert 0 <= x <= float(root.get("width", 0)) - w
        assert 0 <= y <= float(root.get("height", 0)) - h


@given(st.builds(plan, call_lists(10)))
def test_every_edge_leads_from_side_to_side_and_through_no_box(text: str) -> None:
    drawing = draw_plan(text, TOOLS)
    root = svg(drawing)
    boxes = boxes_of(root)
    lines = {p.get("data-edge"): p for p in root.iter("path") if "edge" in p.get("class", "")}
    assert set(lines) == {f"{a}-{b}" for a, b in drawing.edges}
    for start, end in drawing.edges:
        numbers = [float(n) for n in re.findall(r"[\d.]+", lines[f"{start}-{end}"].get("d", ""))]
        (x, y, w, h), (x2, y2, _, h2) = boxes[start], boxes[end]
        assert numbers[0] == x + w
        assert y < numbers[1] < y + h
        assert abs(numbers[-2] - x2) < 10
        assert y2 < numbers[-1] < y2 + h2
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        assert points == sorted(points, key=lambda point: point[0])
        for px, py in points[1:-1]:
            assert not any(bx < px < bx + bw and by < py < by + bh for bx, by, bw, bh in boxes)


@given(any_text, st.text(max_size=60))
def test_any_text_is_drawn_as_well_formed_svg_and_without_control_characters(
    text: str, argument: str
) -> None:
    for drawing in (draw_plan(text), draw_plan(f"1. open_note({argument!r})\n2. f({text!r})\n")):
        ET.fromstring(drawing.to_svg(text))
        assert "\x1b" not in drawing.to_text()


def test_a_query_in_an_argument_never_becomes_markup() -> None:
    root = svg(draw_plan('1. open_note("</script><b>x</b>", "</title><img src=http://x>")\n'))
    assert {found.tag for found in root.iter()} <= {
        "svg", "g", "title", "rect", "text", "tspan", "path"
    }  # fmt: skip
    assert any("</script><b>x</b>" in (found.text or "") for found in root.iter("title"))


def test_long_arguments_are_cut_in_the_box_and_whole_in_its_title() -> None:
    root = svg(draw_plan(f'1. open_note("{"long " * 30}", "")\n2. join()'))
    lines = ["".join(found.itertext()) for found in root.iter("text")]
    assert lines[0] == "1 open_note"
    assert lines[-1].endswith("\u2026")
    assert len(lines) < 6
    assert any("long " * 30 in (found.text or "") for found in root.iter("title"))


def test_references_have_the_colour_of_the_call_they_refer_to() -> None:
    root = svg(draw_plan('1. f("a")\n2. f("b")\n3. f("as $2 and ${1}")\n', TOOLS))
    spans = [(s.text, s.get("class")) for s in root.iter("tspan") if s.get("class")]
    assert spans == [("$2", "reference c1"), ("${1}", "reference c0")]
    of_two = next(g for g in root.iter("g") if g.get("data-step") == "2")
    assert "c1" in of_two.get("class", "").split()


def test_the_drawing_is_named_for_those_who_cannot_see_it() -> None:
    title = svg(draw_plan('1. g()\n2. f("$1")\n', TOOLS))[0].text or ""
    assert title == "label: 2 calls, 1 references: 1 g to 2 f"
    assert "no call that can be read" in draw_plan("").to_svg()


def test_text_shows_layers_references_and_problems() -> None:
    text = draw_plan('1. g()\n2. f("$1")\n3. f(2)\n4. join()', TOOLS).to_text(60)
    for said in ("1 g", "$1 -> 2", "problem: what must be str", "join() waits for all calls"):
        assert said in text, said
    assert max(map(len, text.splitlines())) <= 60


# Two plans


@given(call_lists(), call_lists())
def test_something_is_marked_exactly_where_the_graphs_differ(a: Calls, b: Calls) -> None:
    alike = same_dag(plan_dag(parse_plan(plan(a))), plan_dag(parse_plan(plan(b))))
    assert (count_marks(marked(plan(a), plan(b))) == 0) == alike


@given(reordered())
def test_another_order_of_the_same_calls_is_no_difference(pair: tuple[Calls, Calls]) -> None:
    assert count_marks(marked(plan(pair[0]), plan(pair[1]))) == 0


@given(call_lists(), call_lists())
def test_calls_and_references_in_both_are_as_many_on_either_side(a: Calls, b: Calls) -> None:
    label, prediction = marked(plan(a), plan(b))
    shared = [
        sorted(step.tool for step in side.steps if step.mark == "same")
        for side in (label, prediction)
    ]
    assert shared[0] == shared[1]
    kept = [sum(mark == "same" for mark in side.edges.values()) for side in (label, prediction)]
    assert kept[0] == kept[1]


def test_identical_calls_in_a_ring_are_no_difference() -> None:
    def ring(*pairs: str) -> str:
        sinks = [f'{n}. h("${a} ${b}")' for n, (a, b) in enumerate(pairs, start=6)]
        return "\n".join([*(f'{n}. f("{n}")' for n in range(1, 6)), *sinks, "11. join()"])

    pair = marked(ring("12", "23", "34", "45", "51"), ring("13", "35", "52", "24", "41"))
    assert count_marks(pair) == 0


def test_calls_are_paired_with_what_they_depend_on() -> None:
    people = '1. f("A")\n2. f("B")\n'
    label = people + '3. h("$1")\n4. h("$2")\n5. join()'
    pair = marked(label, people + '3. h("$2")\n4. h("$1")\n5. g()\n6. join()')
    assert count_marks(pair) == 1
    assert pair[1].steps[-1].mark == "extra"
    assert "+ 5 g" in pair[1].to_svg()


def test_of_two_like_calls_the_one_with_other_arguments_is_missing() -> None:
    label = '1. f("A")\n2. f("B")\n3. h("$1 $2")\n4. join()'
    wanted, _ = marked(label, label.replace('f("A")', 'find("A")'))
    assert [step.mark for step in wanted.steps] == ["missing", "same", "same"]
    assert dict(wanted.edges) == {(0, 2): "missing", (1, 2): "same"}


def test_a_missing_call_takes_its_references_with_it() -> None:
    wanted, found = marked(
        '1. f("Sid")\n2. g()\n3. h("$1 $2")\n4. join()', '1. g()\n2. h("$1")\n3. join()'
    )
    assert [step.mark for step in wanted.steps] == ["missing", "same", "same"]
    assert dict(wanted.edges) == {(0, 2): "missing", (1, 2): "same"}
    assert [step.mark for step in found.steps] == ["same", "same"]


def test_many_problems_of_a_text_are_counted_in_a_terminal_and_all_listed_as_values() -> None:
    drawing = draw_plan("nonsense\n" * 40)
    assert len(drawing.problems) >= 40
    lines = drawing.to_text().splitlines()
    assert len(lines) < 8 and any("more problems" in line for line in lines)


def test_a_drawing_without_anything_says_so_as_text() -> None:
    assert draw_plan("", finished=False).to_text().strip() == "(no steps)"
