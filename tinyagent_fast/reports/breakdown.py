"""Where plans fail: by tool, by cause, and a choice of failing cases over all causes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tinyagent_fast.evaluation.scoring import FAILURE_CODES
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.plans.grammar import read_plan
from tinyagent_fast.plans.tools import JOIN
from tinyagent_fast.reports.reading import ScoredPlan

GALLERY_CASES = 24
"""Most failing cases that a page shows."""


@dataclass(frozen=True, kw_only=True)
class ToolRow:
    """How plans fare that should call a tool, or do.

    `success` is over the queries whose label calls it. `lacking` and `surplus` count all queries
    whose plan calls it less or more often than the label.
    """

    tool: str
    success: Proportion
    lacking: int
    surplus: int


@dataclass(frozen=True, kw_only=True)
class CauseRow:
    """One cause of failure, before training (if measured) and in the main evaluation."""

    code: str
    meaning: str
    count: int
    before: int | None


def calls(plan: str) -> Counter[str]:
    """Count the calls of a plan by tool.

    Args:
        plan: As text; what cannot be read is left out, and so is join.

    Returns:
        Calls by tool.
    """
    return Counter(step.tool for step in read_plan(plan).steps if step.tool != JOIN)


def by_tool(plans: Iterable[ScoredPlan]) -> list[ToolRow]:
    """Sum up by tool.

    Args:
        plans: Of one evaluation.

    Returns:
        The tools of labels, the most frequent first, then tools that only predictions call.
    """
    queries, successes, lacking, surplus = (Counter[str]() for _ in range(4))
    for plan in plans:
        wanted, found = calls(plan.prediction.label), calls(plan.prediction.prediction)
        queries.update(wanted.keys())
        if plan.score.success:
            successes.update(wanted.keys())
        lacking.update((wanted - found).keys())
        surplus.update((found - wanted).keys())
    tools = sorted(queries | surplus, key=lambda tool: (-queries[tool], -surplus[tool], tool))
    return [
        ToolRow(
            tool=tool,
            success=Proportion(successes[tool], queries[tool]),
            lacking=lacking[tool],
            surplus=surplus[tool],
        )
        for tool in tools
    ]


def by_cause(plans: Sequence[ScoredPlan], before: Sequence[ScoredPlan] | None) -> list[CauseRow]:
    """Count failures by cause.

    Args:
        plans: Of the main evaluation.
        before: The same queries before training, if they were measured.

    Returns:
        Causes that occur in either, the most frequent first.
    """
    now = Counter(plan.score.failure for plan in plans)
    then = Counter(plan.score.failure for plan in before or ())
    codes = [code for code in FAILURE_CODES if now[code] or then[code]]
    return [
        CauseRow(
            code=code,
            meaning=FAILURE_CODES[code],
            count=now[code],
            before=then[code] if before is not None else None,
        )
        for code in sorted(codes, key=lambda code: (-now[code], -then[code]))
    ]


def gallery(plans: Iterable[ScoredPlan], most: int = GALLERY_CASES) -> list[ScoredPlan]:
    """Choose failing cases in turn from every cause, so that rare causes are seen too.

    Args:
        plans: Of one evaluation.
        most: How many at most.

    Returns:
        Grouped by cause, the most frequent first; within a cause in the order of the file.
    """
    causes: defaultdict[str, list[ScoredPlan]] = defaultdict(list)
    for plan in plans:
        if plan.score.failure is not None:
            causes[plan.score.failure].append(plan)
    share = dict.fromkeys(causes, 0)
    room = min(most, sum(map(len, causes.values())))
    while room:
        for code, cases in causes.items():
            if room and share[code] < len(cases):
                share[code] += 1
                room -= 1
    frequent_first = sorted(causes, key=lambda code: (-len(causes[code]), code))
    return [plan for code in frequent_first for plan in causes[code][: share[code]]]
