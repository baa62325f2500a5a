"""What a CPU computes in: chosen by time and loss, kept by a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tinyagent_fast.config import Config
from tinyagent_fast.models.loading import load_for_training
from tinyagent_fast.training import compute, fit

MakeConfig = Callable[..., Config]


def choose(
    config: Config, monkeypatch: pytest.MonkeyPatch, *, half_s: float, half_loss: float
) -> tuple[Any, list[str]]:
    """Choose for a model whose step takes a second in fp32 and so long in bf16."""
    loaded = load_for_training(config, config.model.base)
    clock, said = [0.0], list[str]()
    monkeypatch.setattr(compute.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(compute, "may_take_bf16", lambda *_: True)

    def step(loaded: Any, batch: Any) -> torch.Tensor:
        half = loaded.compute_dtype == "bfloat16"
        clock[0] += half_s if half else 1.0
        return torch.tensor(half_loss if half else 2.0)

    rows = [{"input_ids": list(range(3, 40))}]
    return compute.choose_compute(loaded, config, rows, step, said.append), said


@pytest.mark.parametrize(
    ("half_s", "half_loss", "dtype"),
    [
        (0.5, 2.001, "bfloat16"),
        (0.95, 2.001, "float32"),  # not clearly faster
        (0.5, 2.2, "float32"),  # another loss
    ],
)
def test_bf16_is_taken_where_it_is_faster_and_gives_the_same_loss(
    half_s: float,
    half_loss: float,
    dtype: str,
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config()
    before = load_for_training(config, config.model.base)
    found, said = choose(config, monkeypatch, half_s=half_s, half_loss=half_loss)
    assert found.compute_dtype == dtype
    kinds = {p.requires_grad: p.dtype for p in found.model.parameters()}
    assert kinds == {True: torch.float32, False: getattr(torch, dtype)}
    if dtype == "float32":
        pairs = zip(before.model.parameters(), found.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.grad is None for p in found.model.parameters())
    assert len(said) == 1
    assert dtype in said[0]


def test_small_models_are_not_timed_when_threads_are_given(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    loaded = load_for_training(config, config.model.base)

    def never(*_: Any) -> torch.Tensor:
        raise AssertionError("nothing is to be chosen")

    rows = [{"input_ids": [3, 4, 5]}]
    assert compute.choose_compute(loaded, config, rows, never, never) is loaded  # type: ignore[arg-type]


def test_a_run_in_bf16_trains_checks_itself_and_is_resumed_in_it(
    tiny_config: MakeConfig, quiet: Any, no_picture: None
) -> None:
    changes = {"max_steps": 8, "evaluations": 2, "learning_rate": 2e-2}
    config = tiny_config(model=replace_compute(tiny_config(), "bf16"), train=changes)
    run = fit.train(config, quiet)
    shown = quiet.file.getvalue()
    assert "compute bfloat16" in shown
    assert "give the loss of whole rows" in shown
    assert json.loads((run.path / "compute.json").read_text(encoding="utf-8")) == {
        "dtype": "bfloat16"
    }
    losses = [r["loss"] for r in run.history() if r["event"] == "step"]
    assert losses[-1] < losses[0]
    fit.train(config, quiet, resume=run)


def replace_compute(config: Config, compute: Any) -> Any:
    return replace(config.model, cpu_compute=compute)
