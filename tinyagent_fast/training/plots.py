"""The picture of a run: loss and plan success over the steps."""

from __future__ import annotations

from pathlib import Path

from tinyagent_fast.runs import Run


def plot_training(run: Run) -> Path:
    """Draw loss and plan success from history.jsonl into `training.png`, and give its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history = run.history()
    steps = [r for r in history if r.get("event") == "step"]
    evaluations = [r for r in history if r.get("event") == "evaluation"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training")
    if evaluations:
        x = [r["step"] for r in evaluations]
        left.plot(x, [r["loss"] for r in evaluations], "o-", label="validation")
        right.plot(x, [100 * r["success"] for r in evaluations], "o-", label="success")
        right.plot(x, [100 * r["success_dag"] for r in evaluations], "--", label="success_dag")
        best = [r for r in evaluations if r["best"]][-1:]
        for record in best:
            right.plot(record["step"], 100 * record["success"], "*", markersize=15, label="best")
        right.legend(loc="lower right")
    left.set(xlabel="optimizer step", ylabel="loss (nats per completion token)", yscale="log")
    left.set_title("Loss")
    left.legend()
    right.set(xlabel="optimizer step", ylabel="plan success, %", ylim=(0, 100))
    right.set_title(f"Plan success on {evaluations[0]['samples'] if evaluations else 0} queries")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    path = run.path / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
