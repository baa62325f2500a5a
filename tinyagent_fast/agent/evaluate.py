"""Task success: plans are run in a sandbox, and what they led to is compared with the label's.

Every query is answered twice by the whole loop: as it is, and with a fault that another plan can
mend. All agents run side by side, so that the model answers in batches.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.agent.loop import (
    Agent,
    AgentSettings,
    Joiner,
    Outcome,
    Pieces,
    RuleJoiner,
    Writer,
    execute,
    whole_plan,
)
from tinyagent_fast.agent.models import BatchedModel, JoinerText, ModelJoiner
from tinyagent_fast.agent.sandbox import (
    RECOVERABLE,
    Fault,
    State,
    choose_fault,
    malformed,
    sandbox_for,
)
from tinyagent_fast.agent.session import JoinerName, join_points, joiner_of_run
from tinyagent_fast.data.schema import Example
from tinyagent_fast.display import Display
from tinyagent_fast.errors import ConfigError, DataError, count_of
from tinyagent_fast.evaluation.evaluate import (
    EvalChanges,
    EvalOptions,
    EvaluatedRun,
    eval_config,
    test_queries,
)
from tinyagent_fast.evaluation.joins import JoinMetrics, score_joins
from tinyagent_fast.evaluation.report import Cell, FactTable, percent, plain
from tinyagent_fast.evaluation.scoring import score_pair
from tinyagent_fast.evaluation.statistics import Proportion, mcnemar_exact_p
from tinyagent_fast.inference.engine import Completion, Prompt
from tinyagent_fast.inference.planner import Planner
from tinyagent_fast.interrupts import run_async
from tinyagent_fast.plans.grammar import END_OF_RESPONSE, Plan, PlanError, parse_plan, render_plan
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.builder import held_to_tools
from tinyagent_fast.runs import Run, find_run, holding, write_json, write_text

_CALL_TIMEOUT_S = 30.0
_SHORTEST_TIMEOUT_S = 1.0
"""However fast the sandbox plays time, a busy machine needs so long at times."""
_MEANINGS = {
    "plan success": "the published metric; arguments do not count",
    "task success": "everything was done that the label does, arguments and all",
    "task success but wording": "the same, free texts not compared",
}


@dataclass(frozen=True, kw_only=True)
class AgentEvalOptions(EvaluatedRun):
    """What to evaluate and how."""

    model: Path | None = None
    """A .gguf file, a merged folder or an adapter instead of the run's own adapter."""
    joiner: JoinerName = "auto"
    """Who judges the observations: the model, or a rule that finishes when every call is done and
    plans again when an observation says to try again; `auto` is the model where it was trained on
    join points, else the rule."""
    max_replans: int = 2
    """How often another plan is made at most."""
    limit: int | None = None
    """Only the first so many test queries."""
    batch: int = 16
    """Prompts answered together."""
    seed: int = 0
    """Seed of the faults."""
    time_scale: float = 0.1
    """Sandbox calls take this share of the time that such calls take on a desktop."""
    max_new_tokens: int | None = None
    """Tokens after which a plan or an answer is broken off; None takes the run's."""
    out: Path | None = None
    """Folder for metrics, report and traces; by default `agent/` in the run's folder, and
    `agent-grammar/` with `--grammar on`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A query with what a right plan leads to."""

    example: Example
    prompt: Prompt
    """Asks for the first plan."""
    label: Plan
    target: State
    label_runs: bool
    """Whether every call of the label itself is done in the sandbox."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What became of one query in one sandbox."""

    task: Task
    outcome: Outcome
    fault: Fault | None
    reached: tuple[bool, ...]
    """Whether the target was reached, after each plan."""
    reached_but_wording: bool
    """The same at the end, free texts not compared."""
    plan_right: bool
    """Whether the first plan counts by the published metric."""

    @property
    def done(self) -> bool:
        """Whether the task is done at the end."""
        return self.reached[-1]

    def done_within(self, replans: int) -> bool:
        """Whether it is done if no more replans than these are made."""
        return self.reached[min(replans, len(self.reached) - 1)]

    def to_json(self) -> dict[str, Any]:
        """Give plain values for a trace."""
        return {
            "key": self.task.example.key,
            "label": self.task.example.output,
            "fault": asdict(self.fault) if self.fault else None,
            "done": self.done,
            "plan_right": self.plan_right,
            **self.outcome.to_json(),
        }


def agent_figures(
    plain: Sequence[TaskResult],
    faulty: Sequence[TaskResult],
    joiner: Joiner,
    joins: JoinMetrics | None,
    options: AgentEvalOptions,
) -> dict[str, Any]:
    """Count what became of the queries without and with faults, as metrics.json has it.

    `joins` are the model's verdicts on the test file's own join points, where it judges.
    """

    def within(results: Sequence[TaskResult]) -> dict[str, Any]:
        every = range(options.max_replans + 1)
        return {str(k): _share(r.done_within(k) for r in results) for k in every}

    of_kind: defaultdict[str, list[TaskResult]] = defaultdict(list)
    for result in faulty:
        if result.fault is not None:
            of_kind[result.fault.kind].append(result)
    only_with = sum(r.done and not r.reached[0] for r in faulty)
    only_without = sum(r.reached[0] and not r.done for r in faulty)
    return {
        "n": len(plain),
        "joiner": joiner.name,
        "grammar": options.grammar,
        "joins": joins.to_json() if joins else None,
        "plan_success": _share(r.plan_right for r in plain),
        "task_success": _share(r.done for r in plain),
        "task_success_but_wording": _share(r.reached_but_wording for r in plain),
        "task_success_by_replans": within(plain),
        "labels_that_fail_themselves": sum(not r.task.label_runs for r in plain),
        "with_faults": {
            **_without_and_with_replan(faulty),
            "mcnemar_p": mcnemar_exact_p(only_with, only_without),
            "by_replans": within(faulty),
            "by_kind": {k: _without_and_with_replan(of_kind[k]) for k in sorted(of_kind)},
        },
        "cost": _mean_cost(plain, options.time_scale),
        "cost_with_faults": _mean_cost(faulty, options.time_scale),
    }


def _without_and_with_replan(results: Sequence[TaskResult]) -> dict[str, Any]:
    return {
        "without_replan": _share(r.reached[0] for r in results),
        "with_replan": _share(r.done for r in results),
    }


def agent_tables(figures: Mapping[str, Any]) -> Iterator[FactTable]:
    """Lay the figures of a metrics.json out."""
    faults, joins = figures["with_faults"], figures["joins"]
    rows: list[tuple[Cell, ...]] = [
        (f"{name}: {meaning}", _of(figures[name.replace(" ", "_")]))
        for name, meaning in _MEANINGS.items()
    ]
    for k, share in figures["task_success_by_replans"].items():
        rows.append((f"task success with at most {count_of(int(k), 'replan')}", _of(share)))
    rows += [(name, v) for name, v in task_shares(figures).items() if name.startswith("joins")]
    joiner = "the model" if figures["joiner"] == "model" else "a rule, not the model"
    yield FactTable(
        title="Tasks",
        note=f"Observations were judged by {joiner}."
        + " Plans were held to the listed tools." * (figures.get("grammar") == "on"),
        head=("figure", "value"),
        rows=tuple(rows),
    )
    fault_rows = [("all", faults["without_replan"], faults["with_replan"])]
    for kind, both in faults["by_kind"].items():
        fault_rows.append((kind, both["without_replan"], both["with_replan"]))
    yield FactTable(
        title="With one fault a query that another plan can mend",
        note=f"Exact McNemar test of the first row: p = {faults['mcnemar_p']:.3g}.",
        head=("fault", "queries", "without replan", "with replan"),
        rows=tuple((k, a["n"], _of(a), _of(b)) for k, a, b in fault_rows),
    )
    if joins is not None:
        said = sorted({name for row in joins["confusion"].values() for name in row})
        yield FactTable(
            title="Verdicts on the test file's join points",
            head=("label", *(f"model: {name}" for name in said)),
            rows=tuple(
                (label, *(row.get(name, 0) for name in said))
                for label, row in joins["confusion"].items()
            ),
        )
    yield FactTable(
        title="Cost of a query",
        note="Means; seconds of calls are those of a desktop, as the sandbox plays them.",
        head=("what", "without faults", "with faults"),
        rows=tuple(
            (name.replace("_", " "), f"{figures['cost'][name]:.2f}", f"{value:.2f}")
            for name, value in figures["cost_with_faults"].items()
        ),
    )


def task_shares(figures: Mapping[str, Any]) -> dict[str, Proportion]:
    """Take the shares out of a metrics.json by which two runs are held against each other."""
    faults, joins = figures["with_faults"], figures["joins"] or {}
    shares = {
        "task success": _of(figures["task_success"]),
        "with faults, without replan": _of(faults["without_replan"]),
        "with faults, with replan": _of(faults["with_replan"]),
    }
    of_joins = {
        f"joins: {name.replace('_', ' ')}": Proportion(joins[name]["count"], joins[name]["total"])
        for name in ("action_accuracy", "message_match")
        if name in joins
    }
    return shares | of_joins


def _share(values: Any) -> dict[str, Any]:
    found = list(values)
    share = Proportion(sum(found), len(found))
    return {
        "share": share.share if found else None,
        "interval": list(share.interval),
        "n": share.total,
        "count": share.count,
    }


def _of(share: Mapping[str, Any]) -> Proportion:
    return Proportion(share["count"], share["n"])


def _mean_cost(results: Sequence[TaskResult], time_scale: float) -> dict[str, float]:
    costs = [{**r.outcome.cost(), "plans": float(len(r.outcome.rounds))} for r in results]
    if not costs:
        return {}
    means = {name: sum(cost[name] for cost in costs) / len(costs) for name in costs[0]}
    scale = time_scale or 1.0
    timed = ("calls_s", "calls_one_after_another_s")
    return {k: round(v / scale if k in timed else v, 3) for k, v in means.items()}


async def run_tasks(
    tasks: Sequence[Task],
    writer: Writer,
    joiner: Joiner,
    tools: Mapping[str, Tool] | None,
    *,
    max_replans: int = 2,
    time_scale: float = 0.0,
    faults_seed: int | None = None,
) -> list[TaskResult]:
    """Answer all queries side by side, each in a sandbox of its own, and keep their order.

    With a seed each query meets a fault that is drawn with it. Tools are by name; None stands for
    TinyAgent's own.
    """
    limit_s = max(_SHORTEST_TIMEOUT_S, _CALL_TIMEOUT_S * time_scale)
    settings = AgentSettings(max_replans=max_replans, call_timeout_s=limit_s)

    async def one(task: Task) -> TaskResult:
        rng = random.Random(f"{faults_seed}/{task.example.key}")
        fault = None if faults_seed is None else choose_fault(task.label, rng, RECOVERABLE)
        faults = [fault] if fault else []
        sandbox = sandbox_for(task.label, tools, faults=faults, time_scale=time_scale)
        spoilt = writer if fault is None or fault.kind != "malformed" else _Spoilt(writer, rng)
        states: list[State] = []

        def on_event(kind: str, _content: Mapping[str, Any]) -> None:
            if kind == "join":
                states.append(sandbox.state())

        agent = Agent(spoilt, joiner, sandbox.tools, settings, on_event=on_event)
        try:
            outcome = await agent.run(task.example.query, task.prompt)
        finally:
            sandbox.close()
        first = outcome.rounds[0]
        text = first.execution.text if first.plan is None else first.plan.text
        return TaskResult(
            task=task,
            outcome=outcome,
            fault=fault,
            reached=tuple(state.reaches(task.target) for state in states),
            reached_but_wording=states[-1].reaches(task.target, wording=False),
            plan_right=score_pair(task.example.output, text, tools).success,
        )

    return list(await asyncio.gather(*map(one, tasks)))


@dataclass(eq=False)
class _Spoilt:
    """Breaks the first plan that a writer writes."""

    writer: Writer
    rng: random.Random | None

    async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
        """Write the first plan spoilt, and later ones as they are."""
        text = "".join([piece async for piece in self.writer.plan(prompt, done)])
        rng, self.rng = self.rng, None
        yield text if rng is None else malformed(text, rng)


async def tasks_of(
    examples: Sequence[Example],
    tools: Mapping[str, Tool] | None = None,
    *,
    grammar: bool = False,
) -> tuple[list[Task], int]:
    """Run the labels, to know what right plans lead to.

    With `grammar` the plans that will be asked for are held to the tools that their prompts list.

    Returns:
        Tasks, and how many labels are no plan and were left out.
    """
    tasks, left_out = [], 0
    for example in examples:
        try:
            label = parse_plan(example.output)
        except PlanError:
            left_out += 1
            continue
        sandbox = sandbox_for(label, tools)
        execution = await execute(whole_plan(render_plan(label)), sandbox.tools)
        prompt = Prompt(system=example.system, user=example.user)
        tasks.append(
            Task(
                example=example,
                prompt=held_to_tools(prompt, tools) if grammar else prompt,
                label=label,
                target=sandbox.state(),
                label_runs=not execution.failed,
            )
        )
        sandbox.close()
    return tasks, left_out


def evaluate_agent(options: AgentEvalOptions, display: Display) -> dict[str, Any]:
    """Measure task success of a run, with and without faults, and write figures and traces.

    Returns:
        The figures, as metrics.json has them.

    Raises:
        ConfigError: There is no such run or model, or an option is out of range.
        DataError: The test file is faulty, or none of its labels is a plan.
    """
    _check(options)
    run = find_run(options.run, options.runs)
    folder = options.out or run.path / ("agent" if options.grammar == "off" else "agent-grammar")
    fix = "name another folder with --out"
    with holding(folder, "agent-eval", fix), display.working("agent-eval"):
        results, figures = _evaluate(run, options, display)
        _write(results, figures, folder, run, display)
    return figures


def _evaluate(
    run: Run, options: AgentEvalOptions, display: Display
) -> tuple[list[TaskResult], dict[str, Any]]:
    """Carry out the plans of a run's test queries."""
    from tinyagent_fast.data.generation.catalogue import plan_tools
    from tinyagent_fast.inference.planner import load

    asked = EvalOptions(
        run=str(run.path),
        test=options.test,
        prompts=options.prompts,
        eval=EvalChanges(limit=options.limit),
    )
    config = eval_config(run, asked)
    examples, _ = test_queries(run, config, display)
    text = joiner_of_run(run, options.joiner, config.data.test)
    # A catalogue's tools say what they return, which the recorder uses.
    tools = plan_tools(config.data.catalogue)
    tasks = _find_tasks(examples, tools, options.grammar == "on", display)
    display.say(f"run {run.path.name}: {len(tasks)} tasks")
    untaught = ", as the run was not trained on join points" * (options.joiner == "auto")
    judging = f"a rule{untaught}" if text is None else "the model"
    display.say(f"observations are judged by {judging}")
    joins: Sequence[Example] = ()
    if text is not None:
        of_tasks = {task.example.entry_key for task in tasks}
        joins = [j for j in join_points(run, config.data.test) if j.entry_key in of_tasks]
    with load(
        options.model,
        run=str(run.path),
        max_new_tokens=options.max_new_tokens,
        threads=options.threads,
        batch=options.batch,
    ) as planner:
        return run_async(_measure(planner, tasks, joins, text, tools, options, display))


def _check(options: AgentEvalOptions) -> None:
    for name, value in (("limit", options.limit), ("batch", options.batch)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}", "it must be at least 1", "give another number")
    if options.max_replans < 0 or options.time_scale < 0:
        raise ConfigError(
            f"--max-replans {options.max_replans} --time-scale {options.time_scale}",
            "neither can be negative",
            "give 0 or more",
        )


def _find_tasks(
    examples: Sequence[Example], tools: Mapping[str, Tool] | None, grammar: bool, display: Display
) -> list[Task]:
    tasks, left_out = run_async(tasks_of(examples, tools, grammar=grammar))
    if left_out:
        display.say(f"{left_out} labels are no plans, and are left out")
    if not tasks:
        raise DataError("the test file", "none of its labels is a plan", "name another --test FILE")
    failing = sum(not task.label_runs for task in tasks)
    if failing:
        display.say(f"{failing} of {len(tasks)} labels have calls that fail in the sandbox")
    return tasks


async def _measure(
    planner: Planner,
    tasks: Sequence[Task],
    joins: Sequence[Example],
    text: JoinerText | None,
    tools: Mapping[str, Tool] | None,
    options: AgentEvalOptions,
    display: Display,
) -> tuple[list[TaskResult], dict[str, Any]]:
    """Answer all queries without and with faults; without a joiner's text the rule judges."""
    with display.bar("tasks", "prompts") as update:
        model = BatchedModel(planner, update)
        joiner = RuleJoiner() if text is None else ModelJoiner(model.complete, text)
        plain, faulty = [
            await run_tasks(
                tasks,
                model,
                joiner,
                tools,
                max_replans=options.max_replans,
                time_scale=options.time_scale,
                faults_seed=seed,
            )
            for seed in (None, options.seed)
        ]

        async def judged(join: Example) -> tuple[str, str]:
            prompt = Prompt(system=join.system, user=join.user)
            return join.output, (await model.complete(prompt, END_OF_RESPONSE)).text

        said = await asyncio.gather(*map(judged, joins))
    joins_scored = score_joins(said) if said else None
    return [*plain, *faulty], agent_figures(plain, faulty, joiner, joins_scored, options)


def _write(
    results: Sequence[TaskResult],
    figures: Mapping[str, Any],
    folder: Path,
    run: Run,
    display: Display,
) -> None:
    lines = [json.dumps(result.to_json(), ensure_ascii=False) for result in results]
    write_text(folder / "outcomes.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "metrics.json", figures)
    tables = [table.to_markdown() for table in agent_tables(figures)]
    report = "\n".join([f"# Tasks of {plain(run.path.name)}\n", *tables])
    write_text(folder / "report.md", report)
    display.say(report)
    task = _of(figures["task_success"])
    display.say(f"task success {percent(task)}, n = {task.total}")
    display.say(f"written: {folder}/metrics.json, report.md, outcomes.jsonl")
