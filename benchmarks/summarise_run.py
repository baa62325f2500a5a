"""Write what a run measured as one JSON file: `python benchmarks/summarise_run.py runs/latest`.

It reads the run's own files only, so every figure in the result is one that the run produced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tinyagent_fast.config import to_mapping
from tinyagent_fast.runs import Run, find_run, write_json

_FIGURES = ("n", "success", "success_dag", "tool_recall", "unparsable", "truncated")


def summarise(run: Run) -> dict[str, Any]:
    """Collect config, environment, timings and figures; null for what the run did not measure."""
    history = run.history()
    steps = [record for record in history if record.get("event") == "step"]
    rates = [record["tokens_per_s"] for record in steps]
    # Folders of that machine are nobody's business.
    environment = _read(run.path / "environment.json") or {}
    environment.pop("folder", None)
    if environment.get("command"):
        environment["command"][0] = Path(environment["command"][0]).name
    return {
        "run": run.path.name,
        "config": to_mapping(run.config()),
        "environment": environment,
        "rows": (_read(run.path / "data.json") or {}).get("rows"),
        "seconds": _read(run.path / "timings.json"),
        "steps": steps[-1]["step"] if steps else None,
        "tokens_per_s_median": statistics.median_high(rates) if rates else None,
        "validation": [record for record in history if record.get("event") == "evaluation"],
        "test_before": _figures(run.path / "test" / "before"),
        "test_after": _figures(run.path / "test" / "after"),
        "eval": _figures(run.evaluation),
        "other_evaluations": {
            path.parent.name: _figures(path.parent)
            for path in sorted(run.path.glob("eval-*/metrics.json"))
        },
        "gguf_files": _read(run.path / "eval-gguf.json"),
    }


def _figures(folder: Path) -> dict[str, Any] | None:
    metrics = _read(folder / "metrics.json")
    return {name: metrics[name] for name in _FIGURES} if metrics else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    """Summarise one run into benchmarks/results/."""
    parser = argparse.ArgumentParser(description="Summarise a run as one JSON file.")
    parser.add_argument("run", nargs="?", default="latest")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    run = find_run(flags.run)
    out = flags.out or Path(__file__).parent / "results" / f"{run.path.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, summarise(run))
    print(out)


if __name__ == "__main__":
    main()
