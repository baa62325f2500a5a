"""`memory`: memory and hours of a config on a card, before one is rented, or on this machine.

Needs neither GPU nor torch: everything is estimated from shapes.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tinyagent_fast.commands.config_flags import parser_of, resolve_config
from tinyagent_fast.display import Display
from tinyagent_fast.errors import ConfigError, count_of
from tinyagent_fast.training.memory import (
    LIBRARIES_GIB,
    RESERVE_GIB,
    MemoryEstimator,
    base_shape,
    preset_batch,
    row_lengths,
)

if TYPE_CHECKING:
    from tinyagent_fast.config import Config, Weights
    from tinyagent_fast.training.memory import BatchChoice

_BATCHES = (1, 2, 4, 8, 16)
_WEIGHTS: tuple[Weights, ...] = ("nf4", "bf16")
_NAMES = {"false": "off", "true": "true", "unsloth": "unsloth", "auto": "auto"}
_MARKS = {"fits": ("", "green"), "perhaps": (" ?", "yellow"), "no": (" x", "red")}
_REACHED = (0.85, 0.70)
"""Shares of a matmul rate between which good training kernels lie, the best first."""


_CARDS = {"t4": (14.6, 24), "l4": (22.16, 57), "a100": (40.0, 265)}
"""GiB that torch sees of a card, and the TFLOP/s of matrix products that it sustains.

Source: L4: torch-performance-test-data issue 120 (54.9-59.4 TFLOP/s on large products, against
121 in its data sheet). T4: developer forum of its maker, 24 of 65. A100: stas00/ml-engineering
and the same data, 265-271; its memory is the nominal one of the 40 GB card.
"""


def run(arguments: Sequence[str]) -> int:
    """Estimate memory and hours; gives 0, also where nothing fits: the table says so."""
    flags, rest = _flags(arguments)
    config = resolve_config("memory", rest, lambda: _preset_for(flags), more_flags=_FLAGS_HELP)
    memory_gib, usable_gib, tflops = _machine(flags, config)
    # `auto` is what it is on a machine with a GPU that was set up by the Makefile.
    backend = "unsloth" if config.model.backend == "auto" else config.model.backend
    backend = "transformers" if config.train.qat != "off" else backend
    given = flags.lengths and _two_lengths(flags.lengths)
    lengths, counted = row_lengths(config, given, Display(Console(stderr=True)).bar)
    estimator = MemoryEstimator(
        config=config,
        shape=base_shape(config.model.base),
        lengths=lengths,
        backend=backend,
        usable_gib=usable_gib,
    )
    found = estimator.recommend()
    answer = {
        "base": config.model.base,
        "shape": asdict(estimator.shape),
        "backend": estimator.backend,
        "gpu_gib": None if tflops is None else memory_gib,
        "memory_gib": memory_gib,
        "usable_gib": estimator.usable_gib,
        "lengths": {**asdict(lengths), "source": counted},
        "row_tokens": estimator.row_tokens,
        "predictions": _every_estimate(
            estimator, _WEIGHTS if tflops is not None else (config.model.weights,)
        ),
        "recommendation": {
            "batch": found.batch,
            "accumulation": found.accumulation,
            "row_tokens": estimator.row_tokens,
            "checkpointing": _NAMES[found.checkpointing],
            "total_gib": round(found.estimate.total_gib, 3),
            "fits": found.fits,
            "command": _command(rest, config, found),
        },
        "tflops": tflops,
        "hours_per_epoch": {
            _NAMES[how]: _hours(estimator.flops_per_epoch(how), tflops)
            for how in estimator.checkpointings
        },
        "preset": _as_asked(estimator, tflops),
        **({"dry_run": _dry_run(estimator)} if flags.dry_run else {}),
    }
    print(json.dumps(answer, indent=2)) if flags.json else _show(answer, config)
    return 0


_FLAGS_HELP = (
    "Without --preset it is that of --card, else l4 (the defaults shown are those of cpu). "
    "--card l4|t4|a100 or --gpu-gib GIB names the memory, --tflops N what the card sustains, "
    "--lengths MEAN,LONGEST the tokens of the rows, --dry-run counts the memory of a training step "
    "on tensors without content (needs torch, no GPU), --json prints JSON."
)


def _flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = parser_of("memory")
    parser.add_argument("--card", choices=sorted(_CARDS))
    parser.add_argument("--gpu-gib", type=float)
    parser.add_argument("--tflops", type=float)
    parser.add_argument("--lengths")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    flags, rest = parser.parse_known_args(list(arguments))
    for name, value in (("--gpu-gib", flags.gpu_gib), ("--tflops", flags.tflops)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value}", "it must be more than 0", "give a number")
    if flags.card and flags.gpu_gib:
        raise ConfigError(
            f"--card {flags.card} and --gpu-gib {flags.gpu_gib}",
            "both name the memory",
            "give one of them",
        )
    return flags, rest


def _machine(flags: argparse.Namespace, config: Config) -> tuple[float, float, float | None]:
    """Give a machine's memory, what can be used of it, in GiB, and the TFLOP/s of its products.

    That of a GPU, unless no card is named and the weights are in fp32, as only the presets without
    a GPU have them: then this machine's, whose speed nobody knows beforehand.
    """
    named = flags.card or flags.gpu_gib or flags.tflops or config.preset in _CARDS
    if not named and config.model.weights == "fp32":
        from tinyagent_fast.doctor import main_memory_gib

        memory_gib, available_gib = main_memory_gib()
        if memory_gib is not None and available_gib is not None:
            return memory_gib, available_gib - LIBRARIES_GIB, None
    gpu_gib, tflops = _CARDS[flags.card or (config.preset if config.preset in _CARDS else "l4")]
    gpu_gib = flags.gpu_gib or gpu_gib
    return gpu_gib, gpu_gib - RESERVE_GIB, flags.tflops or tflops


def _hours(flops: float, tflops: float | None) -> list[float] | None:
    """Give the least and the most hours; None where the speed is not known."""
    if tflops is None:
        return None
    return [float(f"{flops / (tflops * share * 3.6e15):.3g}") for share in _REACHED]


def _range(least: float, most: float) -> str:
    """Write hours for people: in minutes where they are few."""
    if most < 0.1:
        return f"{60 * least:.2g}-{60 * most:.2g} minutes"
    return f"{least:g}-{most:g} hours"


def _as_asked(estimator: MemoryEstimator, tflops: float | None) -> dict[str, Any]:
    """Estimate the config as it was asked for, for all of its steps."""
    config, batch = estimator.config, preset_batch(estimator.config)
    how = config.model.gradient_checkpointing
    estimate, flops = estimator.estimate(batch), estimator.flops_per_epoch(how)
    return {
        "batch": batch,
        "checkpointing": _NAMES[how],
        "shared_prefixes": estimator.shares_prefixes,
        "mean_micro_batch_tokens": estimator.computed_tokens(batch, estimator.lengths.mean_tokens),
        "longest_micro_batch_tokens": estimator.computed_tokens(batch),
        "kept_micro_batch_tokens": estimator.kept_tokens(batch),
        "total_gib": round(estimate.total_gib, 3),
        "fits": estimate.fits(estimator.usable_gib),
        "epochs": round(estimator.passes, 3),
        "hours": _hours(estimator.passes * flops, tflops),
    }


def _dry_run(estimator: MemoryEstimator) -> dict[str, Any]:
    """Count a micro-batch of the longest rows, and estimate the same.

    What Unsloth computes by its own forward, and what it would where it is not installed, is
    counted on the transformers path.
    """
    from tinyagent_fast.training.dry_run import dry_run
    from tinyagent_fast.training.unsloth_dry_run import can_count, dry_runs_by_unsloth

    batch, how = preset_batch(estimator.config), estimator.config.model.gradient_checkpointing
    by_unsloth = estimator.backend == "unsloth" and estimator.shares_prefixes and can_count()
    counted = estimator if by_unsloth else replace(estimator, backend="transformers")
    if how == "auto":
        kept = counted.kept_tokens(batch)  # micro-batches are cut to it
        fits = [rows for rows in range(1, batch + 1) if counted.computed_tokens(rows) <= kept]
        batch, how = (fits[-1], "false") if fits else (1, "true")
    how = "true" if how == "unsloth" else how
    with Display(Console(stderr=True)).working("memory --dry-run"):
        got = (
            dry_runs_by_unsloth([(counted, batch, how)])[0]
            if by_unsloth
            else dry_run(counted, batch, how)
        )
    expected = counted.estimate(batch, how)
    return {
        "backend": counted.backend,
        "batch": batch,
        "checkpointing": _NAMES[how],
        **{name: round(value, 3) for name, value in asdict(got).items()},
        "estimated_gib": round(expected.activations_gib + expected.logits_gib, 3),
        "weights_and_optimizer_gib": round(
            expected.weights_gib + expected.adapter_and_optimizer_gib, 3
        ),
    }


def _preset_for(flags: argparse.Namespace) -> str:
    """Take the preset of the card, or of a card with as much memory."""
    from tinyagent_fast.presets import preset_of_card

    if flags.gpu_gib is None:
        return flags.card or "l4"
    return preset_of_card(flags.gpu_gib, capability_major=8)


def _two_lengths(given: str) -> tuple[int, int]:
    try:
        mean, longest = (int(word) for word in given.split(","))
    except ValueError:
        mean = longest = 0
    if not 0 < mean <= longest:
        raise ConfigError(
            f"--lengths {given}",
            "it must be two whole numbers, the mean and the longest",
            "such as --lengths 3490,4608",
        )
    return mean, longest


def _every_estimate(
    estimator: MemoryEstimator, every_weights: Sequence[Weights]
) -> list[dict[str, Any]]:
    """Estimate each batch with each kind of weights and checkpointing."""
    rows = []
    for weights in every_weights:
        model = replace(estimator.config.model, weights=weights)
        of_weights = replace(estimator, config=replace(estimator.config, model=model))
        for how in estimator.checkpointings:
            for batch in _BATCHES:
                got = of_weights.estimate(batch, how)
                parts = {name: round(gib, 3) for name, gib in asdict(got).items()}
                perhaps = got.fits(estimator.usable_gib, error_share=0.0)
                unless = "perhaps" if perhaps else "no"
                fits = "fits" if got.fits(estimator.usable_gib) else unless
                row = {"batch": batch, "weights": weights, "checkpointing": _NAMES[how], **parts}
                rows.append({**row, "total_gib": round(got.total_gib, 3), "fits": fits})
    return rows


def _command(rest: Sequence[str], config: Config, found: BatchChoice) -> str:
    """Write the command that trains so: what was given, and the recommended flags."""
    ours = {
        "--train.batch": str(found.batch),
        "--train.accumulation": str(found.accumulation),
        "--model.gradient-checkpointing": found.checkpointing,
    }
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*ours, "--model.gradient_checkpointing"):
        given.add_argument(name)
    _, words = given.parse_known_args(list(rest))
    if not any(word.partition("=")[0] in ("--preset", "--config") for word in words):
        words = ["--preset", config.preset, *words]
    for name, value in ours.items():
        words += [name, value]
    return f"tinyagent-fast train {shlex.join(words)}"


def _show(answer: dict[str, Any], config: Config) -> None:
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    usable, lengths = answer["usable_gib"], answer["lengths"]
    columns: dict[tuple[str, str], dict[int, Text]] = {}
    for row in answer["predictions"]:
        mark, style = _MARKS[row["fits"]]
        cells = columns.setdefault((row["weights"], row["checkpointing"]), {})
        cells[row["batch"]] = Text(f"{row['total_gib']:.1f}{mark}", style)
    table = Table(title=f"GiB of a micro-batch of rows of {answer['row_tokens']:,} tokens")
    table.add_column("rows", justify="right")
    for weights, checkpointing in columns:
        table.add_column(f"{weights}\n{checkpointing}", justify="right")
    for batch in _BATCHES:
        table.add_row(str(batch), *(cells[batch] for cells in columns.values()))
    lines = [
        f"{answer['base']} with LoRA r {config.lora.rank} ({config.lora.targets}), backend "
        f"{answer['backend']}, {usable:.1f} of {answer['memory_gib']:.1f} GiB usable"
        + (" on this machine, without a GPU" * (answer["gpu_gib"] is None)),
        f"rows: {lengths['rows']:,}, mean {lengths['mean_tokens']:,.0f} tokens, longest "
        f"{lengths['longest_tokens']:,} ({lengths['source']})",
        "estimates from shapes, good to 15-20 %, not measured on this "
        + ("machine" if answer["gpu_gib"] is None else "card"),
    ]
    if config.train.qat != "off":
        lines.append("what quantisation-aware training keeps besides is not counted")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    console.print(table)
    console.print(
        "columns: weights, and gradient checkpointing off, true or unsloth (offloaded)\n"
        "x does not fit; ? would fit only if the estimate is not too low",
        markup=False,
    )
    console.print("\n".join(_advice(answer, config)), markup=False, soft_wrap=True)


def _advice(answer: dict[str, Any], config: Config) -> list[str]:
    found = answer["recommendation"]
    asked = answer["preset"]
    hours = ""
    if asked["hours"] is not None:
        steps = "" if config.train.max_steps is None else f"{config.train.max_steps:,} steps, "
        hours = f", {_range(*asked['hours'])} for {steps}"
        hours += count_of(asked["epochs"], "epoch")
    lines = [
        "",
        f"as it is: {asked['batch']} x {config.train.accumulation} rows, checkpointing "
        f"{asked['checkpointing']}, {asked['total_gib']:.1f} GiB{hours}"
        + (
            f"; micro-batches of {asked['mean_micro_batch_tokens']:,} tokens on average, and up to "
            f"{asked['kept_micro_batch_tokens']:,} without computing layers again"
            if asked["shared_prefixes"]
            else ""
        ),
        f"recommended: {found['batch']} x {found['accumulation']} rows, checkpointing "
        f"{found['checkpointing']}, {config.model.weights}: {found['total_gib']:.1f} GiB",
        f"  {found['command']}",
    ]
    if not found["fits"]:
        lines[2:] = [
            f"not even one row fits for certain: {found['total_gib']:.1f} GiB; take a card with "
            "more memory, --model.weights nf4, or shorter rows (--model.max-length-tokens with "
            "--data.over-long drop)"
        ]
    if answer["tflops"] is None:
        lines.append("hours are not predicted for a CPU; the first steps of a training tell them")
    else:
        hours = ", ".join(
            f"{_range(*both)} with checkpointing {how}"
            for how, both in answer["hours_per_epoch"].items()
        )
        lines.append(
            f"time per epoch at {100 * _REACHED[1]:.0f}-{100 * _REACHED[0]:.0f} % of "
            f"{answer['tflops']:g} TFLOP/s: {hours}"
        )
    if counted := answer.get("dry_run"):
        lines.append(
            f"dry run of {counted['batch']} of the longest rows, {counted['computed_tokens']:,} "
            f"tokens, {counted['backend']}, checkpointing {counted['checkpointing']}: "
            f"{counted['peak_gib']:.2f} GiB counted, {counted['estimated_gib']:.2f} estimated; "
            f"weights, adapter and optimizer {counted['weights_and_optimizer_gib']:.2f} GiB apart "
            f"(counted in a dry run in {counted['duration_s']:.1f} s)"
        )
    return lines
