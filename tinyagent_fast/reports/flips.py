"""Two planners on the same queries: which plans flipped, by tool and by number of calls.

The paired figures themselves are `evaluation.comparison`'s; this finds the predictions to compare
in runs and folders, and says where the two disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tinyagent_fast.agent.evaluate import task_shares
from tinyagent_fast.data.generation.catalogue import plan_tools
from tinyagent_fast.errors import ConfigError, DataError, count_of
from tinyagent_fast.evaluation.comparison import PairedComparison, compare_plans
from tinyagent_fast.evaluation.predictions import find_predictions
from tinyagent_fast.evaluation.report import FactTable, percent
from tinyagent_fast.evaluation.scoring import Prediction, ScoredPlan, score_all
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.reports.reading import catalogue_of_run, tasks_of_run
from tinyagent_fast.reports.tables import count_calls

SIGNIFICANT_P = 0.05
"""Two-sided level below which a difference is called one."""


@dataclass(frozen=True)
class ComparedPlanner:
    """One side of a comparison."""

    name: str
    folder: Path
    predictions: tuple[Prediction, ...]
    tasks: Mapping[str, object] = field(default_factory=dict)
    """Figures of agent-eval of its run; empty where it was not run."""


@dataclass(frozen=True)
class Flip:
    """A query that one planner, "A" or "B", gets right and the other wrong."""

    winner: str
    loser: ScoredPlan

    def to_json(self) -> dict[str, object]:
        """Give plain values."""
        row, score = self.loser.prediction, self.loser.score
        return {
            "key": row.key,
            "query": row.query,
            "label": row.label,
            "winner": self.winner,
            "wrong": row.prediction,
            "cause": score.failure,
            "tools": list(count_calls(row.label)),
            "calls": score.label_steps,
        }


class FlipCount(NamedTuple):
    """How often each planner alone is right in a group of queries."""

    group: str
    queries: int
    only_a: int
    only_b: int


@dataclass(frozen=True, kw_only=True)
class FlippedPlans:
    """Two planners compared; `left_out` counts queries that only one of them planned for."""

    a: ComparedPlanner
    b: ComparedPlanner
    tools: Mapping[str, Tool] | None
    paired: PairedComparison
    flips: tuple[Flip, ...]
    by_tool: tuple[FlipCount, ...]
    by_calls: tuple[FlipCount, ...]
    left_out: int

    @property
    def tasks(self) -> dict[str, tuple[Proportion, Proportion]]:
        """Shares of agent-eval that both runs have, by name; they are not paired."""
        if not self.a.tasks or not self.b.tasks or self.a.tasks == self.b.tasks:
            return {}
        of_a, of_b = task_shares(self.a.tasks), task_shares(self.b.tasks)
        return {name: (of_a[name], of_b[name]) for name in of_a if name in of_b}

    def lines(self) -> list[str]:
        """Say the outcome in lines for a terminal and the head of a page."""
        paired, a, b = self.paired, self.a.name, self.b.name
        return [
            f"A  {a}: plan success {percent(paired.success_a)}",
            f"B  {b}: plan success {percent(paired.success_b)}",
            f"B less A: {paired.points()} points on {paired.n} queries, "
            f"McNemar p = {paired.mcnemar_p:.3g}",
            self.verdict(),
            f"flipped: {len(paired.only_a)} right in A only, {len(paired.only_b)} right in B only; "
            f"{paired.identical_texts} of {paired.n} plans identical",
            *([f"{self.left_out} queries planned by one alone are left out"] * bool(self.left_out)),
            *(
                f"{name}: A {percent(a)}, B {percent(b)}"
                for name, (a, b) in self.tasks.items()
                if a.total and b.total
            ),
        ]

    def verdict(self) -> str:
        """Say in one sentence what the test shows."""
        paired = self.paired
        if paired.mcnemar_p >= SIGNIFICANT_P:
            return f"No difference is shown by these {paired.n} queries."
        better, other = ("B", "A") if paired.difference > 0 else ("A", "B")
        return f"{better} is better than {other}; chance alone rarely gives such a difference."

    def tables(self) -> Iterator[FactTable]:
        """Lay out the flips by number of calls, by tool, and one by one."""
        for group, counts in (("number of calls", self.by_calls), ("tool", self.by_tool)):
            yield FactTable(
                title=f"Flips by {group}",
                note="Queries in the groups that have a flip; a query counts under each of its "
                "tools.",
                head=(group, "queries", "right in A only", "right in B only"),
                rows=counts,
            )
        yield FactTable(
            title="All flipped queries",
            head=("right in", "query", "calls", "why the other fails"),
            rows=tuple(
                (
                    f"{flip.winner} only",
                    flip.loser.prediction.query,
                    flip.loser.score.label_steps,
                    flip.loser.score.failure or "",
                )
                for flip in self.flips
            ),
        )

    def to_json(self) -> dict[str, object]:
        """Give all figures as plain values."""
        return {
            "a": str(self.a.folder),
            "b": str(self.b.folder),
            **self.paired.to_json(),
            "left_out": self.left_out,
            "tasks": {n: [a.to_json(), b.to_json()] for n, (a, b) in self.tasks.items()},
            "flips_by_tool": [count._asdict() for count in self.by_tool],
            "flips_by_calls": [count._asdict() for count in self.by_calls],
            "flips": [flip.to_json() for flip in self.flips],
        }


def find_planners(a: str, b: str, runs: Path) -> tuple[ComparedPlanner, ComparedPlanner]:
    """Find the predictions of two runs, folders or files.

    A run may hold several evaluations: the first kind that both have is taken.

    Raises:
        UserError: Nothing is there, or it cannot be read.
    """
    if not (a.strip() and b.strip()):
        raise ConfigError(
            "compare",
            f"it needs two runs, and {'B' if a.strip() else 'A'} is empty",
            "make compare A=run B=run, or tinyagent-fast compare RUN RUN",
        )
    found = [find_predictions(name, runs) for name in (a, b)]
    common = next((kind for kind in found[0] if kind in found[1]), None)
    planners = []
    for name, files in zip((a, b), found, strict=True):
        kind = next(iter(files)) if common is None else common
        predictions = tuple(files[kind].read())
        if not predictions:
            raise DataError(
                f"{files[kind].path}", "it holds no prediction", "let the evaluation finish"
            )
        shown = name.rstrip("/") + (f"/{kind}" if kind else "")
        folder = files[kind].folder
        planners.append(ComparedPlanner(shown, folder, predictions, tasks_of_run(folder)))
    return planners[0], planners[1]


def tools_of_both(
    a: ComparedPlanner, b: ComparedPlanner, catalogue: Path | None
) -> Mapping[str, Tool] | None:
    """Find the tools that both planners' plans may call: of the catalogue, else of their runs.

    Raises:
        UserError: The runs have different tools, or a catalogue cannot be read.
    """
    if catalogue is not None:
        return plan_tools(catalogue)
    tools_a, tools_b = (plan_tools(catalogue_of_run(planner.folder)) for planner in (a, b))
    if tools_a != tools_b:
        raise ConfigError(
            f"compare {a.name} and {b.name}",
            "their runs were made for different tools",
            "name the tools to score both with by --catalogue",
        )
    return tools_a


def flipped_plans(
    a: ComparedPlanner,
    b: ComparedPlanner,
    tools: Mapping[str, Tool] | None,
    *,
    common: bool = False,
) -> FlippedPlans:
    """Compare two planners; with `common` on the queries that both planned for.

    Raises:
        DataError: They have different queries and `common` is not set, or no query in common.
    """
    alone = {row.key for row in a.predictions} ^ {row.key for row in b.predictions}
    if alone and not common:
        raise DataError(
            f"{len(a.predictions)} predictions of {a.name} and {len(b.predictions)} of {b.name}",
            f"{len(alone)} queries were planned by one alone",
            "evaluate both on the same test file with the same --limit, or compare on the queries "
            "that both have with --common",
        )
    plans_a, plans_b = (
        score_all((row for row in side.predictions if row.key not in alone), tools)
        for side in (a, b)
    )
    paired = compare_plans(plans_a, plans_b)
    right = {"A": frozenset(paired.only_a), "B": frozenset(paired.only_b)}
    flips = tuple(
        Flip(winner, plan)
        for winner, losers in (("A", plans_b), ("B", plans_a))
        for plan in losers
        if plan.prediction.key in right[winner]
    )
    return FlippedPlans(
        a=a,
        b=b,
        tools=tools,
        paired=paired,
        flips=flips,
        by_tool=_counts(plans_a, flips, lambda plan: count_calls(plan.prediction.label)),
        by_calls=_counts(plans_a, flips, lambda plan: [count_of(plan.score.label_steps, "call")]),
        left_out=len(alone),
    )


def _counts(
    plans: Iterable[ScoredPlan],
    flips: Iterable[Flip],
    groups: Callable[[ScoredPlan], Iterable[str]],
) -> tuple[FlipCount, ...]:
    """Count flips in groups of queries, the most flipped group first."""
    queries = Counter(group for plan in plans for group in groups(plan))
    only_a, only_b = (
        Counter(group for flip in flips if flip.winner == side for group in groups(flip.loser))
        for side in ("A", "B")
    )
    flipped = only_a + only_b
    return tuple(
        FlipCount(group=group, queries=queries[group], only_a=only_a[group], only_b=only_b[group])
        for group in sorted(flipped, key=lambda group: (-flipped[group], group))
    )


def chosen_flips(flips: Sequence[Flip], most: int) -> list[Flip]:
    """Choose so many flips at most, half of each direction where both have enough, A's first."""
    of_a, of_b = ([f for f in flips if f.winner == side] for side in ("A", "B"))
    shown_a = of_a[: max(most // 2, most - len(of_b))]
    return [*shown_a, *of_b[: most - len(shown_a)]]
