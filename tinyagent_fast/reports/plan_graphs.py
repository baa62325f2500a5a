"""Two plans as graphs to draw: which calls and references of one have no counterpart in the other.

Plans of a model may be broken in any way, so this reads leniently what can be read; the verdict
itself is `plans.graph`'s and `evaluation`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tinyagent_fast.evaluation.scoring import FAILURE_CODES
from tinyagent_fast.plans.grammar import (
    PLAN_ERRORS,
    PlanError,
    Step,
    parse_plan,
    read_plan,
    reference_uses,
)
from tinyagent_fast.plans.graph import DAG_ERRORS, Dag, DagError, plan_dag, same_dag, why_different
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, Tool

State = Literal["same", "missing", "extra"]
"""Whether a call or reference is in both plans, in the label alone, or in the prediction alone."""
Edge = tuple[int, int]

MAX_CALLS = 30
"""A plan that repeats itself without end is drawn so far and no further."""


@dataclass(frozen=True, kw_only=True)
class DrawnCall:
    """One call to draw; `faults` says what is wrong with the call itself."""

    number: int
    tool: str
    arguments: str
    state: State
    faults: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnPlan:
    """A plan to draw: edges go by the positions of calls; `left_out` counts those over the cap."""

    calls: tuple[DrawnCall, ...]
    edges: Mapping[Edge, State]
    left_out: int


@dataclass(frozen=True, kw_only=True)
class PlanPair:
    """A label and a prediction with what differs, and why in one sentence."""

    label: DrawnPlan
    prediction: DrawnPlan
    reason: str


@dataclass(frozen=True)
class _Graph:
    """The calls that can be read, join left out, with the references that can be followed."""

    steps: tuple[Step, ...]
    edges: frozenset[Edge]
    faults: tuple[tuple[str, ...], ...]
    left_out: int

    def before(self, node: int) -> set[int]:
        return {start for start, end in self.edges if end == node}


def plan_pair(
    label: str, prediction: str, tools: Mapping[str, Tool] | None = TINYAGENT
) -> PlanPair:
    """Hold a prediction against its label.

    Args:
        label: The plan that was wanted, as text.
        prediction: The planner's output.
        tools: Tools by name; none stands for TinyAgent's own.

    Returns:
        Both as graphs. If they are the same graph, nothing is marked; if not, something is.
    """
    tools = TINYAGENT if tools is None else tools
    wanted, found = _read(label, tools), _read(prediction, tools)
    pairs = _matched(wanted, found)
    back = {b: a for a, b in pairs.items()}
    alike = same_dag(_dag(wanted), _dag(found))
    return PlanPair(
        label=_drawn(wanted, found.edges, pairs, "missing", alike),
        prediction=_drawn(found, wanted.edges, back, "extra", alike),
        reason=_reason(label, prediction, tools),
    )


def _read(text: str, tools: Mapping[str, Tool]) -> _Graph:
    every = [step for step in read_plan(text).steps if step.tool != JOIN]
    steps = every[:MAX_CALLS]
    last = max((step.number for step in every), default=0)
    edges: set[Edge] = set()
    faults: list[tuple[str, ...]] = []
    position: dict[int, int] = {}
    for index, step in enumerate(steps):
        wrong = [] if step.tool in tools else ["unknown tool"]
        for number, whole in sorted(set(reference_uses(step.arguments))):
            # As `plan_dag` reads them: "$500" within a longer text is an amount of money.
            if not whole and not 0 < number <= last:
                continue
            if number in position:
                edges.add((position[number], index))
            else:
                wrong.append(f"${number}: no earlier step")
        position.setdefault(step.number, index)
        faults.append(tuple(dict.fromkeys(wrong)))
    return _Graph(tuple(steps), frozenset(edges), tuple(faults), len(every) - len(steps))


def _dag(graph: _Graph) -> Dag:
    return Dag(tuple(step.tool for step in graph.steps), graph.edges)


def _matched(a: _Graph, b: _Graph) -> dict[int, int]:
    """Pair calls of the same tool: those with the same surroundings, then arguments, then any.

    Calls are taken in order, so what a call needs is paired before the call itself.
    """
    colours_a, colours_b = _colours(a, b)
    pairs: dict[int, int] = {}
    free = set(range(len(b.steps)))

    def same_arguments(node: int, other: int) -> bool:
        return a.steps[node].arguments == b.steps[other].arguments

    def likeness(node: int, other: int) -> tuple[int, bool, int]:
        before = {pairs.get(one) for one in a.before(node)} & b.before(other)
        return len(before), same_arguments(node, other), -abs(node - other)

    rounds: tuple[Callable[[int, int], bool], ...] = (
        lambda node, other: colours_a[node] == colours_b[other],
        same_arguments,
        lambda _node, _other: True,
    )
    for fits in rounds:
        for node, step in enumerate(a.steps):
            candidates = [
                other
                for other in sorted(free)
                if node not in pairs and b.steps[other].tool == step.tool and fits(node, other)
            ]
            if candidates:
                best = max(candidates, key=lambda other: likeness(node, other))
                pairs[node] = best
                free.discard(best)
    return pairs


def _colours(a: _Graph, b: _Graph) -> tuple[list[int], list[int]]:
    """Colour calls by tool and, round after round, by the colours before and after them."""
    names: dict[object, int] = {}
    colours = [[names.setdefault(s.tool, len(names)) for s in graph.steps] for graph in (a, b)]
    for _ in range(max(len(a.steps), len(b.steps))):
        names = {}
        colours = [
            [
                names.setdefault(
                    (
                        old[node],
                        tuple(sorted(old[x] for x, y in graph.edges if y == node)),
                        tuple(sorted(old[y] for x, y in graph.edges if x == node)),
                    ),
                    len(names),
                )
                for node in range(len(graph.steps))
            ]
            for graph, old in zip((a, b), colours, strict=True)
        ]
    return colours[0], colours[1]


def _drawn(
    graph: _Graph, other_edges: frozenset[Edge], pairs: Mapping[int, int], state: State, alike: bool
) -> DrawnPlan:
    def of_edge(edge: Edge) -> State:
        there = (pairs.get(edge[0], -1), pairs.get(edge[1], -1)) in other_edges
        return "same" if alike or there else state

    return DrawnPlan(
        calls=tuple(
            DrawnCall(
                number=step.number,
                tool=step.tool,
                arguments=step.raw_arguments.strip(),
                state="same" if alike or node in pairs else state,
                faults=graph.faults[node],
            )
            for node, step in enumerate(graph.steps)
        ),
        edges={edge: of_edge(edge) for edge in sorted(graph.edges)},
        left_out=graph.left_out,
    )


def _reason(label: str, prediction: str, tools: Mapping[str, Tool]) -> str:
    """Say in one sentence why a prediction is not its label."""
    try:
        wanted = plan_dag(parse_plan(label))
    except (PlanError, DagError) as error:
        return f"The label itself is at fault: {_meaning(error)}."
    try:
        plan = parse_plan(prediction)
        found = plan_dag(plan)
    except (PlanError, DagError) as error:
        return f"The plan is at fault: {_meaning(error)}."
    unknown = {step.tool for step in plan.steps if step.tool != JOIN and step.tool not in tools}
    if unknown:
        return f"The plan calls tools that do not exist: {', '.join(sorted(unknown))}."
    if same_dag(wanted, found):
        return FAILURE_CODES["reference_quirk"]
    return why_different(wanted, found)


def _meaning(error: PlanError | DagError) -> str:
    meaning = {**PLAN_ERRORS, **DAG_ERRORS}[error.code]
    return f"{meaning} ({error.message})"
