"""The tables of a run's report as facts, which HTML and Markdown both write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.comparison import compare_predictions
from tinyagent_fast.evaluation.report import percent
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.reports.breakdown import by_cause, by_tool
from tinyagent_fast.reports.export_contents import ExportContents
from tinyagent_fast.reports.published import PUBLISHED_RESULTS, comparability
from tinyagent_fast.reports.reading import Evaluation, RunContents, child, number

_TOOL_ROWS = 40


@dataclass(frozen=True)
class Share:
    """A share without a known number of cases, as others publish it."""

    share: float


Cell = str | Proportion | Share
"""Text, or a share that HTML shows as a bar too."""


@dataclass(frozen=True, kw_only=True)
class FactTable:
    """One table; `note` stands before it, and the first `marked` rows are this run's."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    marked: int = 0


def cell_text(cell: Cell) -> str:
    """Write a cell as text.

    Args:
        cell: The cell.

    Returns:
        For a proportion, per cent with the 95 % interval.
    """
    if isinstance(cell, Share):
        return f"{100 * cell.share:.2f} %"
    if isinstance(cell, Proportion):
        return percent(cell) if cell.total else "none"
    return cell


def result_tables(contents: RunContents) -> Iterator[FactTable]:
    """Write what the main evaluation found.

    Args:
        contents: The run.

    Yields:
        Tables; none if there is no evaluation.
    """
    main = contents.main
    if main is None:
        return
    yield _published(contents, main)
    yield FactTable(
        title="Success by number of calls",
        head=("calls in the label", "queries", "success"),
        rows=tuple(
            (str(steps), str(share.total), share)
            for steps, share in sorted(main.metrics.success_by_steps.items())
        ),
    )
    yield _tools(main)
    yield _causes(contents, main)


def _published(contents: RunContents, main: Evaluation) -> FactTable:
    ours = (f"run {contents.name} ({main.name})", main.metrics.success, "this report")
    others = ((r.model, Share(r.success_percent / 100), r.source) for r in PUBLISHED_RESULTS)
    return FactTable(
        title="Beside published results",
        note=comparability(contents, main),
        head=("model", "plan success", "source"),
        rows=(ours, *others),
        marked=1,
    )


def _tools(main: Evaluation) -> FactTable:
    rows = by_tool(main.plans)
    note = "Success is over the queries whose label calls the tool. "
    note += "Lacking and surplus count queries whose plan calls it less or more often than that."
    if len(rows) > _TOOL_ROWS:
        note += f" The first {_TOOL_ROWS} of {len(rows)} tools are listed."
    return FactTable(
        title="Success by tool",
        note=note,
        head=("tool", "queries", "success", "lacking", "surplus"),
        rows=tuple(
            (row.tool, str(row.success.total), row.success, str(row.lacking), str(row.surplus))
            for row in rows[:_TOOL_ROWS]
        ),
    )


def _causes(contents: RunContents, main: Evaluation) -> FactTable:
    before = contents.evaluations.get("test/before")
    rows = by_cause(main.plans, before.plans if before else None)
    failed = sum(row.count for row in rows)
    return FactTable(
        title="Why plans fail",
        note=f"{failed} of {main.metrics.n} plans fail; each is counted under the first cause "
        "that applies.",
        head=("cause", "plans", *(("before training",) if before else ()), "meaning"),
        rows=tuple(
            (row.code, str(row.count), *((str(row.before),) if before else ()), row.meaning)
            for row in rows
        ),
    )


def other_tables(contents: RunContents) -> Iterator[FactTable]:
    """Write what stands after the failing cases: files, evaluations, circumstances.

    Args:
        contents: The run.

    Yields:
        Tables for what is there.
    """
    if contents.export is not None:
        yield _export(contents)
        yield from _gates(contents.export)
    if contents.evaluations:
        yield _evaluations(contents)
    yield FactTable(title="Circumstances", head=("what", "value"), rows=tuple(_facts(contents)))
    if contents.timings_s:
        yield FactTable(
            title="Time",
            head=("work", "time"),
            rows=tuple((name, duration(s)) for name, s in contents.timings_s.items()),
        )


def _gates(export: ExportContents) -> Iterator[FactTable]:
    rows = tuple((g.name, "pass" if g.passed else "FAIL", g.rule) for g in export.gates)
    if rows:
        yield FactTable(title="Gates of the export", head=("gate", "outcome", "rule"), rows=rows)


def _export(contents: RunContents) -> FactTable:
    assert contents.export is not None
    rows = []
    for file in contents.export.files:
        tested = contents.evaluations.get(f"eval-gguf-{file.stem}")
        rows.append(
            (
                file.path,
                file.quant,
                f"{file.size_bytes / 1e6:,.1f}\u00a0MB",
                "" if file.bits_per_weight is None else f"{file.bits_per_weight:.2f}",
                file.success or "not measured",
                tested.metrics.success if tested else "not measured",
                _points(contents, tested),
            )
        )
    return FactTable(
        title="Exported files",
        note=f"{contents.export.verdict()} Success on test queries comes from "
        f"tinyagent-fast eval --run {contents.name} --engine gguf.",
        head=(
            "file",
            "type",
            "size",
            "bits per weight",
            "success, validation prompts",
            "success, test queries",
            "points against the adapter",
        ),
        rows=tuple(rows),
    )


def _points(contents: RunContents, tested: Evaluation | None) -> str:
    """Compare a file with the adapter, which must have planned for the same queries."""
    if tested is None or contents.main is None:
        return ""
    try:
        compared = compare_predictions(
            contents.main.predictions, tested.predictions, contents.tools
        )
    except DataError:
        return f"other queries than {contents.main.name}"
    return compared.points()


def _evaluations(contents: RunContents) -> FactTable:
    return FactTable(
        title="All evaluations in this folder",
        head=("folder", "queries", "success", "success_dag", "unreadable", "unknown tool", "cut"),
        rows=tuple(
            (
                name,
                str(evaluation.metrics.n),
                evaluation.metrics.success,
                percent(evaluation.metrics.success_dag),
                percent(evaluation.metrics.unparsable),
                percent(evaluation.metrics.unknown_tool),
                percent(evaluation.metrics.truncated),
            )
            for name, evaluation in contents.evaluations.items()
        ),
    )


def _facts(contents: RunContents) -> Iterator[tuple[str, str]]:
    config, environment = contents.config, contents.environment
    yield "preset", config.preset
    yield "base model", f"{config.model.base}, {config.model.weights}"
    lora = config.lora
    yield "adapter", f"LoRA r {lora.rank}, alpha {lora.alpha}, {lora.targets}"
    for name in ("train", "test"):
        file = child(contents.data, f"{name}_file")
        own = getattr(config.data, name)
        yield f"{name} file", f"{file.get('path', own)}" + ("" if own else " (generated)")
    rows = child(child(contents.data, "rows"), "train")
    if (count := number(rows, "rows")) is not None:
        tokens, supervised = number(rows, "tokens") or 0, number(rows, "supervised_tokens") or 0
        yield (
            "training rows",
            f"{count:,.0f} with {tokens:,.0f} tokens, {supervised:,.0f} supervised",
        )
    gpu = environment.get("gpu")
    yield "machine", str(gpu.get("name", gpu)) if isinstance(gpu, dict) else _processors(contents)
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


def _processors(contents: RunContents) -> str:
    cpus = number(contents.environment, "cpus")
    return "not recorded" if cpus is None else f"no GPU, {cpus:.0f} CPU cores"


def duration(seconds: float) -> str:
    """Write a time for people.

    Args:
        seconds: How long.

    Returns:
        For example `8.9 s`, `11 min 18 s`, `3 h 02 min`.
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
