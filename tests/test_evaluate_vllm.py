"""`eval --engine vllm` evaluates the merged folder of a run; vLLM itself is stood in for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast import cli
from tinyagent_fast.config import Config
from tinyagent_fast.inference import vllm_engine
from tinyagent_fast.inference.decoding import Completion
from tinyagent_fast.inference.parity import ParityReport
from tinyagent_fast.runs import Run, create_run, write_json


class RightPlans:
    """Answers every example with its label."""

    name = "vllm"

    def __init__(self, folder: Path, tokenizer: Any, *, context_tokens: int) -> None:
        self.folder = folder

    def identity(self) -> dict[str, str]:
        return {"engine": "vllm"}

    def notes(self, examples: Any) -> list[str]:
        return []

    def compare_batches(self, examples: Any, *, batch: int, **_: Any) -> ParityReport:
        return ParityReport(0, batch, batch, ())

    def complete(self, examples: Any, **_: Any) -> Any:
        yield [(at, Completion(e.output, "stop", 9)) for at, e in enumerate(examples)]


@pytest.fixture
def run(tiny_config: Callable[..., Config], tiny_base: Path) -> Run:
    run = create_run(tiny_config())
    write_json(run.path / "data.json", {"base": str(tiny_base)})
    return run


def test_the_exported_merged_folder_is_evaluated(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_engine, "VllmEngine", RightPlans)
    merged = run.path / "export" / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}", encoding="utf-8")
    assert cli.main(["eval", "--run", "tiny", "--engine", "vllm"]) == 0
    assert "plan success 100.0 %" in capsys.readouterr().out
    metrics = json.loads((run.path / "eval-vllm" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["success"]["total"] == 6


def test_without_a_merged_folder_the_message_says_how_to_make_one(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--run", "tiny", "--engine", "vllm"]) == 2
    assert "--to merged" in capsys.readouterr().err
