"""Scores of predicted plans: one pair at a time, and summed up for a report.

Last stage of an evaluation: generation writes predictions, this module compares each with its
label and says how often and why a planner fails. `success` is the published metric
(`evaluation.reference`); `success_dag` is the plain comparison of dependency graphs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from types import NoneType
from typing import Any, get_args

from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.reference import reference_scores, unknown_tools
from tinyagent_fast.evaluation.statistics import Mean, Proportion
from tinyagent_fast.inference.engine import StopReason
from tinyagent_fast.plans.grammar import END_OF_PLAN, Plan, PlanReading, read_plan
from tinyagent_fast.plans.graph import Dag, DagError, plan_dag, same_dag
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, Tool, call_problems

FAILURE_CODES: dict[str, str] = {
    "bad_label": "The label itself cannot be read or scored; the prediction may be right.",
    "empty": "The planner wrote nothing.",
    "truncated": "The length limit cut the plan off before join().",
    "no_join": "The plan does not end with join().",
    "unparsable": "A line is no step, a step number is wrong, or join has arguments.",
    "bad_arguments": "The arguments of a step are not Python literals.",
    "unknown_tool": "The plan calls a tool that does not exist.",
    "bad_reference": "The plan refers to a step that is missing, later or the step itself.",
    "missing_tool": "A call of the label is missing; there may be others that the label lacks.",
    "extra_tool": "The plan has all calls of the label and more.",
    "wrong_edges": "The calls are right, but they depend on each other in another way.",
    "reference_quirk": "The dependency graph is right; only the published metric differs.",
}
"""Why a prediction fails, by the published metric: the first code that applies, in this order."""

PROBLEMS: dict[str, str] = {
    "unparsable": "The text, or a part of it, cannot be read as steps of a plan.",
    "bad_arguments": "The arguments of a step are not Python literals (also unparsable).",
    "no_join": "The plan does not end with join().",
    "truncated": "The length limit ended the generation.",
    "unknown_tool": "A called tool does not exist.",
    "wrong_arity": "A call has more or fewer arguments than the tool has parameters.",
    "wrong_argument_type": "An argument has another type than its parameter.",
    "bad_reference": "A reference leads to no earlier step.",
}
"""What can be wrong with a plan; each kind is looked for on its own, also on a success."""


@dataclass(frozen=True)
class Metric:
    """What a pair is scored by, as reports show it."""

    title: str
    meaning: str
    total: Callable[[Sequence[float]], Proportion | Mean]
    """Sums up the values of all pairs, each from 0 to 1."""


def _share(values: Sequence[float]) -> Proportion:
    return Proportion(int(sum(values)), len(values))


METRICS: dict[str, Metric] = {
    "success": Metric("success", "the published metric", _share),
    "success_dag": Metric("success_dag", "pure graph isomorphism", _share),
    "tool_recall": Metric("tool recall", "mean, conservative interval", Mean.of),
}
"""Fields of `PairScore` and `Metrics` that all reports and `score` show, the headline first."""

_LISTED_TOOLS = 5


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """The scores of one prediction against its label.

    `success` and `tool_recall` are the published metric's; `failure` is a key of `FAILURE_CODES`,
    or None on a success; `problems` and `label_problems` are keys of `PROBLEMS`. `bad_label`
    says that the label has no dependency graph, calls an unknown tool, or makes the published
    metric fail. Nothing is a success against a label of the last two kinds, although the published
    metric would let any text without steps match a label of which it can use no step. `label_steps`
    counts the calls of the label without join.
    """

    success: bool
    success_dag: bool
    tool_recall: float
    failure: str | None
    problems: tuple[str, ...]
    bad_label: bool
    label_problems: tuple[str, ...]
    label_steps: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One generated plan with its label, a line of a predictions file."""

    key: str
    query: str
    label: str
    prediction: str
    stop_reason: StopReason
    new_tokens: int
    seconds: float | None = None

    def to_json(self) -> dict[str, object]:
        """Give plain values for a predictions file."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Prediction:
        """Read a prediction; other fields are ignored, so that files may carry notes.

        Raises:
            DataError: If a field is missing or has the wrong type.
        """
        found: dict[str, Any] = {field.name: row.get(field.name) for field in fields(cls)}
        tokens, reasons = found["new_tokens"], get_args(StopReason)
        checks = {name: (isinstance(value, str), "a string") for name, value in found.items()} | {
            "stop_reason": (found["stop_reason"] in reasons, f"one of {', '.join(reasons)}"),
            "new_tokens": (type(tokens) is int and tokens >= 0, "a number of tokens"),
            "seconds": (type(found["seconds"]) in (int, float, NoneType), "a number or null"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise DataError(
                    f"prediction {row.get('key')!r}: {name} is {row.get(name)!r}",
                    f"it must be {wanted}",
                    "write the predictions file again, or repair this row",
                )
        return cls(**found)


@dataclass(frozen=True)
class ScoredPlan:
    """A prediction with its scores."""

    prediction: Prediction
    score: PairScore


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a report says about a set of predictions.

    `success` is the headline: the published metric. The shares from `unparsable` on count
    predictions with that problem, successes included. `failures` counts codes of `FAILURE_CODES`,
    most frequent first. `success_by_steps` goes by the number of calls in the label, join not
    counted. `bad_labels` counts labels as `PairScore.bad_label` tells: their predictions are in all
    figures, nearly always as failures.
    `label_problems` counts the kinds of slips in labels, good or bad.
    """

    n: int
    success: Proportion
    success_dag: Proportion
    tool_recall: Mean
    unparsable: Proportion
    bad_arguments: Proportion
    unknown_tool: Proportion
    wrong_arity: Proportion
    wrong_argument_type: Proportion
    bad_reference: Proportion
    no_join: Proportion
    truncated: Proportion
    failures: dict[str, int]
    success_by_steps: dict[int, Proportion]
    bad_labels: Proportion
    label_problems: dict[str, int]

    def to_json(self) -> dict[str, object]:
        """Give plain values, shares with their 95 % intervals."""
        figures: dict[str, object] = {
            name: value.to_json() if isinstance(value, (Proportion, Mean)) else value
            for name, value in vars(self).items()
        }
        figures["success_by_steps"] = {
            str(steps): share.to_json() for steps, share in self.success_by_steps.items()
        }
        return figures


def score_pair(
    label: str,
    prediction: str,
    tools: Mapping[str, Tool] | None = TINYAGENT,
    *,
    truncated: bool = False,
) -> PairScore:
    """Score one prediction; no text makes this raise.

    `tools` are all of the dataset by name, None stands for TinyAgent's own; `truncated` says that
    the length limit ended the generation.
    """
    tools = TINYAGENT if tools is None else tools
    published = reference_scores(label, prediction, tools)
    wanted, found = _PlanFacts.of(label, tools), _PlanFacts.of(prediction, tools)
    unscorable = published.label_error is not None or bool(unknown_tools(label, tools))
    success = published.success and not unscorable
    bad_label = wanted.dag is None or unscorable
    success_dag = (
        wanted.dag is not None and found.dag is not None and same_dag(wanted.dag, found.dag)
    )
    failure = None
    if not success:
        failure = "bad_label" if bad_label else _failure(wanted, found, success_dag, truncated)
    return PairScore(
        success=success,
        success_dag=success_dag,
        tool_recall=published.tool_recall,
        failure=failure,
        problems=(*found.problems, "truncated") if truncated else found.problems,
        bad_label=bad_label,
        label_problems=wanted.problems,
        label_steps=sum(step.tool != JOIN for step in wanted.reading.steps),
    )


def why_hopeless(label: str, tools: Mapping[str, Tool] | None = TINYAGENT) -> str | None:
    """Say why not even a model that writes a label would succeed; None if it would."""
    score = score_pair(label, label, tools)
    if not score.success or score.bad_label:
        return ", ".join(score.label_problems) or "it has no dependency graph"
    # Writing ends at the first stop string, wherever it stands.
    if not score_pair(label, label.partition(END_OF_PLAN)[0], tools).success:
        return f"{END_OF_PLAN} stands within the plan, and all that follows it is cut off"
    return None


def refuse_unknown_tools(
    what: str,
    labels: Sequence[str],
    tools: Mapping[str, Tool] | None,
    fix: str,
    *,
    some_are_fine: bool = False,
) -> None:
    """Refuse labels that call tools which the catalogue does not know.

    `what` names the labels, such as `test labels`, and `fix` says where the right catalogue is
    named; `some_are_fine` if they only must not be all: single ones count as bad labels.

    Raises:
        DataError: There are such labels.
    """
    known = TINYAGENT if tools is None else tools
    unknown = [names for label in labels if (names := unknown_tools(label, known))]
    found = Counter(chain.from_iterable(unknown))
    if not found or (some_are_fine and len(unknown) < len(labels)):
        return
    share = f"{len(unknown):,} of {len(labels):,} {what}"
    readings = [read_plan(label) for label in labels if unknown_tools(label, known)]
    if not any(r.problems or found.keys() & {step.tool for step in r.steps} for r in readings):
        raise DataError(
            f"{share} have a thought with {_listed(found)} in it, written as a step is",
            "the published metric reads that as a step of an unknown tool, so that the label "
            "cannot be scored",
            "write these thoughts without a number, a full stop and a call in a row",
        )
    whose = "TinyAgent's own tools do" if tools is None else "the catalogue that is named does"
    raise DataError(
        f"{share} call {_listed(found)}",
        f"{whose} not include {'it' if len(found) == 1 else 'them'}, and a label that calls an "
        "unknown tool cannot be scored",
        fix,
    )


def _listed(tools: Mapping[str, int]) -> str:
    names = sorted(tools, key=lambda name: (-tools[name], name))
    more = f" and {len(names) - _LISTED_TOOLS} more" if len(names) > _LISTED_TOOLS else ""
    return ", ".join(names[:_LISTED_TOOLS]) + more


@dataclass(frozen=True)
class _PlanFacts:
    """One of the two texts of a pair, read by the strict grammar."""

    reading: PlanReading
    dag: Dag | None
    problems: tuple[str, ...]

    @classmethod
    def of(cls, text: str, tools: Mapping[str, Tool]) -> _PlanFacts:
        """Read a plan."""
        reading = read_plan(text)
        codes = {problem.code for problem in reading.problems}
        problems = codes & {"bad_arguments", "no_join"}
        if codes - {"no_join"}:
            problems.add("unparsable")
        if "empty" in codes:
            problems.add("no_join")
        for step in reading.steps:
            if step.tool != JOIN:
                found = call_problems(step.tool, step.arguments, tools)
                problems.update(kind for kind, _ in found)
        dag = None
        try:
            # A graph of the readable steps tells bad references even where a line is unreadable.
            dag = plan_dag(Plan(reading.steps))
        except DagError as error:
            # Where lines could not be read, a step that seems to be missing may be one of them.
            if not codes - {"no_join"} or error.code in ("self_reference", "zero_reference"):
                problems.add("bad_reference")
        known = tuple(kind for kind in PROBLEMS if kind in problems)
        return cls(reading, None if codes else dag, known)


def _failure(wanted: _PlanFacts, found: _PlanFacts, success_dag: bool, truncated: bool) -> str:
    """Choose the most telling reason for a failure, in the order of `FAILURE_CODES`."""
    codes = {problem.code for problem in found.reading.problems}
    calls, label_calls = (
        Counter(step.tool for step in plan.reading.steps) for plan in (found, wanted)
    )
    reasons = {
        "empty": "empty" in codes,
        "truncated": truncated and "no_join" in codes,
        "no_join": "no_join" in codes,
        "unparsable": bool(codes - {"bad_arguments"}),
        "bad_arguments": bool(codes),
        "unknown_tool": "unknown_tool" in found.problems,
        "bad_reference": found.dag is None,
        "missing_tool": bool(label_calls - calls),
        "extra_tool": bool(calls - label_calls),
        "wrong_edges": not success_dag,
        "reference_quirk": True,
    }
    return next(code for code, applies in reasons.items() if applies)


def score_all(
    rows: Iterable[Prediction], tools: Mapping[str, Tool] | None = TINYAGENT
) -> tuple[ScoredPlan, ...]:
    """Score predictions and keep each score with its prediction; `tools` as for `score_pair`."""
    return tuple(
        ScoredPlan(
            row,
            score_pair(row.label, row.prediction, tools, truncated=row.stop_reason == "length"),
        )
        for row in rows
    )


def summarise(scores: Sequence[PairScore]) -> Metrics:
    """Sum up the scores of single predictions, one per prediction."""
    n = len(scores)
    by_steps: defaultdict[int, list[bool]] = defaultdict(list)
    for score in scores:
        by_steps[score.label_steps].append(score.success)
    found = Counter(kind for score in scores for kind in score.problems)
    in_labels = Counter(kind for score in scores for kind in score.label_problems)
    failures = Counter(score.failure for score in scores if score.failure is not None)
    totals: dict[str, Any] = {kind: Proportion(found[kind], n) for kind in PROBLEMS}
    totals |= {
        name: metric.total([getattr(score, name) for score in scores])
        for name, metric in METRICS.items()
    }
    return Metrics(
        n=n,
        **totals,
        failures=dict(failures.most_common()),
        success_by_steps={
            steps: Proportion(sum(successes), len(successes))
            for steps, successes in sorted(by_steps.items())
        },
        bad_labels=Proportion(sum(score.bad_label for score in scores), n),
        label_problems=dict(in_labels.most_common()),
    )
