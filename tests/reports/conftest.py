"""A run's folder as training, evaluation and export leave it, made without any of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.scoring import Prediction
from tinyagent_fast.inference.engine import StopReason
from tinyagent_fast.presets import preset_config
from tinyagent_fast.runs import Run, create_run

NASTY = '</script><b onclick="x">note & "quotes" `ticks` | pipe \u202e\n# heading'
LABEL = '1. get_email_address("Sid")\n2. compose_new_email(["$1"], [], "", "", [])\n3. join()'
WRONG = {
    "missing_tool": '1. compose_new_email(["a"], [], "", "", [])\n2. join()',
    "extra_tool": LABEL.replace("3. join()", '3. open_note("n", "")\n4. join()'),
    "wrong_edges": LABEL.replace('"$1"', '"a"'),
    "unknown_tool": '1. fly("x")\n2. join()',
    "bad_arguments": "1. open_note(x)\n2. join()",
    "bad_reference": '1. open_note("$9", "")\n2. join()',
    "no_join": '1. open_note("a", "")',
    "empty": "",
}
"""A prediction for each of some causes of failure."""


def prediction(key: str, text: str, query: str = "Write Sid an email", **more: Any) -> Prediction:
    stop: StopReason = more.pop("stop_reason", "stop")
    fields = {"label": LABEL, "new_tokens": 5, **more}
    return Prediction(key=key, query=query, prediction=text, stop_reason=stop, **fields)


@pytest.fixture
def write_predictions() -> Callable[..., None]:
    """Return a function that writes a folder of predictions from plans."""

    def write(folder: Path, plans: Sequence[str], query: str = "Write Sid an email") -> None:
        file = PredictionFile(folder)
        file.start({"test_sha256": "t"})
        file.append(prediction(f"k{at}", text, query) for at, text in enumerate(plans))

    return write


@pytest.fixture
def bare_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a run with nothing but its config."""
    monkeypatch.chdir(tmp_path)
    run = create_run(preset_config("cpu"))
    (run.path / "environment.json").unlink()
    return run


@pytest.fixture
def full_run(bare_run: Run, write_predictions: Callable[..., None]) -> Run:
    """Return a run with everything: 2 of 10 plans right, all causes of failure, an export."""
    run, wrong = bare_run, [*WRONG.values()]
    write_predictions(run.path / "test" / "before", [wrong[0]] * 10, NASTY)
    write_predictions(run.path / "test" / "after", [LABEL, *wrong, LABEL], NASTY)
    write_predictions(run.path / "eval-gguf-a-q4_k_m", [LABEL, LABEL, *wrong[1:], LABEL], NASTY)
    run.append_history(evaluation(0, 0.25, best=True))
    for step in range(10, 50, 10):
        run.append_history(
            {"event": "step", "step": step, "loss": 2 / step, "learning_rate": 1e-4 * step}
            | {"tokens_per_s": 900.0 + step}
        )
    run.append_history(evaluation(40, 0.75, best=True))
    write_json(run.path / "environment.json", {"cpus": 2, "python": "3.11", "gpu": None})
    write_json(run.path / "timings.json", {"steps": 65.0, "all": 130.2, "odd": "x"})
    facts = {"test_file": {"path": "t.json", "sha256": "t"}, "examples": {"test": 10}}
    write_json(run.path / "data.json", facts)
    artefact = {"kind": "gguf", "quant": "q4_k_m", "size_bytes": 1_066_080}
    artefact |= {"sha256": "0", "seconds": 1.0, "made_from": "1"}
    export = {
        "artefacts": [
            {**artefact, "path": "gguf/a-q4_k_m.gguf", "details": {"bits_per_weight": 5.2}},
            {**artefact, "path": "importance.gguf", "kind": "importance"},
        ],
        "gates": [{"name": "same ids", "passed": True, "rule": "equal"}],
        "passed": True,
        "success_on_validation": {"q4_k_m": {"count": 3, "total": 4}},
    }
    write_json(run.path / "export" / "export.json", export)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    return run


def evaluation(step: int, success: float, *, best: bool) -> dict[str, object]:
    record = {"event": "evaluation", "step": step, "loss": 0.5, "samples": 4, "best": best}
    return {**record, "success": success, "success_dag": success}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
