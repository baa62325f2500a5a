"""Experiment trackers, through the trainer's own integrations; off unless asked for."""

from __future__ import annotations

import os
from copy import copy
from importlib.util import find_spec
from typing import Any

from tinyagent_fast.config import Tracker
from tinyagent_fast.errors import ModelError
from tinyagent_fast.runs import Run
from tinyagent_fast.training.best import Evaluation

# Each tracker reads its folder from the environment and from nowhere else.
_FOLDERS = {
    "tensorboard": "TENSORBOARD_LOGGING_DIR",
    "trackio": "TRACKIO_DIR",
    "wandb": "WANDB_DIR",
}


def tracking_arguments(tracker: Tracker, run: Run) -> dict[str, Any]:
    """Tell the trainer the tracker, and the tracker its folder unless a variable names another.

    Returns:
        Arguments of `transformers.TrainingArguments`.
    """
    if tracker == "off":
        return {"report_to": "none"}
    folder = run.path / "tracking"
    os.environ.setdefault(_FOLDERS[tracker], str(folder.resolve()))
    os.environ.setdefault("WANDB_PROJECT", "tinyagent_fast")
    if tracker != "tensorboard":
        folder.mkdir(exist_ok=True)
    return {
        "report_to": tracker,
        "run_name": run.path.name,
        "project": "tinyagent_fast",
        # Without this a copy of the figures would be published when training ends.
        "trackio_static_space_id": False,
    }


def track_evaluation(trainer: Any, new: Evaluation) -> None:
    """Hand an evaluation to the tracker, if there is one.

    The trainer's own `log` would also close its running means of the training loss.
    """
    if not trainer.args.report_to:
        return
    figures = {
        "eval_success": new.success,
        "eval_success_dag": new.success_dag,
        "eval_loss": new.loss,
    }
    # A copy, because the handler marks the step's own figures as logged.
    control = copy(trainer.control)
    trainer.callback_handler.on_log(trainer.args, trainer.state, control, figures)


def check_tracker(tracker: Tracker) -> None:
    """Refuse a tracker whose package is missing, before anything takes long.

    Raises:
        ModelError: The package is not installed.
    """
    if tracker != "off" and find_spec(tracker) is None:
        raise ModelError(
            f"--track {tracker}",
            f"the package {tracker} is not installed",
            f"pip install {tracker}",
        )
