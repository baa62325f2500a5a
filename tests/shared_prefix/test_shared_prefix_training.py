"""Shared prefixes in training: the same losses, fewer tokens, and a run that goes on as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from tinyagent_fast.config import Config
from tinyagent_fast.distributed import ALONE
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.runs import Run
from tinyagent_fast.shared_prefix.training import (
    PackingCollator,
    check_same_loss,
    decide_shared_prefix,
)
from tinyagent_fast.training.fit import train
from tinyagent_fast.training.trainer import collate

MakeConfig = Callable[..., Config]


def steps(run: Run) -> list[dict[str, Any]]:
    return [record for record in run.history() if record["event"] == "step"]


def run_with(tiny_config: MakeConfig, quiet: Any, name: str, **changes: Any) -> Run:
    return train(tiny_config(name=name, train={"batching": "shuffled", **changes}), quiet)


@pytest.mark.parametrize(
    "changes", [{}, {"accumulation": 2, "batch": 3}, {"optimizer": "adamw_8bit"}]
)
def test_training_with_shared_prefixes_gives_the_losses_of_whole_rows(
    tiny_config: MakeConfig, quiet: Any, no_picture: None, changes: dict[str, Any]
) -> None:
    on = run_with(tiny_config, quiet, "on", shared_prefix="on", **changes)
    off = run_with(tiny_config, quiet, "off", shared_prefix="off", **changes)
    for with_sharing, without in zip(steps(on), steps(off), strict=True):
        assert with_sharing["loss"] == pytest.approx(without["loss"], rel=2e-4)
        assert with_sharing["grad_norm"] == pytest.approx(without["grad_norm"], rel=5e-3)
        assert with_sharing["tokens_padded"] == without["tokens_padded"]
        assert without["tokens_computed"] == without["tokens_padded"]
        assert with_sharing["tokens_computed"] < with_sharing["tokens_padded"]


def test_checkpointed_layers_change_nothing(
    tiny_config: MakeConfig, quiet: Any, no_picture: None
) -> None:
    plain = run_with(tiny_config, quiet, "plain", shared_prefix="on")
    config = tiny_config(
        name="again",
        train={"batching": "shuffled", "shared_prefix": "on"},
        model={"gradient_checkpointing": "true"},
    )
    again = train(config, quiet)
    for one, other in zip(steps(plain), steps(again), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_it_is_on_by_default_and_said_with_its_share(
    tiny_config: MakeConfig, quiet: Any, no_picture: None
) -> None:
    run = train(tiny_config(), quiet)
    said = quiet.file.getvalue()
    assert "shared prefixes on: computes" in said
    assert "shared prefixes give the loss of whole rows within" in said
    remembered = json.loads((run.path / "shared_prefix.json").read_text(encoding="utf-8"))
    assert remembered["on"] is True
    assert 0.1 < remembered["computed_share"] < 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shared_prefix": "off"}, "asked for"),
        ({"batching": "packed"}, "rows are packed"),
    ],
)
def test_where_it_is_off_the_reason_is_said(
    tiny_config: MakeConfig, quiet: Any, no_picture: None, changes: dict[str, Any], reason: str
) -> None:
    train(tiny_config(train={"max_steps": 1, **changes}), quiet)
    assert f"shared prefixes off: {reason}" in quiet.file.getvalue()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_it_is_off_where_the_weights_of_a_layer_are_spread_over_processes(
    name: str, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    loaded: Any = SimpleNamespace(model=None)
    decision = decide_shared_prefix(loaded, tiny_config().train, [], None)
    assert not decision.on
    assert name in decision.reason


def test_asked_for_where_it_cannot_be_had_is_an_error(
    tiny_config: MakeConfig, quiet: Any, no_picture: None
) -> None:
    config = tiny_config(train={"batching": "packed", "shared_prefix": "on"})
    with pytest.raises(TrainingError, match="rows are packed"):
        train(config, quiet)


def test_steps_compute_in_the_type_that_the_trainer_asks_for(
    tiny_config: MakeConfig, quiet: Any, no_picture: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer builds autocast into the model's forward, which is not called."""
    import torch
    from accelerate import Accelerator

    from tinyagent_fast.shared_prefix import forward

    seen = []
    right = forward.shared_prefix_loss

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return right(*arguments, **named)

    monkeypatch.setattr(forward, "shared_prefix_loss", watched)
    # A new one each time: one that is entered twice leaves autocast on for good.
    monkeypatch.setattr(Accelerator, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    train(tiny_config(train={"max_steps": 2}), quiet)
    assert len(seen) > 2
    assert all(seen)


def test_a_loss_that_is_not_the_same_stops_before_the_first_step(
    tiny_config: MakeConfig, quiet: Any, no_picture: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.shared_prefix import forward

    right = forward.shared_prefix_loss

    def wrong(*arguments: Any, **named: Any) -> Any:
        return 1.01 * right(*arguments, **named)

    monkeypatch.setattr(forward, "shared_prefix_loss", wrong)
    with pytest.raises(TrainingError, match="whole rows"):
        train(tiny_config(), quiet)
    assert steps(Run(tiny_config().runs / "tiny")) == []


def test_rows_longer_than_the_base_s_context_stop_before_the_first_step(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.errors import DataError
    from tinyagent_fast.training import fit

    load = fit.load_for_training

    def shorter(config: Config, base: str) -> Any:
        loaded = load(config, base)
        loaded.model.config.max_position_embeddings = 60
        return loaded

    monkeypatch.setattr(fit, "load_for_training", shorter)
    with pytest.raises(DataError, match="context of 60 tokens"):
        train(tiny_config(), quiet)


class StandInTrainer:
    """A trainer's ways to the loss of a small model in one type, one of them with a fault."""

    def __init__(self, dtype: Any, fault: float) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=61, initializer_range=0.2, **shape, **heads)
        self.model = LlamaForCausalLM(config).to(dtype)
        self.fault = fault
        self.data_collator = PackingCollator(partial(collate, pad_id=0), most_rows=2)
        self.train_dataset = Rows(
            [
                {"input_ids": [*range(40), at, 7, 9], "labels": [-100] * 41 + [7, 9]}
                for at in range(1, 5)
            ]
        )
        self.accelerator = SimpleNamespace(autocast=nullcontext)
        self.processes = ALONE
        self.compute_loss_context_manager = nullcontext
        self._metrics: dict[str, dict[str, float]] = {"train": {}}

    def _prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        return model(**inputs, use_cache=False).loss

    def packed_gradients(self, packed: Any, num_items_in_batch: Any, *, backward: Any) -> Any:
        from tinyagent_fast.shared_prefix.step import step_gradients

        assert len(packed.parts) == 2
        return step_gradients(
            self.model, packed, num_items_in_batch, backward=lambda x: backward(self.fault * x)
        )


class Rows(list[dict[str, list[int]]]):
    """A list of rows that knows the column of their lengths, as a dataset does."""

    def __getitem__(self, at: Any) -> Any:
        return (
            [len(row["input_ids"]) for row in self] if at == "length" else super().__getitem__(at)
        )


@pytest.mark.parametrize(
    ("dtype", "fault", "stops"),
    [
        ("float32", 1.0, False),
        ("float32", 1.01, True),
        ("bfloat16", 1.0, False),
        ("bfloat16", 1.01, False),
        ("bfloat16", 1.1, True),
        ("float32", float("nan"), True),
    ],
)
def test_the_check_allows_what_the_rounding_of_the_compute_type_explains(
    dtype: str, fault: float, stops: bool
) -> None:
    import torch

    trainer = StandInTrainer(getattr(torch, dtype), fault)
    loaded: Any = SimpleNamespace(model=trainer.model, device="cpu", compute_dtype=dtype)
    if stops:
        with pytest.raises(TrainingError, match=dtype):
            check_same_loss(trainer, loaded, trainer.train_dataset)
        return
    difference = check_same_loss(trainer, loaded, trainer.train_dataset)
    assert difference < (1e-5 if dtype == "float32" else 0.03)


@pytest.mark.parametrize(
    ("shared", "stops"),
    [((2.75e-4, 9.1e-4), False), ((3.1e-4, 0.02), True), ((0.02, 1.1e-3), True)],
)
def test_rows_that_a_base_knows_by_heart_may_round_to_another_margin(
    shared: tuple[float, float], stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged planner that is trained on has next to no loss on its shortest rows."""
    import torch

    from tinyagent_fast.shared_prefix import training

    ways = iter([([2.93e-4, 1.02e-3], "bfloat16"), (list(shared), "bfloat16")])
    monkeypatch.setattr(training, "_loss_and_gradient", lambda *_: next(ways))
    trainer = StandInTrainer(torch.bfloat16, 1.0)
    loaded: Any = SimpleNamespace(model=trainer.model, device="cpu", compute_dtype="bfloat16")
    if stops:
        with pytest.raises(TrainingError, match="bfloat16"):
            check_same_loss(trainer, loaded, trainer.train_dataset)
    else:
        check_same_loss(trainer, loaded, trainer.train_dataset)
