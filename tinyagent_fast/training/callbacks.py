"""What happens around the trainer's steps: guard, history, plan success, stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tinyagent_fast.distributed import ALONE, Processes
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.interrupts import NAMES, STOP_SIGNALS
from tinyagent_fast.runs import Run
from tinyagent_fast.training.best import Best, Evaluation, best_in_history, why_better
from tinyagent_fast.training.trainer import refuse_non_finite

# The loss scaler starts at 2 ** 16 and halves: after so many steps in a row it has no way left.
_FP16_OVERFLOWS = 16
_DIVERGED_NATS = 2.0
"""No healthy run has a loss that far above its first one, at which nothing was learned yet."""
_DIVERGED_LOGS = 2


class StepGuard(TrainerCallback):  # type: ignore[misc]
    """Stops before the optimizer step when a gradient is not finite.

    In fp16 the loss scaler skips such a step itself and halves its scale until gradients fit; only
    when that does not help is training stopped.
    """

    def __init__(self) -> None:
        """Start with no overflow seen."""
        self.overflows = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Look at every gradient just before it is used.

        Raises:
            TrainingError: One is not finite.
        """
        import torch

        norms = [torch.linalg.vector_norm(p.grad) for p in model.parameters() if p.grad is not None]
        if not norms:
            return
        norm = torch.stack(norms).sum()
        self.overflows = 0 if bool(torch.isfinite(norm)) else self.overflows + 1
        if not args.fp16 or self.overflows > _FP16_OVERFLOWS:
            refuse_non_finite("gradient norm", norm, state.global_step + 1)


@dataclass(eq=False, kw_only=True)
class DivergenceGuard(TrainerCallback):  # type: ignore[misc]
    """Stops a run that has unlearned what its base could, instead of letting it go on for hours."""

    run: Run
    """Tells of the first loss, which a resumed run has made before."""
    _first: float | None = field(default=None, init=False)
    _above: int = field(default=0, init=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Compare the loss with the first one.

        Raises:
            TrainingError: It has been far above that twice in a row.
        """
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if self._first is None:
            steps = (record for record in self.run.history() if record.get("event") == "step")
            self._first = next((float(record["loss"]) for record in steps), loss)
        self._above = self._above + 1 if loss > self._first + _DIVERGED_NATS else 0
        if self._above == _DIVERGED_LOGS:
            norm = logs.get("grad_norm")
            raise TrainingError(
                f"the loss has risen from {self._first:.2f} to {loss:.2f} nats a token at "
                f"optimizer step {state.global_step}"
                + (f", with a gradient norm of {norm:g}" if norm else ""),
                "the run has diverged and would not come back: its steps are too large; the best "
                f"adapter before it is kept in {self.run.best}",
                f"start a new run with a lower --train.learning-rate than {args.learning_rate:g}, "
                f"or a smaller --train.max-grad-norm than {args.max_grad_norm:g}",
            )


@dataclass(eq=False, kw_only=True)
class PlanSuccess(TrainerCallback):  # type: ignore[misc]
    """Measures plan success every so many steps and keeps the best adapter outside rotation."""

    run: Run
    """Holds history and the best adapter."""
    measure: Callable[[int], Evaluation]
    """Measures the model as it stands at a step."""
    save: Callable[[Path, Best], None]
    """Saves the adapter into a folder with its best.json."""
    say: Callable[[str], None]
    every_steps: int
    """Optimizer steps between evaluations; the last step has one too."""
    patience: int | None
    """Evaluations without a better one after which training stops."""
    processes: Processes = ALONE
    """All measure; the main one records, saves and decides."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when it is time."""
        if state.global_step % self.every_steps and state.global_step != state.max_steps:
            return
        self.evaluate(state.global_step)
        if self.patience is not None and self.processes.on_main_process(self._patience_is_over):
            if self.processes.is_main_process:
                self.run.append_history({"event": "early stop", "step": state.global_step})
            control.should_training_stop = True
            control.should_save = True

    def evaluate(self, step: int) -> Evaluation:
        """Measure after so many optimizer steps, record, and keep the adapter if it is the best."""
        new = self.measure(step)
        if not self.processes.is_main_process:
            return new
        reason = why_better(new, best_in_history(self.run))
        better = reason is not None
        self.run.append_history({"event": "evaluation", **asdict(new), "best": better})
        if reason is not None:
            kept = Best(step=step, success=new.success, loss=new.loss, reason=reason)
            self.save(self.run.best, kept)
        self.say(new.line(best=better))
        return new

    def _patience_is_over(self) -> bool:
        best = best_in_history(self.run)
        since = -1 if best is None else best.step
        steps = {r["step"] for r in self.run.history() if r.get("event") == "evaluation"}
        return self.patience is not None and sum(step > since for step in steps) >= self.patience


@dataclass(eq=False, kw_only=True)
class History(TrainerCallback):  # type: ignore[misc]
    """Writes every logged step to history.jsonl, and says it with the time that is left."""

    run: Run
    tokens: Callable[[], Mapping[str, int]]
    """Counts of tokens so far, by name. The speed is that of `tokens_seen`; a record has what came
    of the others since the record before."""
    say: Callable[[str], None]
    processes: Processes = ALONE
    """Their tokens are added up; the main one writes."""

    def __post_init__(self) -> None:
        """Start with nothing counted."""
        self.last_time_s = 0.0
        self.last: dict[str, int] = {}
        self.first_step, self.first_time_s = -1, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.last = self._counted()
        self.last_time_s = time.perf_counter()

    def _counted(self) -> dict[str, int]:
        """Add up the tokens of all processes."""
        tokens = self.tokens()
        return dict(
            zip(tokens, map(int, self.processes.all_reduce_sum(*tokens.values())), strict=True)
        )

    def pause(self, seconds: float) -> None:
        """Leave time that was not spent on training out of tokens per second."""
        self.last_time_s += seconds
        self.first_time_s += seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record loss, learning rate, gradient norm and tokens per second."""
        if not logs or "loss" not in logs:
            return
        tokens, now = self._counted(), time.perf_counter()
        new = {name: count - self.last[name] for name, count in tokens.items()}
        record = {
            "event": "step",
            "step": state.global_step,
            "of": state.max_steps,
            "epoch": logs.get("epoch"),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "token_accuracy": logs.get("mean_token_accuracy"),
            "tokens_per_s": new.pop("tokens_seen") / max(1e-9, now - self.last_time_s),
            **new,
        }
        self.last_time_s, self.last = now, tokens
        if self.processes.is_main_process:
            self.run.append_history(record)
            self._say_step(record, now)

    def _say_step(self, record: Mapping[str, Any], now: float) -> None:
        left = ""
        if self.first_step < 0:
            self.first_step, self.first_time_s = record["step"], now
        done = record["step"] - self.first_step
        if done:
            seconds = (now - self.first_time_s) / done * (record["of"] - record["step"])
            left = f"  left {_duration(seconds)}"
        self.say(
            f"step {record['step']:>6}/{record['of']}  loss {record['loss']:.4f}  "
            f"lr {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} tokens/s{left}"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(eq=False)
class StepProgress(TrainerCallback):  # type: ignore[misc]
    """Tells how many optimizer steps are made, also between two that are logged."""

    update: Callable[[int, int], None]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the step."""
        self.update(state.global_step, state.max_steps)


@dataclass(eq=False, kw_only=True)
class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """Turns the first Ctrl-C or SIGTERM into a saved checkpoint at the end of the step."""

    say: Callable[[str], None]
    processes: Processes = ALONE
    """They stop after the same step, whichever heard of it first."""
    stopped_by: int = field(default=0, init=False)
    """The signal; 0 as long as there was none."""
    _previous: dict[int, Any] = field(default_factory=dict, init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen for the signals; only the main thread may. One that is ignored stays ignored."""
        with suppress(ValueError):
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        self.stopped_by = number
        self.say(f"{NAMES[number]}: saving a checkpoint after this step; once more stops at once")
        self._hand_back()

    def _hand_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if asked to."""
        if self.processes.any(bool(self.stopped_by)):
            self.stopped_by = self.stopped_by or signal.SIGTERM  # as another process was
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the signals back."""
        self._hand_back()
