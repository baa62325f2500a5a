"""The published success metric of TinyAgent, with its peculiarities.

Figures that are to be compared with published ones need the same verdict on every pair, also
where that verdict is odd. This module reaches it by the same mechanism, in its own code; any
failure of the original counts as no success. `plans.graph` holds the plain comparison.

Where the original differs from "same calls, same dependencies":

- Anything that is no step is skipped; a step whose arguments are no literals keeps them as one
  string. A repeated number replaces the earlier step in its place. Reading stops after join.
- Steps from the first unknown tool on are dropped, in labels too: `unknown_tools` finds those.
- `$N` means the N-th step in order, whatever the numbers written before the steps.
- Only string arguments and strings directly in list arguments can depend on a step, each through
  its first `$N`; `${N}`, tuples, dicts and deeper lists do not count.
- A step must also agree in its dependencies as a list, repetitions included, ordered by tool name
  and, within a name, as written, and so on down to the first steps.
- `$0` makes a node that equals no other. A step that depends on itself, a cycle or a dependency on
  a step that is not there raises an error.
- Two plans without any step that counts are a success.

Source: SqueezeAILab/TinyAgent, src/utils/plan_utils.py and src/utils/graph_utils.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import takewhile

from tinyagent_fast.plans.grammar import loose_steps, parse_expression
from tinyagent_fast.plans.graph import Dag, same_dag
from tinyagent_fast.plans.tools import JOIN, TINYAGENT

_FIRST_REFERENCE = re.compile(r"\$(\d+)")
_MAX_DIGITS = 4300
"""Python's own limit (3.11 and later) on the digits of an int it reads from text."""
_MAX_DEPTH = 990
"""A longer chain of dependencies meets Python's recursion limit of 1,000 in the original."""

_Step = tuple[str, str]
"""A step as the metric reads it: the tool, and what stands between the parentheses."""
_Shapes = dict[tuple[object, ...], int]
"""Numbers of each tool with its dependencies, shared by the two graphs of a pair."""


class _OriginalRaises(Exception):
    """The original would raise; the argument is the name of its exception."""


@dataclass(frozen=True, kw_only=True)
class ReferenceScores:
    """Both scores of a pair; an error is the name of the exception that the original raises.

    `success` is False also where the original raises. `tool_recall` is the share of the label's
    distinct tools, join among them, that the prediction uses; 0.0 where the original raises.
    `label_error` concerns the label alone: with one, no prediction can succeed, unless the label
    has no step at all ("ZeroDivisionError").
    """

    success: bool
    tool_recall: float
    label_error: str | None
    prediction_error: str | None


def reference_scores(
    label: str, prediction: str, known_tools: Collection[str] = TINYAGENT
) -> ReferenceScores:
    """Score a prediction as the published metric does; join is always a known tool."""
    shapes: _Shapes = {}
    wanted, wanted_dag, label_error = _read(label, known_tools, shapes)
    found, found_dag, prediction_error = _read(prediction, known_tools, shapes)
    success = wanted_dag is not None and found_dag is not None and same_dag(wanted_dag, found_dag)
    tools = {tool for tool, _ in wanted}
    shared = tools & {tool for tool, _ in found}
    return ReferenceScores(
        success=success,
        tool_recall=len(shared) / len(tools) if tools else 0.0,
        label_error=label_error if tools or label_error else "ZeroDivisionError",
        prediction_error=prediction_error,
    )


def _read(
    text: str, known_tools: Collection[str], shapes: _Shapes
) -> tuple[list[_Step], Dag | None, str | None]:
    steps: list[_Step] = []
    try:
        steps = _steps(text, known_tools)
        return steps, _graph(steps, shapes), None
    except _OriginalRaises as failure:
        return steps, None, str(failure)


def unknown_tools(text: str, known_tools: Collection[str] = TINYAGENT) -> frozenset[str]:
    """Find the tools of a plan that are not known; the metric drops the plan from the first on.

    What is left of a label says nothing of what was wanted: without a step it equals any garbage.
    """
    found = {tool for _, tool, _ in _up_to_join(text)}
    return frozenset(found - {JOIN, *known_tools})


def _up_to_join(text: str) -> Iterator[tuple[str, str, str]]:
    for step in loose_steps(text):
        yield step
        if step[1] == JOIN:
            return


def _steps(text: str, known_tools: Collection[str]) -> list[_Step]:
    """Read the steps up to join or up to the first unknown tool."""
    by_number = {_integer(digits): (tool, raw) for digits, tool, raw in _up_to_join(text)}
    known = {JOIN, *known_tools}
    return list(takewhile(lambda step: step[0] in known, by_number.values()))


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _OriginalRaises("ValueError")
    return int(digits)


def _arguments(raw: str) -> tuple[object, ...]:
    """Read arguments as a literal, else keep the text; a lone list stands for its items."""
    if raw == "":
        return ()
    try:
        value = ast.literal_eval(parse_expression(raw.lstrip(" \t")))
    except Exception:  # the original takes any failure for text that is no literal
        return (raw,)
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _references(raw: str) -> list[int]:
    """List the positions (from 1) that a step depends on, repetitions included."""
    if "$" not in raw and "\\" not in raw:  # a shortcut: only an escape could spell the sign
        return []
    found: list[int] = []
    for argument in _arguments(raw):
        for text in argument if isinstance(argument, list) else (argument,):
            match = _FIRST_REFERENCE.search(text) if isinstance(text, str) else None
            if match is not None:
                found.append(_integer(match.group(1)))
    return found


def _graph(steps: list[_Step], shapes: _Shapes) -> Dag:
    """Build the graph whose labels say all that two nodes must agree in."""
    befores: list[list[int]] = []
    for position, (_, raw) in enumerate(steps, start=1):
        numbers = _references(raw)
        if 0 in numbers:
            raise _OriginalRaises("KeyError")  # it has no name for such a node
        if max(numbers, default=0) > len(steps):
            raise _OriginalRaises("IndexError")
        if position in numbers:
            raise _OriginalRaises("ValueError")
        befores.append([number - 1 for number in numbers])
    labels = [""] * len(steps)
    shape_of = [0] * len(steps)
    for node in _ordered(befores):
        # Stable order by tool name: equal names are compared as written, as in the original.
        before = sorted(befores[node], key=lambda other: steps[other][0])
        shape = (steps[node][0], tuple(shape_of[other] for other in before))
        shape_of[node] = shapes.setdefault(shape, len(shapes))
        labels[node] = str(shape_of[node])
    edges = {(before, node) for node, nodes in enumerate(befores) for before in nodes}
    return Dag(tuple(labels), frozenset(edges))


def _ordered(befores: list[list[int]]) -> list[int]:
    """Order steps after what they depend on; fail on a cycle or a chain that is too long."""
    try:
        order = list(TopologicalSorter(dict(enumerate(befores))).static_order())
    except CycleError:
        raise _OriginalRaises("RecursionError") from None
    depth = [0] * len(befores)
    for node in order:
        depth[node] = max((depth[before] + 1 for before in befores[node]), default=0)
    if max(depth, default=0) > _MAX_DEPTH:
        raise _OriginalRaises("RecursionError")
    return order
