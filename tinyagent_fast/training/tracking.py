"""Experiment trackers, through the trainer's own integrations; off unless asked for."""

from __future__ import annotations

import os
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tinyagent_fast.config import Tracker
from tinyagent_fast.errors import ModelError
from tinyagent_fast.runs import Run
from tinyagent_fast.training.best import Evaluation


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where a run's figures go besides its own folder."""

    tracker: Tracker = "off"
    run: Run | None = None
    """Gives the name, and the folder for what a tracker keeps on this machine."""

    def arguments(self) -> dict[str, Any]:
        """Say it to the trainer, and tell the tracker its folder unless a variable names another.

        Returns:
            Arguments of `transformers.TrainingArguments`.
        """
        if self.tracker == "off" or self.run is None:
            return {"report_to": "none"}
        folder = self.run.path / "tracking"
        # Each tracker reads its folder from the environment and from nowhere else.
        names = {
            "tensorboard": "TENSORBOARD_LOGGING_DIR",
            "trackio": "TRACKIO_DIR",
            "wandb": "WANDB_DIR",
        }
        os.environ.setdefault(names[self.tracker], str(folder.resolve()))
        os.environ.setdefault("WANDB_PROJECT", "tinyagent_fast")
        if self.tracker != "tensorboard":
            folder.mkdir(exist_ok=True)
        return {
            "report_to": self.tracker,
            "run_name": self.run.path.name,
            "project": "tinyagent_fast",
            # Without this a copy of the figures would be published when training ends.
            "trackio_static_space_id": False,
        }

    def evaluation(self, trainer: Any, new: Evaluation) -> None:
        """Hand an evaluation to the tracker.

        The trainer's own `log` would also close its running means of the training loss.

        Args:
            trainer: Knows the tracker's callback.
            new: The measurement.
        """
        if self.tracker == "off":
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

    Args:
        tracker: `off`, or a package's name.

    Raises:
        ModelError: The package is not installed.
    """
    if tracker != "off" and find_spec(tracker) is None:
        raise ModelError(
            f"--track {tracker}",
            f"the package {tracker} is not installed",
            f"pip install {tracker}",
        )
