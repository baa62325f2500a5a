"""Plans drawn as graphs: what differs is marked, what is the same is not, nothing overlaps."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.plans.grammar import parse_plan
from tinyagent_fast.plans.graph import plan_dag, same_dag
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.reports.dag_layout import BOX_WIDTH, COLUMN_GAP, Box, layered_layout
from tinyagent_fast.reports.dag_svg import draw_plan, shortened
from tinyagent_fast.reports.plan_graphs import MAX_CALLS, DrawnPlan, PlanPair, plan_pair

NAMES = ("open_note", "get_email_address", "send_sms")
Calls = Sequence[tuple[str, frozenset[int]]]


@st.composite
def call_lists(draw: st.DrawFn, most: int = 7) -> list[tuple[str, frozenset[int]]]:
    size = draw(st.integers(0, most))
    return [
        (
            draw(st.sampled_from(NAMES)),
            draw(st.frozensets(st.integers(0, at - 1), max_size=3)) if at else frozenset(),
        )
        for at in range(size)
    ]


@st.composite
def reordered(draw: st.DrawFn) -> tuple[Calls, Calls]:
    """Return calls and the same calls in another order that keeps references backward."""
    calls = draw(call_lists())
    left, order = list(range(len(calls))), list[int]()
    while left:
        ready = [at for at in left if calls[at][1] <= set(order)]
        order.append(draw(st.sampled_from(ready)))
        left.remove(order[-1])
    place = {old: new for new, old in enumerate(order)}
    moved = [(calls[old][0], frozenset(place[x] for x in calls[old][1])) for old in order]
    return calls, moved


def plan(calls: Calls) -> str:
    lines = [
        f"{at}. {tool}({', '.join(repr(f'${x + 1}') for x in sorted(before))})"
        for at, (tool, before) in enumerate(calls, start=1)
    ]
    return "\n".join([*lines, f"{len(calls) + 1}. join()"])


def marks(pair: PlanPair) -> int:
    return sum(
        sum(call.state != "same" for call in side.calls)
        + sum(state != "same" for state in side.edges.values())
        for side in (pair.label, pair.prediction)
    )


@given(call_lists(), call_lists())
def test_something_is_marked_exactly_where_the_graphs_differ(a: Calls, b: Calls) -> None:
    alike = same_dag(plan_dag(parse_plan(plan(a))), plan_dag(parse_plan(plan(b))))
    assert (marks(plan_pair(plan(a), plan(b))) == 0) == alike


@given(reordered())
def test_another_order_of_the_same_calls_is_no_difference(pair: tuple[Calls, Calls]) -> None:
    assert marks(plan_pair(plan(pair[0]), plan(pair[1]))) == 0


@given(call_lists(), call_lists())
def test_calls_in_both_are_as_many_on_either_side(a: Calls, b: Calls) -> None:
    pair = plan_pair(plan(a), plan(b))
    shared = [
        sorted(call.tool for call in side.calls if call.state == "same")
        for side in (pair.label, pair.prediction)
    ]
    assert shared[0] == shared[1]
    kept = [sum(s == "same" for s in side.edges.values()) for side in (pair.label, pair.prediction)]
    assert kept[0] == kept[1]


def test_identical_calls_in_a_ring_are_no_difference() -> None:
    def ring(*pairs: str) -> str:
        sources = [f'{n}. open_note("{n}", "")' for n in range(1, 6)]
        sinks = [f'{n}. send_sms(["${a}"], "${b}")' for n, (a, b) in enumerate(pairs, start=6)]
        return "\n".join([*sources, *sinks, "11. join()"])

    pair = plan_pair(ring("12", "23", "34", "45", "51"), ring("13", "35", "52", "24", "41"))
    assert marks(pair) == 0


def test_calls_are_paired_with_what_they_depend_on() -> None:
    people = '1. get_phone_number("A")\n2. get_phone_number("B")\n'
    label = people + '3. send_sms(["$1"], "x")\n4. send_sms(["$2"], "y")\n5. join()'
    prediction = people + '3. send_sms(["$2"], "z")\n4. send_sms(["$1"], "z")\n5. open_note("", "")'
    pair = plan_pair(label, prediction + "\n6. join()")
    assert marks(pair) == 1
    assert pair.prediction.calls[-1].state == "extra"


def test_of_two_like_calls_the_one_with_other_arguments_is_missing() -> None:
    after = '3. reply_to_email(["$1", "$2"], "", [])\n4. join()'
    label = f'1. get_email_address("A")\n2. get_email_address("B")\n{after}'
    pair = plan_pair(label, label.replace('get_email_address("A")', 'find("A")'))
    assert [call.state for call in pair.label.calls] == ["missing", "same", "same"]
    assert dict(pair.label.edges) == {(0, 2): "missing", (1, 2): "same"}


def test_a_missing_call_takes_its_references_with_it() -> None:
    label = (
        '1. get_email_address("Sid")\n2. open_note("n", "")\n3. send_sms(["$1"], "$2")\n4. join()'
    )
    pair = plan_pair(label, '1. open_note("n", "")\n2. send_sms([], "$1")\n3. join()')
    assert [call.state for call in pair.label.calls] == ["missing", "same", "same"]
    assert dict(pair.label.edges) == {(0, 2): "missing", (1, 2): "same"}
    assert [call.state for call in pair.prediction.calls] == ["same", "same"]
    assert pair.reason == "The calls differ: missing 1 x get_email_address."


@pytest.mark.parametrize(
    ("prediction", "reason"),
    [
        ('1. fly("x")\n2. join()', "The plan calls tools that do not exist: fly."),
        ("1. open_note(x)\n2. join()", "are not Python literals"),
        ('1. open_note("$7", "")\n2. join()', "refers to $7"),
        ('1. open_note("a", "")', "does not end with join()"),
        ("", "there is no step in the text"),
        ('1. open_note("b", "")\n2. join()', "only the published metric differs"),
    ],
)
def test_the_reason_names_what_is_wrong(prediction: str, reason: str) -> None:
    assert reason in plan_pair('1. open_note("a", "")\n2. join()', prediction).reason


def test_a_broken_label_is_said_to_be_broken() -> None:
    assert plan_pair("open_note", "1. join()").reason.startswith("The label itself is at fault")


def test_unknown_tools_and_dead_references_stand_in_the_box() -> None:
    pair = plan_pair("1. join()", '1. fly("$3", "costs $500")\n2. join()')
    assert pair.prediction.calls[0].faults == ("unknown tool", "$3: no earlier step")
    own = {"fly": Tool("fly", ())}
    assert plan_pair("1. join()", '1. fly("$3")\n2. join()', own).prediction.calls[0].faults == (
        "$3: no earlier step",
    )


def test_a_plan_without_end_is_drawn_so_far_and_the_rest_counted() -> None:
    text = "\n".join(f'{n}. open_note("a", "")' for n in range(1, MAX_CALLS + 21))
    drawn = plan_pair("1. join()", text).prediction
    assert (len(drawn.calls), drawn.left_out) == (MAX_CALLS, 20)
    assert "20 more calls are not drawn" in draw_plan(drawn, "prediction")


@given(st.text(max_size=80) | st.builds(plan, call_lists()), st.text(max_size=60))
def test_any_text_can_be_drawn_as_well_formed_svg(text: str, argument: str) -> None:
    odd = f"1. open_note({argument!r})\n2. send_sms({text!r})\n3. join()"
    for prediction in (text, odd, text + odd):
        pair = plan_pair(odd, prediction)
        assert pair.reason
        for side in (pair.label, pair.prediction):
            ET.fromstring(f"<x>{draw_plan(side, text)}</x>")


def test_a_query_in_an_argument_never_becomes_markup() -> None:
    label = '1. open_note("</script><b>x</b>", "</title><img src=http://x>")\n2. join()'
    drawing = draw_plan(plan_pair(label, label).label, "label")
    root = ET.fromstring(f"<x>{drawing}</x>")
    tags = {found.tag for found in root.iter()} - {"x"}
    assert tags <= {"svg", "g", "title", "rect", "text", "path"}
    assert any("</script><b>x</b>" in (found.text or "") for found in root.iter("title"))


def test_long_arguments_are_cut_in_the_box_and_whole_in_the_title() -> None:
    label = f'1. open_note("{"long " * 30}", "")\n2. join()'
    root = ET.fromstring(f"<x>{draw_plan(plan_pair(label, label).label, 'label')}</x>")
    shown = [found.text or "" for found in root.iter("text")]
    assert shown[0] == "1 open_note"
    assert shown[1].endswith("\u2026")
    assert len(shown[1]) <= 30
    assert "long " * 30 in next(found.text or "" for found in root.iter("title"))


@given(st.text(max_size=60), st.integers(1, 30))
def test_shortening_keeps_one_line_within_its_length(value: str, most: int) -> None:
    short = shortened(value, most)
    assert len(short) <= most
    assert "\n" not in short
    if len(" ".join(value.split())) <= most:
        assert short == " ".join(value.split())


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    size = draw(st.integers(0, 12))
    pairs = list(itertools.combinations(range(size), 2))
    return size, draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []


def overlap(a: Box, b: Box) -> bool:
    return abs(a.x - b.x) < a.width and abs(a.y - b.y) < a.height


@given(graphs())
def test_no_two_boxes_overlap_and_all_lie_in_the_drawing(
    graph: tuple[int, list[tuple[int, int]]],
) -> None:
    layout = layered_layout(*graph)
    assert len(layout.boxes) == graph[0]
    for a, b in itertools.combinations(layout.boxes, 2):
        assert not overlap(a, b)
    for box in layout.boxes:
        assert 0 <= box.x <= layout.width - box.width
        assert 0 <= box.y <= layout.height - box.height


@given(graphs())
def test_every_edge_leads_to_the_right_and_through_no_box(
    graph: tuple[int, list[tuple[int, int]]],
) -> None:
    layout = layered_layout(*graph)
    assert set(layout.routes) == set(graph[1])
    for (start, end), route in layout.routes.items():
        a, b = layout.boxes[start], layout.boxes[end]
        assert route[0][0] == a.x + a.width
        assert a.y < route[0][1] < a.y + a.height
        assert route[-1][0] == b.x
        assert b.y < route[-1][1] < b.y + b.height
        assert list(route) == sorted(route, key=lambda point: point[0])
        for (x, y), (next_x, next_y) in itertools.pairwise(route):
            assert round(next_x - x) in (BOX_WIDTH, COLUMN_GAP)
            if round(next_x - x) == BOX_WIDTH:
                assert y == next_y
                assert not any(
                    box.x == x and box.y < y < box.y + box.height for box in layout.boxes
                )


def test_what_depends_stands_to_the_right_and_a_chain_is_one_row() -> None:
    layout = layered_layout(3, [(0, 1), (1, 2)])
    assert [box.x for box in layout.boxes] == sorted({box.x for box in layout.boxes})
    assert len({box.y for box in layout.boxes}) == 1


@pytest.mark.parametrize("edge", [(1, 0), (0, 0), (0, 5), (-1, 1)])
def test_an_edge_that_does_not_lead_on_is_refused(edge: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="later one"):
        layered_layout(2, [edge])


def test_a_plan_without_calls_says_so() -> None:
    assert "no call that can be read" in draw_plan(DrawnPlan(calls=(), edges={}, left_out=0), "x")
