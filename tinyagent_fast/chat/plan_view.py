"""A plan as it is drawn, in a terminal or in a page: calls in layers, references, every problem.

Pure and tolerant: it reads half a plan while a model still writes it, and a wrong plan is shown
with what is wrong at each call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

from tinyagent_fast.plans.grammar import Plan, PlanError, Step, read_plan, reference_uses
from tinyagent_fast.plans.graph import DagError, plan_dag
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, Tool, accepts

_OF_UNFINISHED = ("no_join", "empty")


@dataclass(frozen=True, kw_only=True)
class ViewNode:
    """One call: what it says, where it is drawn, and what is wrong with it."""

    number: int
    tool: str
    arguments: str
    """As the model wrote them."""
    layer: int
    """0 for calls that can start at once, else one more than the last call it waits for."""
    column: int
    """Place within the layer, from the left."""
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlanView:
    """A plan ready to be drawn; join is no node, since it waits for everything."""

    nodes: tuple[ViewNode, ...]
    """In the order of the text."""
    edges: tuple[tuple[int, int], ...]
    """Positions of nodes: the second needs the result of the first."""
    joined: bool
    problems: tuple[str, ...]
    """What is wrong with the text as a whole, or with lines that are no call."""

    @property
    def layers(self) -> list[list[ViewNode]]:
        """The nodes by layer, each from the left."""
        found: defaultdict[int, list[ViewNode]] = defaultdict(list)
        for node in sorted(self.nodes, key=lambda node: node.column):
            found[node.layer].append(node)
        return [found[layer] for layer in sorted(found)]

    @property
    def has_problems(self) -> bool:
        """Whether anything is wrong with the plan."""
        return bool(self.problems) or any(node.problems for node in self.nodes)

    def to_json(self) -> dict[str, Any]:
        """Give plain values for a page or a script.

        Returns:
            What `json` can write.
        """
        return asdict(self)


def view_plan(
    text: str, tools: Mapping[str, Tool] | None = None, *, finished: bool = True
) -> PlanView:
    """Read a plan for drawing.

    Args:
        text: What the planner wrote, or has written so far.
        tools: Tools that may be called; none stands for TinyAgent's own.
        finished: False while it is being written: then only whole lines are read, and a missing
            end is no problem.

    Returns:
        The view; no text raises anything.
    """
    reading = read_plan(text if finished else text[: text.rfind("\n") + 1])
    steps = reading.steps
    calls = [step for step in steps if step.tool != JOIN]
    bare = {step.number: replace(step, arguments=()) for step in steps}
    position: dict[int, int] = {}
    for index, call in enumerate(calls):
        position.setdefault(call.number, index)
    edges: set[tuple[int, int]] = set()
    problems: list[tuple[str, ...]] = []
    for index, call in enumerate(calls):
        needed, faults = _references(call, bare)
        edges |= {(position[number], index) for number in needed}
        known = TINYAGENT if tools is None else tools
        problems.append((*_call_problems(call, known), *faults))
    layers = _layers([call.number for call in calls], edges)
    columns = _columns(layers, edges)
    nodes = tuple(
        ViewNode(
            number=call.number,
            tool=call.tool,
            arguments=call.raw_arguments,
            layer=layers[index],
            column=columns[index],
            problems=problems[index],
        )
        for index, call in enumerate(calls)
    )
    return PlanView(
        nodes=nodes,
        edges=tuple(sorted(edges)),
        joined=any(step.tool == JOIN for step in steps),
        problems=tuple(_text_problems(reading.problems, finished)),
    )


def _text_problems(problems: Sequence[PlanError], finished: bool) -> Iterator[str]:
    for problem in problems:
        if finished or problem.code not in _OF_UNFINISHED:
            yield problem.message


def _references(call: Step, bare: Mapping[int, Step]) -> tuple[set[int], list[str]]:
    """Find the numbers a call refers to, and what is wrong with its other references.

    Each reference is put to `plan_dag` alone, with the two steps that its rules look at, so that
    the rules are its own and one fault hides no other.
    """
    needed: set[int] = set()
    faults: list[str] = []
    for number, whole in sorted(set(reference_uses(call.arguments))):
        alone = replace(call, arguments=(f"${number}" if whole else f" ${number}",))
        others = {other for other in (number, max(bare)) if other in bare} - {call.number}
        plan = Plan((*(bare[other] for other in sorted(others)), alone))
        try:
            edges = plan_dag(plan).edges
        except DagError as error:
            if error.message not in faults:
                faults.append(error.message)
            continue
        needed |= {plan.steps[start].number for start, _ in edges}
    # join gives no result that a call could wait for.
    joins = {number for number in needed if bare[number].tool == JOIN}
    faults += [f"${number} is the result of join" for number in sorted(joins)]
    return needed - joins, faults


def _call_problems(call: Step, tools: Mapping[str, Tool]) -> Iterator[str]:
    tool = tools.get(call.tool)
    if tool is None:
        yield f"there is no tool {call.tool}"
        return
    wanted, given = len(tool.parameters), len(call.arguments)
    if wanted != given:
        yield f"{call.tool} takes {wanted} argument{'s' * (wanted != 1)}, this call has {given}"
    for parameter, value in zip_longest(tool.parameters[:given], call.arguments[:wanted]):
        if not accepts(parameter, value):
            yield f"{parameter.name} must be {parameter.type}"


def _layers(numbers: Sequence[int], edges: set[tuple[int, int]]) -> list[int]:
    """Put every call behind the last one it waits for; references go to smaller numbers only."""
    before: defaultdict[int, list[int]] = defaultdict(list)
    for start, end in edges:
        before[end].append(start)
    layers = [0] * len(numbers)
    for node in sorted(range(len(numbers)), key=numbers.__getitem__):
        layers[node] = 1 + max((layers[start] for start in before[node]), default=-1)
    return layers


def _columns(layers: Sequence[int], edges: set[tuple[int, int]]) -> list[int]:
    """Order each layer by the mean column of what its calls wait for, so that few edges cross."""
    columns = [0] * len(layers)
    for layer in range(max(layers, default=-1) + 1):
        members = [node for node, own in enumerate(layers) if own == layer]
        pull = {}
        for node in members:
            near = [columns[start] for start, end in edges if end == node]
            pull[node] = sum(near) / len(near) if near else 0.0
        for column, node in enumerate(sorted(members, key=lambda node: (pull[node], node))):
            columns[node] = column
    return columns
