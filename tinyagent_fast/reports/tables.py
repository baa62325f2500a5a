"""The tables of a run's report as facts, which HTML and Markdown both write."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from tinyagent_fast.agent.evaluate import agent_tables
from tinyagent_fast.display import size_text
from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.comparison import compare_plans
from tinyagent_fast.evaluation.report import Cell, FactTable, percent, success_by_calls
from tinyagent_fast.evaluation.scoring import FAILURE_CODES, METRICS, ScoredPlan
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.plans.grammar import read_plan
from tinyagent_fast.plans.tools import JOIN, TINYAGENT
from tinyagent_fast.reports.reading import Evaluation, Export, RunContents, child, number

GALLERY_CASES = 24
"""Most failing cases that a page shows."""
PUBLISHED_TEST_QUERIES = 1022
"""Entries of the published testing_data.json.

Source: squeeze-ai-lab/TinyAgent-dataset on the Hugging Face hub.
"""
_BLOG = "BAIR blog, TinyAgent: Function Calling at the Edge (2024)"
_RETRAINING = "github.com/SamvelMinasyan/TinyAgent"
PUBLISHED_RESULTS = (
    ("TinyLlama-1.1B-32K, zero-shot", 0.1271, _BLOG),
    ("public re-training, capped", 0.784, f"{_RETRAINING}, output capped near the label's length"),
    ("TinyAgent-1.1B", 0.7889, _BLOG),
    ("GPT-4-Turbo", 0.7908, _BLOG),
    ("public re-training", 0.821, f"{_RETRAINING}, at most 264 new tokens"),
    ("TinyAgent-7B", 0.8309, _BLOG),
    ("TinyAgent-7B with ToolRAG", 0.8495, _BLOG),
)
"""Model, plan success on the published test file, and who published it; lowest first."""
_TOOL_ROWS = 40
_TRACES = 20
"""Requests carried out that a report shows, the latest ones."""


def result_tables(contents: RunContents) -> Iterator[FactTable]:
    """Write what the main evaluation found; nothing if there is none."""
    main = contents.main
    if main is None:
        return
    yield FactTable(
        title="Beside published results",
        note=comparability(contents, main),
        head=("model", "plan success", "source"),
        rows=(
            (f"run {contents.name} ({main.name})", main.metrics.success, "this report"),
            *PUBLISHED_RESULTS,
        ),
        marked=1,
    )
    yield success_by_calls(main.metrics)
    tools = tool_rows(main.plans)
    known = TINYAGENT if contents.tools is None else contents.tools
    note = "Success is over the queries whose label calls the tool. "
    note += "Lacking and surplus count queries whose plan calls it less or more often than that."
    if len(tools) > _TOOL_ROWS:
        note += f" The first {_TOOL_ROWS} of {len(tools)} tools are listed."
    yield FactTable(
        title="Success by tool",
        note=note,
        head=("tool", "queries", "success", "lacking", "surplus"),
        rows=tuple(
            (row[0] if row[0] in known else f"{row[0]} (unknown tool)", *row[1:])
            for row in tools[:_TOOL_ROWS]
        ),
    )
    before = contents.evaluations.get("test/before")
    yield FactTable(
        title="Why plans fail",
        note=f"{main.metrics.n - main.metrics.success.count} of {main.metrics.n} plans fail; each "
        "is counted under the first cause that applies.",
        head=("cause", "plans", *(("before training",) if before else ()), "meaning"),
        rows=tuple(cause_rows(main.plans, before.plans if before else None)),
    )


def comparability(contents: RunContents, evaluation: Evaluation) -> str:
    """Say whether an evaluation may be held against the published results, the verdict first."""
    own = child(contents.data, "test_file")
    tested = evaluation.made_with.get("test_sha256")
    generated = contents.config.data.test is None
    where = f"the test file {own.get('path', contents.config.data.test or 'of this run')}"
    if tested is not None and tested != own.get("sha256"):
        where, generated = "a test file that is not the run's own", False
    n, published = evaluation.metrics.n, PUBLISHED_TEST_QUERIES
    if generated:
        why = "this run was tested on generated data, and no figure on it says how the planner "
        why += "does on the published test file."
    elif contents.tools is not None:
        why = "this run plans with a catalogue of tools of its own."
    elif n != published:
        why = f"{n:,} queries of {where}, not the {published:,} of the published one."
    else:
        return (
            f"Comparable with the published results only if {where} is the published "
            f"testing_data.json; its {n:,} queries agree, its content is not known to this program."
        )
    return f"Not comparable with the published results: {why}"


def count_calls(plan: str) -> Counter[str]:
    """Count the calls of a plan by tool, join and what cannot be read left out."""
    return Counter(step.tool for step in read_plan(plan).steps if step.tool != JOIN)


def tool_rows(plans: Iterable[ScoredPlan]) -> list[tuple[str, int, Proportion, int, int]]:
    """Sum up plans by the tools that they should call, or do.

    Returns:
        For each tool: the queries whose label calls it, their success, and the queries (of all)
        whose plan calls it less and more often than the label. The most frequent tools come
        first, tools that only predictions call last.
    """
    queries, successes, lacking, surplus = (Counter[str]() for _ in range(4))
    for plan in plans:
        wanted, found = map(count_calls, (plan.prediction.label, plan.prediction.prediction))
        queries.update(wanted.keys())
        if plan.score.success:
            successes.update(wanted.keys())
        lacking.update((wanted - found).keys())
        surplus.update((found - wanted).keys())
    tools = sorted(queries | surplus, key=lambda tool: (-queries[tool], -surplus[tool], tool))
    return [
        (t, queries[t], Proportion(successes[t], queries[t]), lacking[t], surplus[t]) for t in tools
    ]


def cause_rows(
    plans: Sequence[ScoredPlan], before: Sequence[ScoredPlan] | None
) -> list[tuple[str | int, ...]]:
    """Count failures by cause, beside those of the same queries before training if there are any.

    Returns:
        Code, count, count before (if measured) and meaning; the most frequent cause first.
    """
    now = Counter(plan.score.failure for plan in plans)
    then = Counter(plan.score.failure for plan in before or ())
    codes = [code for code in FAILURE_CODES if now[code] or then[code]]
    return [
        (code, now[code], *(() if before is None else (then[code],)), FAILURE_CODES[code])
        for code in sorted(codes, key=lambda code: (-now[code], -then[code]))
    ]


def gallery(plans: Iterable[ScoredPlan], most: int = GALLERY_CASES) -> list[ScoredPlan]:
    """Choose failing cases in turn from every cause, so that rare causes are seen too.

    Returns:
        At most so many, grouped by cause, the most frequent first; within a cause as in the file.
    """
    causes: defaultdict[str, list[ScoredPlan]] = defaultdict(list)
    for plan in plans:
        if plan.score.failure is not None:
            causes[plan.score.failure].append(plan)
    in_turn = (plan for turn in zip_longest(*causes.values()) for plan in turn if plan is not None)
    chosen = islice(in_turn, most)
    return sorted(chosen, key=lambda plan: (-len(causes[code := plan.score.failure or ""]), code))


def training_gain(contents: RunContents) -> str:
    """Say what training changed, where the same queries were planned before it."""
    main, before = contents.main, contents.evaluations.get("test/before")
    if main is None or before is None:
        return ""
    told = f"before training {percent(before.metrics.success)}"
    try:
        compared = compare_plans(before.plans, main.plans)
    except DataError:
        return f"{told}, on other queries"
    return f"{told}; change {compared.points()} points, McNemar p = {compared.mcnemar_p:.2g}"


def other_tables(contents: RunContents) -> Iterator[FactTable]:
    """Write what stands after the failing cases: tasks, files, evaluations, circumstances."""
    if contents.agent:
        yield from agent_tables(contents.agent)
    if contents.traces:
        yield FactTable(
            title="Requests carried out",
            head=("request", "calls and observations", "answer"),
            rows=tuple((t.request, t.calls, t.answer) for t in contents.traces[-_TRACES:]),
        )
    if contents.export is not None:
        yield _export_table(contents, contents.export)
        if contents.export.gates:
            yield FactTable(
                title="Gates of the export",
                head=("gate", "outcome", "rule"),
                rows=tuple(
                    (name, "pass" if passed else "FAIL", rule)
                    for name, passed, rule in contents.export.gates
                ),
            )
    if contents.evaluations:
        names = [*METRICS.keys(), "unparsable", "unknown_tool", "truncated"]
        titles = (metric.title for metric in METRICS.values())
        yield FactTable(
            title="All evaluations in this folder",
            head=("folder", "queries", *titles, "unreadable", "unknown tool", "cut"),
            rows=tuple(
                (
                    name,
                    evaluation.metrics.n,
                    getattr(evaluation.metrics, names[0]),
                    *(percent(getattr(evaluation.metrics, figure)) for figure in names[1:]),
                )
                for name, evaluation in contents.evaluations.items()
            ),
        )
    yield FactTable(title="Circumstances", head=("what", "value"), rows=tuple(_facts(contents)))
    if contents.timings_s:
        yield FactTable(
            title="Time",
            head=("work", "time"),
            rows=tuple((name, duration(s)) for name, s in contents.timings_s.items()),
        )


def _export_table(contents: RunContents, export: Export) -> FactTable:
    rows: list[tuple[Cell, ...]] = []
    for file in export.artefacts:
        tested, points = contents.evaluations.get(f"eval-gguf-{Path(file.path).stem}"), ""
        if tested is not None and contents.main is not None:
            try:
                points = compare_plans(contents.main.plans, tested.plans).points()
            except DataError:
                points = f"other queries than {contents.main.name}"
        bits = number(file.details, "bits_per_weight")
        validated = export.success.get(file.quant) if file.kind == "gguf" else None
        rows.append(
            (
                file.path,
                file.quant,
                size_text(file.size_bytes).replace(" ", "\u00a0"),
                "" if bits is None else f"{bits:.2f}",
                validated or "not measured",
                tested.metrics.success if tested else "not measured",
                points,
            )
        )
    return FactTable(
        title="Exported files",
        note=f"{export.verdict()} Success on test queries comes from "
        f"tinyagent-fast eval --run {shlex.quote(contents.name)} --engine gguf.",
        head=(
            *("file", "type", "size", "bits per weight"),
            *("success, validation prompts", "success, test queries", "points against the adapter"),
        ),
        rows=tuple(rows),
    )


def _facts(contents: RunContents) -> Iterator[tuple[str, str]]:
    config, environment = contents.config, contents.environment
    yield "preset", config.preset
    yield "base model", f"{config.model.base}, {config.model.weights}"
    yield "adapter", f"LoRA r {config.lora.rank}, alpha {config.lora.alpha}, {config.lora.targets}"
    for name, own in (("train", config.data.train), ("test", config.data.test)):
        path = child(contents.data, f"{name}_file").get("path", own)
        generated = " (generated)" * (config.data.train is None and own is None)
        yield f"{name} file", "none" if path is None else f"{path}{generated}"
    if contents.mixture:
        yield "rows of the train file", contents.mixture
    rows = child(child(contents.data, "rows"), "train")
    if (count := number(rows, "rows")) is not None:
        tokens, supervised = number(rows, "tokens") or 0, number(rows, "supervised_tokens") or 0
        told = f"{count:,.0f} with {tokens:,.0f} tokens, {supervised:,.0f} supervised"
        yield "training rows", told
    gpu, cpus = environment.get("gpu"), number(environment, "cpus")
    machine = "not recorded" if cpus is None else f"no GPU, {cpus:.0f} CPU cores"
    yield "machine", str(gpu.get("name", gpu)) if isinstance(gpu, dict) else machine
    if environment.get("started"):
        yield "started", str(environment["started"])
    versions = child(environment, "versions")
    wanted = ("tinyagent-fast", "torch", "transformers", "trl", "peft", "unsloth")
    found = [f"{name} {versions[name]}" for name in wanted if versions.get(name)]
    if found:
        yield "versions", f"Python {environment.get('python', '?')}, {', '.join(found)}"
    git = child(environment, "git")
    if git.get("commit"):
        yield "commit", f"{git['commit']}{'' if git.get('clean') else ', with local changes'}"


def duration(seconds: float) -> str:
    """Write a time for people, for example `8.9 s`, `11 min 18 s` or `3 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
