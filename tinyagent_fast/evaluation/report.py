"""Metrics as text: a Markdown report for terminals and pull requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice

from tinyagent_fast.evaluation.scoring import (
    FAILURE_CODES,
    PROBLEMS,
    Metrics,
    Prediction,
    score_prediction,
)
from tinyagent_fast.evaluation.statistics import Mean, Proportion
from tinyagent_fast.plans.drawing import printable
from tinyagent_fast.plans.grammar import PLAN_ERRORS, PlanError, parse_plan
from tinyagent_fast.plans.graph import DAG_ERRORS, DagError, plan_dag, same_dag, why_different
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, Tool

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


def markdown_report(
    title: str,
    metrics: Metrics,
    predictions: Sequence[Prediction],
    tools: Mapping[str, Tool] | None,
) -> str:
    """Write the figures and the first failing plans as Markdown.

    Args:
        title: Heading.
        metrics: The figures.
        predictions: What they were computed from.
        tools: Tools by name; None stands for TinyAgent's own.
    """
    lines = [f"# {plain(title)}", "", f"**{headline(metrics)}** (95 % Wilson interval)", ""]
    lines += ["| figure | value |", "|---|---|"]
    lines.append(f"| success (the published metric) | {percent(metrics.success)} |")
    lines.append(f"| success_dag (pure graph isomorphism) | {percent(metrics.success_dag)} |")
    lines.append(f"| tool recall (mean, conservative interval) | {percent(metrics.tool_recall)} |")
    for name, meaning in PROBLEMS.items():
        lines.append(f"| {name}: {meaning} | {percent(getattr(metrics, name))} |")
    if metrics.bad_labels.count:
        lines.append(f"| labels that cannot be scored themselves | {percent(metrics.bad_labels)} |")
    lines += ["", "## Why plans fail", "", "| reason | plans | meaning |", "|---|---|---|"]
    lines += [f"| {code} | {n} | {FAILURE_CODES[code]} |" for code, n in metrics.failures.items()]
    lines += ["", "## Success by number of calls", "", "| calls | success | n |", "|---|---|---|"]
    for steps, share in sorted(metrics.success_by_steps.items()):
        lines.append(f"| {steps} | {percent(share)} | {share.total} |")
    lines += ["", f"## The first {_SHOWN_FAILURES} failing plans", ""]
    scored = ((row, score_prediction(row, tools)) for row in predictions)
    failing = ((row, score.failure) for row, score in scored if not score.success)
    for row, code in islice(failing, _SHOWN_FAILURES):
        why = explain_failure(row.label, row.prediction, tools)
        lines += [f"**{plain(row.query)}**", "", f"{code}: {plain(why)}", ""]
        lines += [fenced(f"{row.label}\n--- predicted\n{row.prediction}"), ""]
    return "\n".join(lines) + "\n"


def plain(value: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    return _MARKDOWN_MARKS.sub(r"\\\1", " ".join(printable(value).split()))


def fenced(value: str) -> str:
    """Write a text as a block that no text can end early."""
    longest = max((len(found) for found in _BACKTICKS.findall(value)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{printable(value)}\n{fence}"


def explain_failure(label: str, prediction: str, tools: Mapping[str, Tool] | None) -> str:
    """Say in one sentence why a prediction is not its label.

    Args:
        label: The plan that was wanted, as text.
        prediction: The planner's output.
        tools: Tools by name; None stands for TinyAgent's own.

    Returns:
        A sentence for a report.
    """
    known = TINYAGENT if tools is None else tools
    try:
        wanted = plan_dag(parse_plan(label))
    except (PlanError, DagError) as error:
        return f"The label itself is at fault: {_meaning(error)}."
    try:
        plan = parse_plan(prediction)
        found = plan_dag(plan)
    except (PlanError, DagError) as error:
        return f"The plan is at fault: {_meaning(error)}."
    unknown = {step.tool for step in plan.steps if step.tool != JOIN and step.tool not in known}
    if unknown:
        return f"The plan calls tools that do not exist: {', '.join(sorted(unknown))}."
    if same_dag(wanted, found):
        return FAILURE_CODES["reference_quirk"]
    return why_different(wanted, found)


def _meaning(error: PlanError | DagError) -> str:
    meaning = {**PLAN_ERRORS, **DAG_ERRORS}[error.code]
    return f"{meaning} ({error.message})"
