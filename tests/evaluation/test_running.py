"""Evaluation: every query answered once, also across a stop, and figures that can be redone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch_runs import load_plainly

from tinyagent_fast.config import EvalConfig
from tinyagent_fast.data.schema import Example
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.running import (
    EvaluationResult,
    EvaluationTask,
    evaluate_examples,
)
from tinyagent_fast.evaluation.scoring import score_all, summarise
from tinyagent_fast.inference.engine import Completion, Limits
from tinyagent_fast.inference.torch_engine import TorchEngine
from tinyagent_fast.models.loading import LoadedModel

SETTINGS = EvalConfig(batch=3, max_new_tokens=5, parity_prompts=2)
MADE_WITH = {"adapter_sha256": "a1"}
LABEL = '1. open_note("n", "")\n2. join()'


def make_examples(count: int) -> list[Example]:
    return [
        Example(
            key=f"k{at}/0",
            entry_key=f"k{at}",
            kind="plan",
            query=f"open note {at}",
            system="tools",
            user="Question: open note" + " please" * at,
            output=LABEL,
        )
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def loaded(tiny_base: Path) -> LoadedModel:
    return load_plainly(tiny_base)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record every call of the engine: its batch and the plans that were taken from it."""
    calls: list[list[int]] = []
    original = TorchEngine.generate

    def recording(self: TorchEngine, prompts: Any, limits: Limits, *how: Any) -> Any:
        call = [limits.batch, 0]
        calls.append(call)
        for pair in original(self, prompts, limits, *how):
            call[1] += 1
            yield pair

    monkeypatch.setattr(TorchEngine, "generate", recording)
    return calls


def evaluate(loaded: LoadedModel, count: int, folder: Path, **changes: Any) -> EvaluationResult:
    watching = {name: changes.pop(name) for name in ("say", "on_progress") if name in changes}
    task = EvaluationTask(examples=make_examples(count), settings=SETTINGS, made_with=MADE_WITH)
    return evaluate_examples(TorchEngine(loaded), replace(task, **changes), folder, **watching)


def metrics_of(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def texts_of(result: EvaluationResult) -> list[tuple[str, str, str, int]]:
    return [(p.key, p.prediction, p.stop_reason, p.new_tokens) for p in result.predictions]


def test_nobody_is_waited_for_whatever_a_launcher_says(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    assert evaluate(loaded, 2, tmp_path).metrics.n == 2


def test_every_query_gets_one_prediction_with_its_label_in_the_order_of_the_examples(
    loaded: LoadedModel, tmp_path: Path, generated: list[list[int]]
) -> None:
    result = evaluate(loaded, 7, tmp_path)
    assert [p.key for p in result.predictions] == [e.key for e in make_examples(7)]
    assert {p.label for p in result.predictions} == {LABEL}
    assert generated[-1] == [3, 7]
    assert result.metrics.n == 7
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# evaluation")
    assert all(p.seconds is not None and p.seconds >= 0 for p in result.predictions)


def test_scoring_the_file_again_gives_the_figures_of_metrics_json(
    loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyagent_fast.commands import score

    evaluate(loaded, 5, tmp_path)
    written = metrics_of(tmp_path)
    del written["generation"]
    again = summarise([plan.score for plan in score_all(PredictionFile(tmp_path).read())])
    assert json.loads(json.dumps(again.to_json())) == written
    assert score.run([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_metrics_json_says_how_the_predictions_came_about(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    evaluate(loaded, 4, tmp_path)
    generation = metrics_of(tmp_path)["generation"]
    assert generation["reused_predictions"] == 0
    assert generation["parity"]["tried"] == [[3, 0]]
    assert generation["seconds"] > 0


class Stop(BaseException):
    """Stands for a kill."""


def stop_after(plans: int) -> Any:
    calls = 0

    def on_progress(_done: int, _total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == plans:
            raise Stop

    return on_progress


@pytest.mark.parametrize("torn", [False, True], ids=["between lines", "inside a line"])
def test_a_stopped_evaluation_goes_on_where_it_was_and_ends_as_if_never_stopped(
    torn: bool, loaded: LoadedModel, tmp_path: Path, generated: list[list[int]]
) -> None:
    whole = evaluate(loaded, 8, tmp_path / "whole")
    generated.clear()
    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        evaluate(loaded, 8, folder, on_progress=stop_after(4))
    file = PredictionFile(folder)
    if torn:
        file.path.write_bytes(file.path.read_bytes()[:-10])
    lines: list[str] = []
    progress: list[tuple[int, int]] = []
    result = evaluate(
        loaded,
        8,
        folder,
        say=lines.append,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert generated[-1] == [3, 5 if torn else 4]
    assert result.reused == (3 if torn else 4)
    assert progress[-1] == (8, 8)
    assert f"{result.reused} predictions are there" in lines[0]
    assert texts_of(result) == texts_of(whole)
    assert sorted(p.key for p in file.read()) == sorted(e.key for e in make_examples(8))
    assert result.metrics == whole.metrics


def test_the_model_is_left_in_its_mode_when_an_evaluation_is_stopped(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    import torch

    loaded.model.train()
    with pytest.raises(Stop):
        evaluate(loaded, 4, tmp_path, on_progress=stop_after(1))
    assert loaded.model.training
    assert torch.is_grad_enabled()
    loaded.model.eval()


def test_a_finished_evaluation_generates_nothing_again(
    loaded: LoadedModel, tmp_path: Path, generated: list[list[int]]
) -> None:
    first = evaluate(loaded, 4, tmp_path)
    generated.clear()
    second = evaluate(loaded, 4, tmp_path)
    assert generated == []
    assert second.parity is None
    assert second.reused == 4
    assert second.predictions == first.predictions
    assert second.metrics == first.metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"made_with": {"adapter_sha256": "b2"}},
        {"settings": replace(SETTINGS, max_new_tokens=4)},
    ],
    ids=["adapter", "length limit"],
)
def test_predictions_of_another_adapter_or_limit_are_never_mixed_in(
    changes: dict[str, Any], loaded: LoadedModel, tmp_path: Path, generated: list[list[int]]
) -> None:
    evaluate(loaded, 4, tmp_path)
    generated.clear()
    result = evaluate(loaded, 4, tmp_path, **changes)
    assert generated[-1] == [3, 4]
    assert result.reused == 0
    assert len(PredictionFile(tmp_path).read()) == 4


def test_predictions_in_another_precision_are_never_mixed_in(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    evaluate(loaded, 4, tmp_path)
    assert evaluate(replace(loaded, compute_dtype="bfloat16"), 4, tmp_path).reused == 0
    assert evaluate(loaded, 4, tmp_path).reused == 0
    assert evaluate(loaded, 4, tmp_path).reused == 4


def test_under_a_grammar_no_plan_has_an_unknown_tool_or_arity_and_free_ones_are_not_reused(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    longer = replace(SETTINGS, max_new_tokens=160)
    free = evaluate(loaded, 4, tmp_path, settings=longer)
    held = evaluate(loaded, 4, tmp_path, settings=longer, grammar=True)
    assert held.reused == 0
    assert {p.prediction for p in free.predictions}.isdisjoint(
        p.prediction for p in held.predictions
    )
    wrong = {"unparsable", "unknown_tool", "wrong_arity", "wrong_argument_type", "no_join"}
    assert not held.metrics.failures.keys() & wrong
    assert all(p.stop_reason in ("stop", "length") for p in held.predictions)
    assert evaluate(loaded, 4, tmp_path, settings=longer, grammar=True).reused == 4


def test_another_batch_size_is_no_other_evaluation(
    loaded: LoadedModel, tmp_path: Path, generated: list[list[int]]
) -> None:
    evaluate(loaded, 4, tmp_path)
    generated.clear()
    assert evaluate(loaded, 4, tmp_path, settings=replace(SETTINGS, batch=2)).reused == 4
    assert generated == []


def test_more_queries_add_to_what_is_there_and_fewer_are_counted_alone(
    loaded: LoadedModel, tmp_path: Path, generated: list[list[int]]
) -> None:
    evaluate(loaded, 2, tmp_path)
    generated.clear()
    assert evaluate(loaded, 5, tmp_path).reused == 2
    assert generated[-1] == [3, 3]
    lines: list[str] = []
    fewer = evaluate(loaded, 3, tmp_path, say=lines.append)
    assert (fewer.metrics.n, fewer.reused) == (3, 3)
    assert "2 predictions of other queries are there" in lines[1]


def test_a_batch_that_gives_other_plans_is_said_and_not_used(
    loaded: LoadedModel, tmp_path: Path, generated: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = evaluate(loaded, 5, tmp_path / "alone", settings=replace(SETTINGS, batch=1))
    generated.clear()
    original = TorchEngine.generate

    def spoiled(self: TorchEngine, prompts: Any, limits: Limits, *how: Any) -> Any:
        for index, completion in original(self, prompts, limits, *how):
            yield index, completion if limits.batch == 1 else replace(completion, text="other")

    monkeypatch.setattr(TorchEngine, "generate", spoiled)
    lines: list[str] = []
    result = evaluate(loaded, 5, tmp_path / "batched", say=lines.append)
    assert generated[-1] == [1, 5]
    assert "falling back to batch 1" in lines[1]
    assert result.parity is not None
    assert not result.parity.agrees
    assert texts_of(result) == texts_of(alone)


def test_a_right_plan_counts_as_success_and_a_wrong_one_does_not(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(_: Any, prompts: Any, *how: Any) -> Iterator[tuple[int, Completion]]:
        for at in range(len(prompts)):
            text = LABEL if at % 2 else "1. join()"
            yield at, Completion(text=text, stop_reason="stop", new_tokens=9, prompt_tokens=9)

    monkeypatch.setattr(TorchEngine, "generate", generate)
    settings = replace(SETTINGS, parity_prompts=0)
    result = evaluate(loaded, 4, tmp_path, settings=settings)
    assert (result.metrics.success.count, result.metrics.n) == (2, 4)
    assert metrics_of(tmp_path)["failures"] == {"missing_tool": 2}
