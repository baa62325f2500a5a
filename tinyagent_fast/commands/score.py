"""`score`: score predictions or pairs again, on a machine without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.runs import read_list

if TYPE_CHECKING:
    from tinyagent_fast.evaluation.predictions import PredictionFile

_CATALOGUE = "name the catalogue of these tools with --catalogue FILE"


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Flags of `score`."""

    predictions: Annotated[Path | None, tyro.conf.Positional] = None
    """A predictions.jsonl, or the run, by name or folder, or evaluation that holds one; default:
    the latest run."""
    pairs: Path | None = None
    """A JSON list of objects with the texts `label` and `prediction`, instead; or an object a line,
    such as `chat --requests FILE --json` prints for requests with labels."""
    catalogue: Path | None = None
    """YAML catalogue with the tools that plans may call; by default the run's, else TinyAgent's."""
    json: bool = False
    """Print JSON: one object a line for --pairs, all figures for predictions."""
    summary: bool = False
    """Give only the figures of all plans together, as one object with --json, for --pairs too."""


def run(arguments: Sequence[str]) -> int:
    """Score; gives 0 whatever the plans are worth."""
    flags = tyro.cli(ScoreFlags, args=list(arguments), prog="tinyagent-fast score")
    from tinyagent_fast.data.generation.catalogue import plan_tools
    from tinyagent_fast.evaluation.predictions import find_predictions
    from tinyagent_fast.reports.reading import catalogue_of_run

    if flags.pairs is None:
        file = next(iter(find_predictions(flags.predictions or "latest").values()))
        tools = plan_tools(flags.catalogue or catalogue_of_run(file.folder))
        _score_predictions(file, tools, as_json=flags.json, summary=flags.summary)
    elif flags.predictions is None:
        tools = plan_tools(flags.catalogue)
        _score_pairs(flags.pairs, tools, as_json=flags.json, summary=flags.summary)
    else:
        raise ConfigError(
            f"score {flags.predictions} --pairs {flags.pairs}",
            "one call scores one file",
            "leave one of them out",
        )
    return 0


def _score_pairs(
    path: Path, tools: Mapping[str, Tool] | None, *, as_json: bool, summary: bool
) -> None:
    from tinyagent_fast.evaluation.report import percent
    from tinyagent_fast.evaluation.scoring import (
        METRICS,
        refuse_unknown_tools,
        score_pair,
        summarise,
    )

    pairs = list(_read_pairs(path))
    labels = [label for label, _ in pairs]
    refuse_unknown_tools("labels", labels, tools, _CATALOGUE, some_are_fine=True)
    scores = [score_pair(label, prediction, tools) for label, prediction in pairs]
    if as_json and not summary:
        for score in scores:
            line = {name: float(getattr(score, name)) for name in METRICS}
            print(json.dumps({**line, "failure": score.failure}))
        return
    if not scores:
        raise DataError(f"pairs file {path}", "the list is empty", "write at least one pair")
    metrics = summarise(scores)
    if as_json:
        print(json.dumps(metrics.to_json(), indent=2))
        return
    for name, metric in METRICS.items():
        total = f"{metric.title:<12} {percent(getattr(metrics, name))}"
        print(total if name != "success" else f"{total}  n = {metrics.n}")
    for code, count in metrics.failures.items():
        print(f"  {code}: {count}")


def _read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    pairs = read_list(f"pairs file {path}", path, "write [{label, prediction}, ...]")
    for number, pair in enumerate(pairs):
        values = pair if isinstance(pair, dict) else {}
        label, prediction = values.get("label"), values.get("prediction", values.get("plan"))
        if not isinstance(label, str) or not isinstance(prediction, str):
            raise DataError(
                f"pairs file {path}, item {number}",
                "it has no texts `label` and `prediction`",
                "write {label, prediction} objects",
            )
        yield label, prediction


def _score_predictions(
    file: PredictionFile, tools: Mapping[str, Tool] | None, *, as_json: bool, summary: bool
) -> None:
    from tinyagent_fast.evaluation.report import markdown_report
    from tinyagent_fast.evaluation.scoring import refuse_unknown_tools, score_all, summarise

    predictions = file.read()
    if not predictions:
        raise DataError(
            f"predictions {file.path}", "there is none", "let `tinyagent-fast eval` finish"
        )
    labels = [row.label for row in predictions]
    refuse_unknown_tools("labels", labels, tools, _CATALOGUE, some_are_fine=True)
    plans = score_all(predictions, tools)
    metrics = summarise([plan.score for plan in plans])
    if as_json:
        print(json.dumps(metrics.to_json(), indent=2))
    else:
        print(markdown_report(str(file.folder), metrics, () if summary else plans, tools))
