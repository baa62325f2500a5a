"""Figures as text: tables of facts, and an evaluation as Markdown for terminals and reviews."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from tinyagent_fast.errors import printable
from tinyagent_fast.evaluation.scoring import (
    FAILURE_CODES,
    METRICS,
    PROBLEMS,
    Metrics,
    Prediction,
    ScoredPlan,
)
from tinyagent_fast.evaluation.statistics import Mean, Proportion
from tinyagent_fast.plans.grammar import PLAN_ERRORS, PlanError, parse_plan
from tinyagent_fast.plans.graph import DAG_ERRORS, plan_dag, same_dag, why_different
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, Tool

Cell = str | int | float | Proportion | Mean
"""A float is a share whose number of cases is not known; HTML shows shares as bars too."""

_SHOWN_FAILURES = 10
_MARKDOWN_MARKS = re.compile(r"([\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w))")
_BACKTICKS = re.compile(r"`{3,}")


def percent(value: Proportion | Mean) -> str:
    """Write a share with its 95 % interval, as `61.5 % (58.1 - 64.8)`."""
    share = value.mean if isinstance(value, Mean) else value.share
    low, high = value.interval
    return f"{100 * share:.1f} % ({100 * low:.1f} - {100 * high:.1f})"


def headline(metrics: Metrics) -> str:
    """Say the result in one line: success with interval and count."""
    return f"plan success {percent(metrics.success)}, n = {metrics.n}"


@dataclass(frozen=True, kw_only=True)
class FactTable:
    """A table of a report; `note` stands before it, and the first `marked` rows stand out."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    marked: int = 0

    def to_markdown(self) -> str:
        """Write the table with its heading."""
        notes = [plain(self.note), ""] if self.note else []
        rows = (f"| {' | '.join(plain(cell_text(cell)) for cell in row)} |" for row in self.rows)
        head = f"| {' | '.join(self.head)} |"
        lines = [f"## {self.title}", "", *notes, head, f"|{'---|' * len(self.head)}", *rows, ""]
        return "\n".join(lines)


def cell_text(cell: Cell) -> str:
    """Write a cell as text; shares in per cent, with the 95 % interval if there is one."""
    if isinstance(cell, float):
        return f"{100 * cell:.2f} %"
    if isinstance(cell, Mean):
        return percent(cell)
    if isinstance(cell, Proportion):
        return percent(cell) if cell.total else "none"
    return str(cell)


def markdown_report(
    title: str,
    metrics: Metrics,
    plans: Sequence[ScoredPlan],
    tools: Mapping[str, Tool] | None,
    note: str = "",
) -> str:
    """Write the figures of plans, and the first failing plans, as Markdown.

    Args:
        title: The heading.
        metrics: The figures.
        plans: What they are of; without any, only the figures are written.
        tools: By name; None stands for TinyAgent's own.
        note: A sentence on how the plans were asked for.
    """
    figures: list[tuple[Cell, ...]] = [
        *((f"{m.title} ({m.meaning})", getattr(metrics, name)) for name, m in METRICS.items()),
        *((f"{name}: {meaning}", getattr(metrics, name)) for name, meaning in PROBLEMS.items()),
    ]
    if metrics.bad_labels.count:
        figures.append(("labels that cannot be scored themselves", metrics.bad_labels))
    tables = (
        FactTable(title="Figures", head=("figure", "value"), rows=tuple(figures)),
        FactTable(
            title="Why plans fail",
            head=("reason", "plans", "meaning"),
            rows=tuple((code, n, FAILURE_CODES[code]) for code, n in metrics.failures.items()),
        ),
        success_by_calls(metrics),
    )
    all_failing = (plan for plan in plans if not plan.score.success)
    failing = [failing_plan(plan, tools) for plan in islice(all_failing, _SHOWN_FAILURES)]
    return "\n".join(
        (
            f"# {plain(title)}\n",
            f"**{headline(metrics)}** (95 % Wilson interval)\n",
            *([f"{plain(note)}\n"] if note else []),
            *(table.to_markdown() for table in tables),
            *([f"## The first {_SHOWN_FAILURES} failing plans\n"] if failing else []),
            *failing,
        )
    )


def success_by_calls(metrics: Metrics) -> FactTable:
    """Lay out success by the number of calls in the label."""
    rows = ((calls, share.total, share) for calls, share in metrics.success_by_steps.items())
    return FactTable(
        title="Success by number of calls",
        head=("calls in the label", "queries", "success"),
        rows=tuple(rows),
    )


def failing_plan(plan: ScoredPlan, tools: Mapping[str, Tool] | None) -> str:
    """Write a failing plan under its label, with the reason, as Markdown."""
    row = plan.prediction
    why = f"{plan.score.failure}: {plain(explain_failure(row, tools))}"
    texts = fenced(f"{row.label}\n--- predicted\n{row.prediction}")
    return f"### {plain(row.query)}\n\n{why}\n\n{texts}\n"


def plain(value: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    return _MARKDOWN_MARKS.sub(r"\\\1", " ".join(printable(value).split()))


def fenced(value: str) -> str:
    """Write a text as a block that no text can end early."""
    longest = max((len(found) for found in _BACKTICKS.findall(value)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{printable(value)}\n{fence}"


def explain_failure(row: Prediction, tools: Mapping[str, Tool] | None) -> str:
    """Say in one sentence why a prediction is not its label; `tools` as for `score_pair`."""
    known = TINYAGENT if tools is None else tools
    try:
        wanted = plan_dag(parse_plan(row.label))
    except PlanError as error:
        return f"The label itself is at fault: {_meaning(error)}."
    try:
        plan = parse_plan(row.prediction)
        found = plan_dag(plan)
    except PlanError as error:
        return f"The plan is at fault: {_meaning(error)}."
    unknown = {step.tool for step in plan.steps if step.tool != JOIN and step.tool not in known}
    if unknown:
        return f"The plan calls tools that do not exist: {', '.join(sorted(unknown))}."
    if same_dag(wanted, found):
        return FAILURE_CODES["reference_quirk"]
    return why_different(wanted, found)


def _meaning(error: PlanError) -> str:
    meaning = {**PLAN_ERRORS, **DAG_ERRORS}[error.code]
    return f"{meaning} ({error.message})"
