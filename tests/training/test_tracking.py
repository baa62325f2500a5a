"""Trackers: off unless asked for; then they get every figure, under the run's name and folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Config
from tinyagent_fast.errors import ModelError
from tinyagent_fast.runs import Run
from tinyagent_fast.training import fit, tracking
from tinyagent_fast.training.tracking import check_tracker, tracking_arguments

pytestmark = pytest.mark.usefixtures("no_picture", "own_environment")
MakeConfig = Callable[..., Config]
TRACKERS = ("tensorboard", "trackio", "wandb")
FOLDERS = ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR", "WANDB_PROJECT")


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test see or leave a tracker's variables."""
    for name in FOLDERS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Put a stand-in for every tracker and keep what it is handed, with the step."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    handed: list[tuple[int, dict[str, Any]]] = []

    class StandIn(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                handed.append((state.global_step, {"run": args.run_name, **logs}))

    for name in TRACKERS:
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, StandIn)
    monkeypatch.setattr(tracking, "find_spec", lambda _: object())
    return handed


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_gets_losses_and_plan_success_at_their_steps(
    tracker: str, tiny_config: MakeConfig, quiet: Any, seen: list[tuple[int, dict[str, Any]]]
) -> None:
    run = fit.train(tiny_config(track=tracker, train={"evaluations": 2}), quiet)
    assert {figures["run"] for _, figures in seen} == {"tiny"}
    losses = {step: figures["loss"] for step, figures in seen if "loss" in figures}
    assert losses == {r["step"]: r["loss"] for r in run.history() if r["event"] == "step"}
    measured = {step: f for step, f in seen if "eval_success" in f}
    for record in (r for r in run.history() if r["event"] == "evaluation"):
        figures = measured.pop(record["step"])
        assert figures["eval_success"] == record["success"]
        assert figures["eval_success_dag"] == record["success_dag"]
        assert figures["eval_loss"] == record["loss"]
    assert measured == {}


def test_without_track_no_tracker_is_told_anything(
    tiny_config: MakeConfig, quiet: Any, seen: list[tuple[int, dict[str, Any]]]
) -> None:
    fit.train(tiny_config(train={"evaluations": 2, "max_steps": 2}), quiet)
    assert seen == []


def test_tracking_changes_neither_losses_nor_what_history_holds(
    tiny_config: MakeConfig, quiet: Any, seen: list[tuple[int, dict[str, Any]]]
) -> None:
    times = ("tokens_per_s", "seconds")
    histories = []
    for tracker in ("off", "tensorboard"):
        config = tiny_config(name=tracker, track=tracker, train={"evaluations": 2})
        records = fit.train(config, quiet).history()
        histories.append([{k: v for k, v in r.items() if k not in times} for r in records])
    assert histories[0] == histories[1]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_whose_package_is_missing_is_refused_before_a_run_is_made(
    tracker: str, tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    config = tiny_config(track=tracker)
    with pytest.raises(ModelError, match=f"pip install {tracker}"):
        fit.train(config, quiet)
    assert not config.runs.exists()


def test_off_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    check_tracker("off")


def test_what_a_tracker_keeps_here_is_in_the_run_s_folder_unless_a_variable_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    run = Run(tmp_path)
    tracking_arguments("trackio", run)
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "tracking")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    arguments = tracking_arguments("wandb", run)
    assert os.environ["WANDB_DIR"] == "elsewhere"
    assert arguments["run_name"] == tmp_path.name
    assert arguments["trackio_static_space_id"] is False
    assert tracking_arguments("off", run) == {"report_to": "none"}


def test_tensorboard_s_own_files_hold_the_figures(tiny_config: MakeConfig, quiet: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit.train(tiny_config(track="tensorboard", train={"evaluations": 2}), quiet)
    events = EventAccumulator(str(run.path / "tracking"))
    events.Reload()
    evaluations = [r for r in run.history() if r["event"] == "evaluation"]
    for name, key in (("eval/success", "success"), ("eval/loss", "loss")):
        assert [e.step for e in events.Scalars(name)] == [r["step"] for r in evaluations]
        assert [e.value for e in events.Scalars(name)] == pytest.approx(
            [r[key] for r in evaluations]
        )
    assert len(events.Scalars("train/loss")) == 4
