"""Dependency graphs: how they are read off a plan, and the exact comparison."""

from __future__ import annotations

import time

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.plans.grammar import parse_plan
from tinyagent_fast.plans.graph import DAG_ERRORS, Dag, DagError, plan_dag, same_dag, why_different


def dag_of(text: str) -> Dag:
    return plan_dag(parse_plan(text))


def test_edges_go_by_the_written_numbers_and_count_once() -> None:
    dag = dag_of(
        '4. a("x")\n6. b(["$4"], "see ${4} and $4", {"k": ("$4",)})\n9. c("$6, $4")\n10. join()'
    )
    assert dag == Dag(("a", "b", "c", "join"), frozenset({(0, 1), (0, 2), (1, 2)}))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('1. a("$0")\n2. join()', "zero_reference"),
        ('1. a("$1")\n2. join()', "self_reference"),
        ('1. a("x $1")\n2. join()', "self_reference"),
        ('1. a("$2")\n2. b("x")\n3. join()', "forward_reference"),
        ('1. a("$2")\n2. b("$1")\n3. join()', "forward_reference"),
        ('1. a("$9")\n2. join()', "dangling_reference"),
        ('4. a("x")\n5. b("see $2")\n6. join()', "dangling_reference"),
    ],
)
def test_a_reference_that_cannot_be_followed_is_refused(text: str, code: str) -> None:
    with pytest.raises(DagError) as caught:
        dag_of(text)
    assert caught.value.code == code
    assert code in DAG_ERRORS


def test_an_amount_of_money_in_a_text_is_no_reference() -> None:
    dag = dag_of('1. a("at most $500, or $0")\n2. b("$1")\n3. join()')
    assert dag.edges == {(0, 1)}


def test_independent_calls_may_come_in_any_order() -> None:
    one = dag_of('1. a("x")\n2. b("y")\n3. c("$1", "$2")\n4. join()')
    other = dag_of('1. b("x")\n2. a("y")\n3. c("$2", "$1")\n4. join()')
    assert one != other
    assert same_dag(one, other)


def test_one_shared_call_is_not_two_separate_ones() -> None:
    shared = dag_of('1. a("x")\n2. a("y")\n3. b("$1")\n4. b("$1")\n5. join()')
    separate = dag_of('1. a("x")\n2. a("y")\n3. b("$1")\n4. b("$2")\n5. join()')
    assert not same_dag(shared, separate)
    assert "differently" in why_different(shared, separate)


def test_the_difference_is_said_in_a_sentence() -> None:
    label = dag_of('1. a("x")\n2. b("$1")\n3. join()')
    calls = why_different(label, dag_of('1. a("x")\n2. c("$1")\n3. join()'))
    assert calls == "The calls differ: missing 1 x b; extra 1 x c."
    edges = why_different(label, dag_of('1. a("x")\n2. b("y")\n3. join()'))
    assert edges == "The calls agree. The dependencies differ: missing 1 x a -> b."
    assert why_different(label, label) == "The graphs are the same."


@st.composite
def graphs(draw: st.DrawFn, acyclic: bool = True) -> Dag:
    size = draw(st.integers(0, 7))
    labels = draw(st.lists(st.sampled_from("aab"), min_size=size, max_size=size))
    pairs = [(i, j) for i in range(size) for j in range(size) if i < j or not acyclic]
    edges = draw(st.sets(st.sampled_from(pairs))) if pairs else set()
    return Dag(tuple(labels), frozenset(edges))


def shuffled(dag: Dag, order: list[int]) -> Dag:
    labels = [""] * len(order)
    for node, place in enumerate(order):
        labels[place] = dag.labels[node]
    return Dag(tuple(labels), frozenset((order[a], order[b]) for a, b in dag.edges))


def networkx_says_same(a: Dag, b: Dag) -> bool:
    pair = []
    for dag in (a, b):
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from((node, {"label": label}) for node, label in enumerate(dag.labels))
        graph.add_edges_from(dag.edges)
        pair.append(graph)
    one, other = pair
    return bool(nx.is_isomorphic(one, other, node_match=lambda m, n: m["label"] == n["label"]))


@settings(max_examples=300)
@given(graphs(), graphs(), st.data())
def test_the_comparison_agrees_with_networkx(a: Dag, b: Dag, data: st.DataObject) -> None:
    assert same_dag(a, b) == networkx_says_same(a, b)
    twin = shuffled(a, data.draw(st.permutations(range(len(a.labels)))))
    assert same_dag(a, twin)
    if a.edges:
        # One edge moved keeps all counts equal, which is the hard case for a comparison.
        edges = sorted(twin.edges)
        edge = data.draw(st.sampled_from(edges))
        moved = Dag(twin.labels, frozenset((set(edges) - {edge}) | {(0, edge[1])}))
        assert same_dag(a, moved) == networkx_says_same(a, moved)


@given(graphs(acyclic=False), graphs(acyclic=False), st.data())
def test_graphs_with_cycles_and_loops_are_compared_exactly_too(
    a: Dag, b: Dag, data: st.DataObject
) -> None:
    assert same_dag(a, b) == networkx_says_same(a, b)
    assert same_dag(a, shuffled(a, data.draw(st.permutations(range(len(a.labels))))))


def rings(*lengths: int) -> Dag:
    """Rings whose nodes all look alike locally: edges lead from even to odd nodes."""
    edges: set[tuple[int, int]] = set()
    start = 0
    for length in lengths:
        for node in range(0, length, 2):
            edges.add((start + node, start + node + 1))
            edges.add((start + node, start + (node - 1) % length))
        start += length
    return Dag(("a",) * start, frozenset(edges))


def behind_a_root(dag: Dag) -> Dag:
    """Add a call that all others need, so that the graph hangs together."""
    root = len(dag.labels)
    return Dag((*dag.labels, "root"), dag.edges | {(root, node) for node in range(root)})


def test_graphs_that_colours_cannot_tell_apart_are_told_apart() -> None:
    assert not same_dag(rings(6, 6), rings(12))
    assert same_dag(rings(4, 8, 6), rings(8, 6, 4))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (Dag(("f",) * 3000, frozenset()), Dag(("f",) * 3000, frozenset()), True),
        (rings(*[6] * 20), rings(*[6] * 18, 12), False),
        (behind_a_root(rings(*[6] * 9)), behind_a_root(rings(*[6] * 7, 12)), False),
        (
            Dag(("f",) * 41, frozenset((0, i) for i in range(1, 41))),
            Dag(("f",) * 41, frozenset((40, i) for i in range(40))),
            True,
        ),
        (
            Dag(("f",) * 3000, frozenset((i, i + 1) for i in range(2999))),
            Dag(("f",) * 3000, frozenset((i + 1, i) for i in range(2999))),
            True,
        ),
    ],
    ids=["equal calls", "many equal rings", "rings behind one call", "star", "chain"],
)
def test_adversarial_graphs_are_compared_quickly(a: Dag, b: Dag, same: bool) -> None:
    start = time.process_time()
    assert same_dag(a, b) is same
    assert time.process_time() - start < 2
