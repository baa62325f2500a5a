"""What `gpu_check` measures of training, each a function that a measurement names."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gpu_check_inputs import exact_rows, prompts_of
from gpu_check_parts import memory, synchronize
from gpu_check_worker import Bench, Part, release

from tinyagent_fast.prompts.tokens import IGNORED


def train_shape(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Time single micro-batches of one exact shape through the project's trainer."""
    batch, tokens = item["arguments"]["batch"], item["arguments"]["tokens"]
    loaded = bench.loaded(item["model"])
    steps = Steps(bench.scale.warmup_steps, bench.scale.steps, bench.scale.steps_s)
    dataset = exact_rows(bench.rows(), batch, tokens, steps.warmup + steps.most + 1)
    train = replace(bench.config.train, batch=batch, accumulation=1, shared_prefix="off")
    return measure_training(bench, loaded, dataset, train, steps)


def train_rows(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Time optimizer steps of a whole recipe on the synthetic rows."""
    loaded = bench.loaded(item["model"])
    steps = Steps(bench.scale.warmup_steps, bench.scale.recipe_steps, bench.scale.recipe_s)
    train = bench.config.train
    if "shared_prefix" in item["arguments"]:
        train = replace(train, shared_prefix=item["arguments"]["shared_prefix"])
    else:
        # What is switched on by itself would be a second factor of these rows.
        train = replace(train, shared_prefix="off")
    if item["arguments"].get("packed"):
        train = replace(train, batching="packed", batch=1, accumulation=1)
        steps = replace(steps, most=bench.scale.steps)
    return measure_training(bench, loaded, bench.rows(), train, steps)


@dataclass(frozen=True)
class Steps:
    """How many optimizer steps are made: warm-up, then measured ones until time is up."""

    warmup: int
    most: int
    most_s: float


@dataclass
class _Clock:
    """Times of a training run's steps."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def measure_training(
    bench: Bench, loaded: Any, dataset: Any, train: Any, steps: Steps
) -> dict[str, Any]:
    """Train with the project's trainer and time each optimizer step.

    Args:
        bench: Shared things.
        loaded: The model.
        dataset: Rows with input_ids, labels and length.
        train: The recipe; its number of steps is replaced.
        steps: Warm-up and measured steps.

    Returns:
        Step times, rates after warm-up, losses and memory.
    """
    release(bench.cuda)
    # One step more than will be made: the trainer saves a checkpoint at its last step.
    train = replace(train, max_steps=steps.warmup + steps.most + 1)
    outcome = _train(bench, loaded, dataset, train, steps)
    if train.batching == "packed":
        outcome["samples_per_s"] = None  # a packed row holds several samples
    release(bench.cuda)
    return outcome


def _train(bench: Bench, loaded: Any, dataset: Any, train: Any, steps: Steps) -> dict[str, Any]:
    """Build the trainer and let it run; with this function's end nothing holds it any more."""
    before = memory(bench)["allocated_gib"]
    clock = _Clock()
    started = time.perf_counter()
    trainer = _trainer(bench, loaded, dataset, train)
    sharing = _share(trainer, loaded, dataset, train)
    built_s = time.perf_counter() - started
    predicted = predicted_gib(bench, loaded, dataset, train)

    def figures() -> dict[str, Any]:
        peaks = memory(bench)
        return {
            "batch": train.batch,
            "accumulation": train.accumulation,
            "before_gib": before,
            "trainer_s": round(built_s, 2),
            **rates(clock.seconds, clock.tokens, steps.warmup, train.batch * train.accumulation),
            **losses(trainer.state.log_history),
            **peaks,
            **sharing,
            "computed_share": round(trainer.tokens_computed / max(1, trainer.tokens_padded), 4),
            "predicted_gib": predicted,
            "predicted_over_measured": _relative(predicted, peaks["peak_reserved_gib"]),
        }

    trainer.add_callback(_stopper(bench, trainer, clock, steps, figures))
    trainer.train()
    return figures()


def _trainer(bench: Bench, loaded: Any, dataset: Any, train: Any) -> Any:
    """Build the project's trainer, so that it saves nothing."""
    from tinyagent_fast.training.trainer import build_trainer

    return build_trainer(
        loaded,
        dataset,
        train,
        max_length_tokens=bench.config.model.max_length_tokens,
        output_dir=bench.work / "checkpoints",
        save_every_steps=10**6,
    )


def _share(trainer: Any, loaded: Any, dataset: Any, train: Any) -> dict[str, Any]:
    """Let the trainer share prefixes as a run does, if the recipe says so."""
    from tinyagent_fast.shared_prefix.training import (
        PackingCollator,
        decide_shared_prefix,
        prefix_order,
    )

    decision = decide_shared_prefix(loaded, train, dataset, None)
    if decision.on:
        trainer.layer_checkpointing = loaded.model.get_base_model().is_gradient_checkpointing
        trainer.data_collator = PackingCollator(trainer.data_collator)
        trainer.order = prefix_order(dataset, train)
    return {"shared_prefix": decision.on, "sharing": decision.sentence()}


def predicted_gib(bench: Bench, loaded: Any, dataset: Any, train: Any) -> float:
    """Ask the project's memory planner for the peak of the longest micro-batch.

    Args:
        bench: The base, the config and the cap.
        loaded: The model, which says what backend it has.
        dataset: The rows.
        train: Batch, batching and shared prefixes.

    Returns:
        GiB, an estimate.
    """
    from tinyagent_fast.models.families import ModelShape
    from tinyagent_fast.shared_prefix.packing import pack
    from tinyagent_fast.training.memory import MemoryEstimator, RowLengths

    raw = json.loads((bench.base / "config.json").read_text(encoding="utf-8"))
    batch = train.rows_per_batch
    lengths = list(dataset["length"])
    longest = sorted(range(len(lengths)), key=lambda index: -lengths[index])[:batch]
    rows = [dataset[index] for index in longest]
    supervised = sum(label != IGNORED for row in rows for label in row["labels"])
    estimator = MemoryEstimator(
        config=replace(bench.config, train=train),
        shape=ModelShape.from_config(raw),
        lengths=RowLengths(
            rows=len(rows),
            mean_tokens=sum(lengths[index] for index in longest) / batch,
            longest_tokens=lengths[longest[0]],
            supervised_tokens=supervised / batch,
        ),
        backend=loaded.backend,
        usable_gib=bench.job["cap_gib"] or math.inf,
    )
    computed = pack(rows).computed_tokens if train.shared_prefix == "on" else None
    prediction = estimator.estimate(computed_tokens=computed)
    return round(prediction.total_gib, 3)


def _relative(predicted: float, measured: float | None) -> float | None:
    return None if measured is None else round(predicted / measured, 4)


def _stopper(bench: Bench, trainer: Any, clock: _Clock, steps: Steps, figures: Any) -> Any:
    """Make the callback that times steps and stops the trainer."""
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):  # type: ignore[misc]
        last_s = 0.0
        last_tokens = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize(bench)
            self.last_s, self.last_tokens = time.perf_counter(), trainer.tokens_seen

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize(bench)
            now = time.perf_counter()
            clock.seconds.append(now - self.last_s)
            clock.tokens.append(trainer.tokens_seen - self.last_tokens)
            measured = clock.seconds[steps.warmup :]
            enough = len(measured) >= 2 and sum(measured) >= steps.most_s
            if enough or len(measured) >= steps.most:
                control.should_training_stop = True
            bench.partial(figures())
            self.last_s, self.last_tokens = time.perf_counter(), trainer.tokens_seen

    return Stopper()


def rates(
    seconds: list[float], tokens: list[int], warmup: int, rows_per_step: int
) -> dict[str, Any]:
    """Turn step times into rates, leaving the warm-up out.

    Args:
        seconds: Of each step, from the first.
        tokens: Tokens without padding of each step.
        warmup: Steps to leave out.
        rows_per_step: Rows of an optimizer step.

    Returns:
        Times and rates; none for what no measured step stands behind.
    """
    measured, counted = seconds[warmup:], tokens[warmup:]
    total = sum(measured)
    return {
        "step_s": [round(s, 4) for s in seconds],
        "first_step_s": round(seconds[0], 3) if seconds else None,
        "measured_steps": len(measured),
        "median_step_s": round(statistics.median(measured), 4) if measured else None,
        "tokens_per_s": round(sum(counted) / total, 1) if measured else None,
        "tokens_per_step": round(sum(counted) / len(counted), 1) if measured else None,
        "samples_per_s": round(rows_per_step * len(measured) / total, 3) if measured else None,
    }


def losses(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Read the losses that the trainer logged and judge them.

    Args:
        history: The trainer's log.

    Returns:
        Losses and whether they are finite and do not rise by more than a twentieth.
    """
    values = [float(entry["loss"]) for entry in history if "loss" in entry]
    plausible = None
    if values:
        plausible = all(map(math.isfinite, values)) and values[-1] <= 1.05 * values[0]
    return {"losses": [round(v, 4) for v in values], "loss_plausible": plausible}


def preflight(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Run the project's own checks before a run, as `train` does."""
    from tinyagent_fast.training.preflight import preflight as project_preflight

    loaded, dataset = bench.loaded(item["model"]), bench.rows()
    release(bench.cuda)
    trainer = _trainer(bench, loaded, dataset, replace(bench.config.train, max_steps=2))
    prompts = prompts_of(dataset, bench.scale)
    started = time.perf_counter()
    report = project_preflight(trainer, loaded, dataset, prompts, bench.config.eval.batch)
    seconds = round(time.perf_counter() - started, 2)
    return {"preflight_s": seconds, "report": asdict(report), **memory(bench)}


PARTS: Mapping[str, Part] = {
    "train_shape": train_shape,
    "train_rows": train_rows,
    "preflight": preflight,
}
"""Every function by the kind that a measurement names."""
