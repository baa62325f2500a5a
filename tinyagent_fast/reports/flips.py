"""Two planners on the same queries: which plans flipped, by tool and by number of calls.

The paired figures themselves are `evaluation.comparison`'s; this finds the predictions to compare
in runs and folders, and says where the two disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.evaluation.comparison import PairedComparison, compare_predictions
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.report import percent
from tinyagent_fast.evaluation.scoring import Prediction
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.reports.breakdown import calls
from tinyagent_fast.reports.reading import MAIN_EVALUATIONS, scored, tools_of
from tinyagent_fast.runs import Run

SIGNIFICANT_P = 0.05
"""Two-sided level below which a difference is called one."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """One side of a comparison."""

    name: str
    folder: Path
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A query that one planner gets right and the other wrong; `cause` is why the other fails."""

    key: str
    query: str
    label: str
    winner: str
    wrong: str
    cause: str
    tools: tuple[str, ...]
    calls: int


@dataclass(frozen=True, kw_only=True)
class FlipCount:
    """How often each planner alone is right in a group of queries."""

    group: str
    queries: int
    only_a: int
    only_b: int


@dataclass(frozen=True, kw_only=True)
class FlippedPlans:
    """Two planners compared; `left_out` counts queries that only one of them planned for."""

    a: Planner
    b: Planner
    tools: Mapping[str, Tool] | None
    paired: PairedComparison
    flips: tuple[Flip, ...]
    by_tool: tuple[FlipCount, ...]
    by_calls: tuple[FlipCount, ...]
    left_out: int

    def lines(self) -> list[str]:
        """Say the outcome.

        Returns:
            Lines for a terminal and the head of a page.
        """
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
        ]

    def verdict(self) -> str:
        """Say in words what the test shows.

        Returns:
            One sentence.
        """
        paired = self.paired
        if paired.mcnemar_p >= SIGNIFICANT_P:
            return f"No difference is shown by these {paired.n} queries."
        better, other = ("B", "A") if paired.difference > 0 else ("A", "B")
        return f"{better} is better than {other}; chance alone rarely gives such a difference."

    def to_json(self) -> dict[str, object]:
        """Give all figures as plain values.

        Returns:
            For a file or a script.
        """
        return {
            "a": str(self.a.folder),
            "b": str(self.b.folder),
            **self.paired.to_json(),
            "left_out": self.left_out,
            "flips_by_tool": [dict(vars(count)) for count in self.by_tool],
            "flips_by_calls": [dict(vars(count)) for count in self.by_calls],
            "flips": [{**vars(flip), "tools": list(flip.tools)} for flip in self.flips],
        }


def find_planners(a: str, b: str, runs: Path) -> tuple[Planner, Planner]:
    """Find the predictions of two runs, folders or files.

    A run may hold several evaluations: the first kind that both have is taken.

    Args:
        a: Run by name, folder or predictions file.
        b: The same for the other side.
        runs: Folder of all runs.

    Returns:
        Both, each with the folder that was taken.

    Raises:
        UserError: Nothing is there, or it cannot be read.
    """
    found_a, found_b = _files(a, runs), _files(b, runs)
    kind = next((kind for kind in found_a if kind in found_b), None)
    first_a, first_b = next(iter(found_a)), next(iter(found_b))
    return (
        _planner(a, kind or first_a, found_a),
        _planner(b, kind or first_b, found_b),
    )


def _files(name: str, runs: Path) -> dict[str, PredictionFile]:
    """List predictions by kind: the file itself, or the evaluations of a run."""
    for path in (runs / name, Path(name)):
        if path.is_file():
            return {"": PredictionFile(path.parent, path.name)}
        files = {kind: PredictionFile(path / kind) for kind in ("", *MAIN_EVALUATIONS)}
        there = {kind: file for kind, file in files.items() if file.path.exists()}
        if there:
            return there
    raise ConfigError(
        f"compare {name}",
        f"neither {runs / name} nor {name} holds predictions.jsonl, eval/ or test/after/",
        f"make them with `tinyagent-fast eval --run {name}`, or name a folder that has them",
    )


def _planner(name: str, kind: str, files: Mapping[str, PredictionFile]) -> Planner:
    file = files[kind]
    predictions = tuple(file.read())
    if not predictions:
        raise DataError(f"{file.path}", "it holds no prediction", "let the evaluation finish")
    shown = name.rstrip("/") + (f"/{kind}" if kind else "")
    return Planner(name=shown, folder=file.folder, predictions=predictions)


def tools_of_both(a: Planner, b: Planner, catalogue: Path | None) -> Mapping[str, Tool] | None:
    """Find the tools that both planners' plans may call.

    Args:
        a: One side.
        b: The other side.
        catalogue: YAML catalogue; none takes that of the runs the predictions lie in.

    Returns:
        Tools by name; none stands for TinyAgent's own.

    Raises:
        UserError: The runs have different tools, or a catalogue cannot be read.
    """
    if catalogue is not None:
        return tools_of(catalogue)
    tools_a, tools_b = (_tools_around(planner.folder) for planner in (a, b))
    if tools_a != tools_b:
        raise ConfigError(
            f"compare {a.name} and {b.name}",
            "their runs were made for different tools",
            "name the tools to score both with by --catalogue",
        )
    return tools_a


def _tools_around(folder: Path) -> Mapping[str, Tool] | None:
    inside = folder.resolve()
    runs = [Run(path) for path in (inside, *list(inside.parents)[:3])]
    found = next((run.config().data.catalogue for run in runs if run.config_path.exists()), None)
    return tools_of(found)


def flipped_plans(
    a: Planner, b: Planner, tools: Mapping[str, Tool] | None, *, common: bool = False
) -> FlippedPlans:
    """Compare two planners.

    Args:
        a: One side.
        b: The other side.
        tools: Tools by name; none stands for TinyAgent's own.
        common: Compare on the queries that both planned for, and count the others.

    Returns:
        The comparison.

    Raises:
        DataError: They have different queries and `common` is not set, or no query in common.
    """
    rows_a, rows_b = list(a.predictions), list(b.predictions)
    left_out = 0
    keys = {row.key for row in rows_a} ^ {row.key for row in rows_b}
    if keys and not common:
        raise DataError(
            f"{len(rows_a)} predictions of {a.name} and {len(rows_b)} of {b.name}",
            f"{len(keys)} queries were planned by one alone",
            "evaluate both on the same test file with the same --limit, or compare on the queries "
            "that both have with --common",
        )
    if keys:
        left_out = len(keys)
        rows_a = [row for row in rows_a if row.key not in keys]
        rows_b = [row for row in rows_b if row.key not in keys]
    paired = compare_predictions(rows_a, rows_b, tools)
    flips = tuple(_flips(rows_a, rows_b, tools, paired))
    return FlippedPlans(
        a=a,
        b=b,
        tools=tools,
        paired=paired,
        flips=flips,
        by_tool=tuple(_counts(rows_a, flips, lambda label: calls(label).keys())),
        by_calls=tuple(_counts(rows_a, flips, lambda label: [_calls_text(label)])),
        left_out=left_out,
    )


def _flips(
    rows_a: list[Prediction],
    rows_b: list[Prediction],
    tools: Mapping[str, Tool] | None,
    paired: PairedComparison,
) -> Iterator[Flip]:
    by_key_a, by_key_b = ({row.key: row for row in rows} for rows in (rows_a, rows_b))
    for winner, keys, losers in (("A", paired.only_a, by_key_b), ("B", paired.only_b, by_key_a)):
        for plan in scored([losers[key] for key in keys], tools):
            row = plan.prediction
            wanted = calls(row.label)
            yield Flip(
                key=row.key,
                query=row.query,
                label=row.label,
                winner=winner,
                wrong=row.prediction,
                cause=plan.score.failure or "",
                tools=tuple(wanted),
                calls=sum(wanted.values()),
            )


def _calls_text(label: str) -> str:
    count = sum(calls(label).values())
    return f"{count} call{'' if count == 1 else 's'}"


def _counts(
    rows: Iterable[Prediction], flips: Iterable[Flip], groups: Callable[[str], Iterable[str]]
) -> list[FlipCount]:
    """Count flips in groups of queries, the most flipped group first."""
    queries: Counter[str] = Counter()
    for row in rows:
        queries.update(groups(row.label))
    only: dict[str, Counter[str]] = {"A": Counter(), "B": Counter()}
    for flip in flips:
        only[flip.winner].update(groups(flip.label))
    flipped = only["A"] + only["B"]
    return [
        FlipCount(
            group=group, queries=queries[group], only_a=only["A"][group], only_b=only["B"][group]
        )
        for group in sorted(flipped, key=lambda group: (-flipped[group], group))
    ]
