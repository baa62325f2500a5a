"""What a run's folder holds, read once into typed values.

Stands between the files that training, evaluation and export write and the pages made of them.
What is missing or cannot be read is noted and no more.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.agent.evaluate import agent_tables, task_shares
from tinyagent_fast.config import Config
from tinyagent_fast.data.generation.catalogue import plan_tools
from tinyagent_fast.data.splits import mixture_text
from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.evaluation.predictions import MAIN_EVALUATIONS, PredictionFile
from tinyagent_fast.evaluation.scoring import Metrics, ScoredPlan, score_all, summarise
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.export.record import Artefact, ExportRecord
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.runs import ADAPTER_WEIGHTS, Run, read_json, sha256_of


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """Plan success on the validation sample at one step."""

    step: int
    loss: float | None
    success: Proportion
    success_dag: float | None
    best: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One folder of predictions, scored."""

    name: str
    plans: tuple[ScoredPlan, ...]
    metrics: Metrics
    made_with: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an export made; `passed` is None where the gates were switched off.

    `success` is that on validation prompts by quant, where a gate measured it.
    """

    artefacts: tuple[Artefact, ...]
    success: Mapping[str, Proportion]
    gates: tuple[tuple[str, bool, str], ...]
    """Name, whether it passed, and its rule."""
    passed: bool | None

    def verdict(self) -> str:
        """Say in one sentence how the gates came out."""
        failed = [name for name, passed, _ in self.gates if not passed]
        if failed:
            return f"{len(failed)} of {len(self.gates)} gates failed: {', '.join(failed)}."
        if self.passed is None or not self.gates:
            return "Nothing was proved: no gate was run to its end."
        return f"All {len(self.gates)} gates passed."


@dataclass(frozen=True)
class Trace:
    """A request that the command `agent` has carried out."""

    request: str
    calls: str
    """The calls of all its plans with what they gave."""
    answer: str


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """All that is known of a run; `notes` says what is not there or not as it should be."""

    name: str
    config: Config
    tools: Mapping[str, Tool] | None
    steps: Mapping[int, Mapping[str, Any]]
    """Records of logged steps."""
    validations: tuple[ValidationRecord, ...]
    evaluations: Mapping[str, Evaluation]
    export: Export | None
    agent: Mapping[str, object]
    """Figures of agent-eval; empty where it was not run."""
    traces: tuple[Trace, ...]
    """The latest last."""
    environment: Mapping[str, object]
    data: Mapping[str, object]
    mixture: str
    """How rows of a file and generated ones were mixed; empty where they were not."""
    timings_s: Mapping[str, float]
    notes: tuple[str, ...]

    @property
    def main(self) -> Evaluation | None:
        """The evaluation that the headline is taken from, if there is one."""
        return next((self.evaluations[n] for n in MAIN_EVALUATIONS if n in self.evaluations), None)


def read_run(run: Run, catalogue: Path | None = None) -> RunContents:
    """Read a run's folder, of which only config.yaml must be there.

    `catalogue` is a YAML file of the tools that plans may call, instead of the run's.

    Raises:
        UserError: The config cannot be read, or the catalogue that its plans are scored with.
    """
    notes: list[str] = []
    config = run.config()
    if (unfinished := run.unfinished()) is not None:
        notes.append(f"the training is {unfinished}")
    steps, validations = read_history(run, notes)
    folders = list(_evaluation_folders(run.path))
    tools = plan_tools(catalogue or run.catalogue()) if folders else None
    if folders and catalogue is None:
        with suppress(ConfigError):  # a damaged data.json, which is noted below
            notes += filter(None, [run.changed_catalogue()])
    data = _read_object(run.path / "data.json", notes)
    found = (_read_evaluation(name, folder, tools, notes) for name, folder in folders)
    evaluations = {evaluation.name: evaluation for evaluation in found if evaluation is not None}
    if not any(name in evaluations for name in MAIN_EVALUATIONS):
        notes.append(
            "no plans for test queries (eval/, test/after/): "
            f"`tinyagent-fast eval --run {run.named}` makes them"
        )
    notes += _doubts(run, data, evaluations)
    timings = _read_object(run.path / "timings.json", notes)
    return RunContents(
        name=run.path.name,
        config=config,
        tools=tools,
        steps=steps,
        validations=validations,
        evaluations=evaluations,
        export=_read_export(run.path, notes),
        agent=_read_tasks(run.path, lambda figures: list(agent_tables(figures)), notes),
        traces=_read_traces(run.path / "agent" / "traces.jsonl", notes),
        environment=_read_object(run.path / "environment.json", notes),
        data=data,
        mixture=_mixture(data.get("generated"), notes),
        timings_s={k: v for k in timings if (v := number(timings, k)) is not None},
        notes=tuple(notes),
    )


def catalogue_of_run(folder: Path) -> Path | None:
    """Find the catalogue that the plans in a run, or in a folder within it, were made for."""
    run = _run_around(folder)
    return None if run is None else run.catalogue()


def tasks_of_run(folder: Path) -> Mapping[str, object]:
    """Find the figures of agent-eval in a run, or in the run that a folder lies in, if any."""
    run = _run_around(folder)
    return {} if run is None else _read_tasks(run.path, task_shares, [])


def _run_around(folder: Path) -> Run | None:
    inside = folder.resolve()
    runs = [Run(path) for path in (inside, *list(inside.parents)[:3])]
    return next((run for run in runs if run.config_path.exists()), None)


def number(record: Mapping[str, object], key: str) -> float | None:
    """Take a finite number out of a JSON object; None if there is none."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # A whole number may be too large for any float.
    return float(value) if abs(value) <= sys.float_info.max else None


def child(record: Mapping[str, object], key: str) -> Mapping[str, object]:
    """Take an object out of a JSON object; an empty one if there is none."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _read_object(path: Path, notes: list[str]) -> Mapping[str, object]:
    if not path.exists():
        notes.append(f"{path.name} is missing")
        return {}
    try:
        return read_json(path)
    except ConfigError as error:
        notes.append(f"{path.name} is left out: {error.why}")
        return {}


def _read_tasks(
    run: Path, show: Callable[[Mapping[str, Any]], object], notes: list[str]
) -> Mapping[str, object]:
    """Read the figures of agent-eval; none where those that `show` needs are not all there."""
    path = run / "agent" / "metrics.json"
    figures = _read_object(path, notes) if path.exists() else {}
    try:
        _ = show(figures) if figures else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        notes.append(f"agent/metrics.json cannot be read and is left out: {error!r}")
        return {}
    return figures


def _mixture(generated: Any, notes: list[str]) -> str:
    try:
        return "" if generated is None else mixture_text(generated)
    except DataError as error:
        notes.append(f"data.json: {error.why}")
        return ""


def _read_traces(path: Path, notes: list[str]) -> tuple[Trace, ...]:
    found = [_trace(line) for line in _json_lines(path)] if path.exists() else []
    if unread := found.count(None):
        notes.append(f"agent/traces.jsonl: {unread} lines cannot be read and are left out")
    return tuple(trace for trace in found if trace is not None)


def _trace(record: Mapping[str, Any]) -> Trace | None:
    try:
        plans = [
            "; ".join(
                f"{call['tool']}({', '.join(map(repr, call['arguments']))}): {call['observation']}"
                for call in plan["calls"]
            )
            for plan in record["rounds"]
        ]
        outcome = "not done" if record["failed"] else "done"
        answer = f"{outcome}: {record['message']}"
        return Trace(str(record["request"]), " Planned again: ".join(plans), answer)
    except (KeyError, TypeError):
        return None


def read_history(
    run: Run, notes: list[str]
) -> tuple[Mapping[int, Mapping[str, Any]], tuple[ValidationRecord, ...]]:
    """Read history.jsonl; where a resumed run measured a step again, the later record counts.

    Returns:
        The records of logged steps by number, and the validations, both in the order of steps;
        `notes` gets what is missing or cannot be read.
    """
    if not run.history_path.exists():
        notes.append("history.jsonl is missing: there are no curves")
        return {}, ()
    steps: dict[int, Mapping[str, Any]] = {}
    validations: dict[int, ValidationRecord] = {}
    unread = again = 0
    for record in _json_lines(run.history_path):
        at, event = number(record, "step"), record.get("event")
        validation = None if at is None else _validation(int(at), record)
        if event == "step" and at is not None:
            again += int(at) in steps
            steps[int(at)] = record
        elif event == "evaluation" and validation is not None:
            again += validation.step in validations
            validations[validation.step] = validation
        else:
            unread += event in (None, "step", "evaluation")
    if unread:
        notes.append(f"history.jsonl: {unread} lines cannot be read and are left out")
    if again:
        notes.append(f"history.jsonl: {again} records of repeated steps replace earlier ones")
    if not validations:
        notes.append("history.jsonl has no evaluation on validation queries")
    return dict(sorted(steps.items())), tuple(validations[step] for step in sorted(validations))


def _json_lines(path: Path) -> Iterator[Mapping[str, object]]:
    """Give the object of each line; an empty one for a line that is none."""
    # Not splitlines: a request may hold a separator that JSON leaves as it is, such as U+2028.
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else {}


def _validation(step: int, record: Mapping[str, object]) -> ValidationRecord | None:
    samples, success = number(record, "samples"), number(record, "success")
    if samples is None or samples < 1 or samples % 1 or success is None or not 0 <= success <= 1:
        return None
    return ValidationRecord(
        step=step,
        loss=number(record, "loss"),
        success=Proportion(round(success * samples), int(samples)),
        success_dag=number(record, "success_dag"),
        best=record.get("best") is True,
    )


def _evaluation_folders(run: Path) -> Iterator[tuple[str, Path]]:
    names = ["eval", "eval-grammar", "eval-base", "eval-vllm", "test/before", "test/after"]
    names += [path.name for path in sorted(run.glob("eval-gguf-*"))]
    for name in names:
        if (run / name / "predictions.jsonl").exists():
            yield name, run / name


def _read_evaluation(
    name: str, folder: Path, tools: Mapping[str, Tool] | None, notes: list[str]
) -> Evaluation | None:
    file = PredictionFile(folder)
    try:
        plans = score_all(file.read(), tools)
    except DataError as error:
        notes.append(f"{name} is left out: {error.what}: {error.why}")
        return None
    if not plans:
        notes.append(f"{name} is left out: it holds no prediction yet")
        return None
    return Evaluation(
        name=name,
        plans=plans,
        metrics=summarise([plan.score for plan in plans]),
        made_with=_read_object(file.made_with_path, notes) if file.made_with_path.exists() else {},
    )


def _doubts(
    run: Run, data: Mapping[str, object], evaluations: Mapping[str, Evaluation]
) -> Iterator[str]:
    """Say where predictions are not those of the run's adapter for all of its test queries."""
    weights = run.adapter / ADAPTER_WEIGHTS
    test_sha256 = child(data, "test_file").get("sha256")
    queries = number(child(data, "examples"), "test")
    for name, evaluation in evaluations.items():
        made_with = evaluation.made_with
        if test_sha256 and made_with.get("test_sha256") not in (None, test_sha256):
            yield f"{name} was made with another test file than the run's own"
        elif queries and evaluation.metrics.n != queries:
            yield f"{name} holds {evaluation.metrics.n} of the run's {queries:.0f} test queries"
        if (
            name == "eval"
            and made_with.get("adapter_sha256")
            and weights.exists()
            and made_with["adapter_sha256"] != sha256_of(weights)
        ):
            yield f"{name} was made with another adapter than the run's own"


def _read_export(run: Path, notes: list[str]) -> Export | None:
    if not (run / "export" / "export.json").exists():
        notes.append(
            f"nothing was exported; `tinyagent-fast export --run {shlex.quote(run.name)}` does it"
        )
        return None
    try:
        record = ExportRecord(run / "export")
        measured, gates = record.content["success_on_validation"], record.content["gates"]
        return Export(
            artefacts=tuple(a for a in record.artefacts if a.kind != "importance"),
            success={q: Proportion(s["count"], s["total"]) for q, s in measured.items()},
            gates=tuple((gate["name"], gate["passed"] is True, gate["rule"]) for gate in gates),
            passed=record.content["passed"],
        )
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.why if isinstance(error, ConfigError) else repr(error)
        notes.append(f"export/export.json cannot be read and is left out: {why}")
        return None
