"""Write what a run measured as one JSON file: `python benchmarks/summarise_run.py runs/latest`.

It reads the run's own files only, so every figure in the result is one that the run produced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tinyagent_fast.config import to_mapping
from tinyagent_fast.runs import Run, find_run, write_json

_FIGURES = ("success", "success_dag", "tool_recall", "unparsable", "truncated")


def summarise(run: Run) -> dict[str, Any]:
    """Collect config, environment, timings and figures; null for what the run did not measure."""
    history = run.history()
    steps = [record for record in history if record.get("event") == "step"]
    rates = sorted(record["tokens_per_s"] for record in steps)
    return {
        "run": run.path.name,
        "config": to_mapping(run.config()),
        "environment": _environment(run),
        "rows": (_read(run.path / "data.json") or {}).get("rows"),
        "seconds": _read(run.path / "timings.json"),
        "steps": steps[-1]["step"] if steps else None,
        "tokens_per_s_median": rates[len(rates) // 2] if rates else None,
        "validation": [record for record in history if record.get("event") == "evaluation"],
        "test_before": _figures(run.path / "test" / "before"),
        "test_after": _figures(run.path / "test" / "after"),
        "eval": _figures(run.evaluation),
        "other_evaluations": {
            folder.name: _figures(folder)
            for folder in sorted(run.path.glob("eval-*"))
            if (folder / "metrics.json").exists()
        },
        "gguf_files": _read(run.path / "eval-gguf.json"),
    }


def _environment(run: Run) -> dict[str, Any] | None:
    """Read the environment; the program's folder on that machine is nobody's business."""
    environment = _read(run.path / "environment.json")
    if environment and environment.get("command"):
        program, *flags = environment["command"]
        environment["command"] = [Path(program).name, *flags]
        environment.pop("folder", None)
    return environment


def _figures(folder: Path) -> dict[str, Any] | None:
    metrics = _read(folder / "metrics.json")
    if metrics is None:
        return None
    return {"n": metrics["n"], **{name: metrics[name] for name in _FIGURES}}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


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
