"""Shared prefixes in training: the same losses, fewer tokens, and a run that goes on as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tinyagent_fast.config import Config
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.runs import Run
from tinyagent_fast.shared_prefix.training import decide_shared_prefix
from tinyagent_fast.training.fit import train

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


def test_asked_for_where_it_cannot_be_had_is_an_error(
    tiny_config: MakeConfig, quiet: Any, no_picture: None
) -> None:
    config = tiny_config(train={"batching": "packed", "shared_prefix": "on"})
    with pytest.raises(TrainingError, match="rows are packed"):
        train(config, quiet)


def test_several_processes_compute_whole_rows(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setenv("WORLD_SIZE", "2")
    loaded: Any = SimpleNamespace(backend="transformers")
    decision = decide_shared_prefix(loaded, tiny_config().train, [], None)
    assert not decision.on
    assert "several processes" in decision.sentence()


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
