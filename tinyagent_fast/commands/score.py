"""`score`: score predictions or pairs again, on a machine without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.plans.tools import Tool


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Flags of `score`."""

    predictions: Path | None = None
    """A predictions.jsonl, or a run or evaluation that holds one; default: runs/latest."""
    pairs: Path | None = None
    """A JSON list of objects with the texts `label` and `prediction`, instead."""
    catalogue: Path | None = None
    """YAML catalogue with the tools that plans may call; by default the run's, else TinyAgent's."""
    json: bool = False
    """Print JSON: one object a line for --pairs, all figures for predictions."""


def run(arguments: Sequence[str]) -> int:
    """Score.

    Args:
        arguments: Flags of the command; a predictions file may come first without a flag.

    Returns:
        0 when everything was scored.
    """
    import tyro

    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--predictions")
    flags = tyro.cli(ScoreFlags, args=words, prog="tinyagent-fast score")
    if flags.pairs is not None and flags.predictions is not None:
        raise ConfigError(
            f"score {flags.predictions} --pairs {flags.pairs}",
            "one call scores one file",
            "leave one of them out",
        )
    if flags.pairs is not None:
        return _score_pairs(flags.pairs, _tools(flags.catalogue), as_json=flags.json)
    file = _predictions_file(flags.predictions or Path("runs/latest"))
    tools = _tools(flags.catalogue or _catalogue_of_run(file))
    return _score_predictions(file, tools, as_json=flags.json)


def _tools(catalogue: Path | None) -> Mapping[str, Tool] | None:
    if catalogue is None:
        return None
    from tinyagent_fast.data.generation.catalogue import load_catalogue

    return {tool.name: tool.plan_tool() for tool in load_catalogue(catalogue).tools}


def _catalogue_of_run(file: Path) -> Path | None:
    """Find the catalogue that a run's plans were made for, so that no flag has to repeat it."""
    from tinyagent_fast.runs import Run

    runs = [Run(folder) for folder in file.absolute().parents[:3]]
    return next((run.config().data.catalogue for run in runs if run.config_path.exists()), None)


def _score_pairs(path: Path, tools: Mapping[str, Tool] | None, *, as_json: bool) -> int:
    from tinyagent_fast.api import score_pairs
    from tinyagent_fast.evaluation.report import percent
    from tinyagent_fast.evaluation.scoring import score_pair

    pairs = list(_read_pairs(path))
    if not as_json:
        if not pairs:
            raise DataError(f"pairs file {path}", "the list is empty", "write at least one pair")
        metrics = score_pairs(pairs, tools)
        print(f"success      {percent(metrics.success)}  n = {metrics.n}")
        print(f"success_dag  {percent(metrics.success_dag)}")
        print(f"tool recall  {percent(metrics.tool_recall)}")
        for code, count in metrics.failures.items():
            print(f"  {code}: {count}")
        return 0
    for label, prediction in pairs:
        score = score_pair(label, prediction, tools)
        line = {
            "success": float(score.success),
            "success_dag": float(score.success_dag),
            "tool_recall": score.tool_recall,
            "failure": score.failure,
        }
        sys.stdout.write(json.dumps(line) + "\n")
    return 0


def _read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        pairs: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"pairs file {path}", f"it cannot be read as JSON: {error}", "check path and content"
        ) from error
    if not isinstance(pairs, list):
        raise DataError(
            f"pairs file {path}", "the top level is no list", "write [{label, prediction}, ...]"
        )
    for number, pair in enumerate(pairs):
        label, prediction = (
            pair.get(name) if isinstance(pair, dict) else None for name in ("label", "prediction")
        )
        if not isinstance(label, str) or not isinstance(prediction, str):
            raise DataError(
                f"pairs file {path}, item {number}",
                "it has no texts `label` and `prediction`",
                "write {label, prediction} objects",
            )
        yield label, prediction


def _predictions_file(path: Path) -> Path:
    """Find the predictions of a run or an evaluation; `eval` writes later than `train`."""
    if path.is_file():
        return path
    folders = (path, path / "eval", path / "test" / "after")
    files = [folder / "predictions.jsonl" for folder in folders]
    for file in files:
        if file.exists():
            return file
    raise DataError(
        f"predictions in {path}",
        f"none of {', '.join(map(str, files))} is there",
        "generate them with `tinyagent-fast eval`, or name a folder or file that has them",
    )


def _score_predictions(path: Path, tools: Mapping[str, Tool] | None, *, as_json: bool) -> int:
    from tinyagent_fast.evaluation.predictions import PredictionFile
    from tinyagent_fast.evaluation.report import markdown_report
    from tinyagent_fast.evaluation.scoring import score_predictions

    predictions = PredictionFile(path.parent, path.name).read()
    if not predictions:
        raise DataError(f"predictions {path}", "there is none", "let `tinyagent-fast eval` finish")
    metrics = score_predictions(predictions, tools)
    if as_json:
        print(json.dumps(metrics.to_json(), indent=2))
    else:
        print(markdown_report(str(path.parent), metrics, predictions, tools))
    return 0
