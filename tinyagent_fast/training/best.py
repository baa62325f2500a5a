"""Which adapter of a run is the best one, by plan success, and how it is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import reading
from tinyagent_fast.runs import ADAPTER_WEIGHTS, Run, read_json


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One measurement on the validation sample during training."""

    step: int
    success: float
    success_dag: float
    loss: float
    samples: int
    seconds: float

    def line(self, *, best: bool) -> str:
        """Say what was measured, and whether it is the best so far."""
        mark = "  <- best" if best else ""
        return (
            f"step {self.step:>6}  plan success {100 * self.success:.1f} % on {self.samples} "
            f"validation queries, loss {self.loss:.4f} ({self.seconds:.1f} s){mark}"
        )


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best evaluation so far and why it is the best; written to best/best.json."""

    step: int
    success: float
    loss: float
    reason: str


def why_better(new: Evaluation, best: Evaluation | None) -> str | None:
    """Decide whether an evaluation beats the best one: by success, ties by loss; NaN never wins.

    One of more queries beats one of fewer, as the small sample before the first step is.

    Returns:
        Why it is better; None if it is not.
    """
    if math.isnan(new.loss) or math.isnan(new.success):
        return None
    if best is None:
        return "first evaluation"
    if new.samples != best.samples:
        first = new.samples > best.samples
        return f"first evaluation of {new.samples} queries, not {best.samples}" if first else None
    if new.success > best.success:
        return f"success {new.success:.4f} higher than {best.success:.4f} at step {best.step}"
    if new.success == best.success and new.loss < best.loss:
        return (
            f"equal success {new.success:.4f}, loss {new.loss:.4f} lower than {best.loss:.4f} "
            f"at step {best.step}"
        )
    return None


def best_in_history(run: Run) -> Evaluation | None:
    """Find the best evaluation that history.jsonl tells of, which holds for a resumed run too.

    best/ may be ahead of it: a run that was killed had measured steps behind its last checkpoint.
    """
    names = {field.name for field in fields(Evaluation)}
    for record in reversed(run.history()):
        if record.get("event") == "evaluation" and record.get("best"):
            return Evaluation(**{name: record[name] for name in names})
    return None


def read_best(run: Run) -> Best | None:
    """Read a run's best/best.json; None if no evaluation was made."""
    path = run.best / "best.json"
    if not path.exists():
        return None
    names = [field.name for field in fields(Best)]
    record = read_json(path, *names)
    return Best(**{name: record[name] for name in names})


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Put saved adapter weights back into a PEFT model that has the same adapter.

    Raises:
        ModelError: The file is damaged, or of another adapter.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from tinyagent_fast.models.loading import check_adapter

    check_adapter(model, folder)
    with reading(f"adapter {folder}", "let it be copied or trained again"):
        set_peft_model_state_dict(model, load_file(str(folder / ADAPTER_WEIGHTS)))
