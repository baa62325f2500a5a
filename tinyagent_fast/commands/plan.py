"""`plan`: memory and hours of a config on a card, before one is rented.

Needs neither GPU nor torch: everything is predicted from shapes, so all figures are estimates.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tinyagent_fast.commands.config_flags import resolve_config
from tinyagent_fast.errors import ConfigError

if TYPE_CHECKING:
    from tinyagent_fast.config import Checkpointing, Config, Weights
    from tinyagent_fast.training.footprint import MemoryPrediction
    from tinyagent_fast.training.sizing import Forecast, Recommendation

_BATCHES = (1, 2, 4, 8, 16)
_WEIGHTS: tuple[Weights, ...] = ("nf4", "bf16")
_NAMES = {"false": "off", "true": "true", "unsloth": "unsloth"}
_MARKS = {"fits": "", "perhaps": " ?", "no": " x"}
_STYLES = {"fits": "green", "perhaps": "yellow", "no": "red"}
_REACHED = (0.70, 0.85)
"""Share of a matmul rate that good training kernels reach."""


@dataclass(frozen=True)
class _Card:
    """What torch sees of a card's memory, and the matrix products that it sustains.

    Source: L4: torch-performance-test-data issue 120 (54.9-59.4 TFLOP/s on large products, against
    121 in its data sheet). T4: developer forum of its maker, 24 of 65. A100: stas00/ml-engineering
    and the same data, 265-271; its memory is the nominal one of the 40 GB card.
    """

    gib: float
    tflops: float


_CARDS = {"t4": _Card(14.6, 24), "l4": _Card(22.16, 57), "a100": _Card(40.0, 265)}


def run(arguments: Sequence[str]) -> int:
    """Predict memory and hours.

    Args:
        arguments: Flags of the command: those of `train`, and what describes card and rows.

    Returns:
        0, also where nothing fits: the table says so.
    """
    flags, rest = _flags(arguments)
    config = resolve_config("plan", rest, lambda: _preset_for(flags), more_flags=_FLAGS_HELP)
    from tinyagent_fast.training.footprint import RESERVE_GIB
    from tinyagent_fast.training.planning import base_shape, row_lengths
    from tinyagent_fast.training.sizing import Forecast, recommend

    card = _card(flags, config)
    lengths, counted = row_lengths(config, flags.lengths)
    forecast = Forecast(
        config=config,
        shape=base_shape(config.model.base),
        lengths=lengths,
        backend=_backend(config),
        usable_gib=card.gib - RESERVE_GIB,
    )
    found = recommend(forecast)
    answer = {
        "base": config.model.base,
        "shape": asdict(forecast.shape),
        "backend": forecast.backend,
        "gpu_gib": card.gib,
        "usable_gib": forecast.usable_gib,
        "lengths": {**asdict(lengths), "source": counted},
        "row_tokens": forecast.row_tokens,
        "predictions": _predictions(forecast),
        "recommendation": _recommended(found, _command(rest, config, found)),
        "tflops": card.tflops,
        "hours_per_epoch": {
            _NAMES[how]: _hours(forecast, how, card.tflops) for how in _checkpointings(forecast)
        },
    }
    print(json.dumps(answer, indent=2)) if flags.json else _show(answer, config)
    return 0


_FLAGS_HELP = (
    "--card l4|t4|a100 or --gpu-gib GIB names the memory, --tflops N what the card sustains, "
    "--lengths MEAN,LONGEST the tokens of the rows, --json prints JSON."
)


def _flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="tinyagent-fast plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--card", choices=sorted(_CARDS))
    parser.add_argument("--gpu-gib", type=float)
    parser.add_argument("--tflops", type=float)
    parser.add_argument("--lengths")
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


def _preset_for(flags: argparse.Namespace) -> str:
    """Take the preset of the card, or of a card with as much memory."""
    if flags.gpu_gib is None:
        return flags.card or "l4"
    return "t4" if flags.gpu_gib < 18 else "l4" if flags.gpu_gib < 36 else "a100"


def _card(flags: argparse.Namespace, config: Config) -> _Card:
    card = _CARDS[flags.card or (config.preset if config.preset in _CARDS else "l4")]
    if flags.gpu_gib is not None:
        card = replace(card, gib=flags.gpu_gib)
    return card if flags.tflops is None else replace(card, tflops=flags.tflops)


def _backend(config: Config) -> str:
    """Take `auto` for what it is on a machine with a GPU that was set up by the Makefile."""
    if config.train.qat != "off":
        return "transformers"
    return "unsloth" if config.model.backend == "auto" else config.model.backend


def _checkpointings(forecast: Forecast) -> tuple[Checkpointing, ...]:
    return ("false", "true", "unsloth") if forecast.backend == "unsloth" else ("false", "true")


def _predictions(forecast: Forecast) -> list[dict[str, Any]]:
    rows = []
    for weights in _WEIGHTS:
        model = replace(forecast.config.model, weights=weights)
        of_weights = replace(forecast, config=replace(forecast.config, model=model))
        for how in _checkpointings(forecast):
            for batch in _BATCHES:
                got = of_weights.predict(batch, how)
                sizes = {"batch": batch, "weights": weights, "checkpointing": _NAMES[how]}
                rows.append({**sizes, **_parts(got), "fits": _verdict(got, forecast.usable_gib)})
    return rows


def _parts(got: MemoryPrediction) -> dict[str, float]:
    parts = {name: round(value, 3) for name, value in asdict(got).items()}
    return {**parts, "total_gib": round(got.total_gib, 3)}


def _verdict(got: MemoryPrediction, usable_gib: float) -> str:
    if got.fits(usable_gib):
        return "fits"
    return "perhaps" if got.fits(usable_gib, error_share=0.0) else "no"


def _recommended(found: Recommendation, command: str) -> dict[str, Any]:
    return {
        "batch": found.batch,
        "accumulation": found.accumulation,
        "row_tokens": found.row_tokens,
        "checkpointing": _NAMES[found.checkpointing],
        "total_gib": round(found.prediction.total_gib, 3),
        "fits": found.fits,
        "command": command,
    }


def _command(rest: Sequence[str], config: Config, found: Recommendation) -> str:
    """Write the command that trains so: what was given, and the recommended flags."""
    ours = {
        "--train.batch": str(found.batch),
        "--train.accumulation": str(found.accumulation),
        "--model.gradient-checkpointing": found.checkpointing,
    }
    words = []
    skip = False
    for word in rest:
        name = word.partition("=")[0].replace("_", "-")
        if name in ours:
            skip = "=" not in word
        elif not skip:
            words.append(word)
        else:
            skip = False
    if not any(word.partition("=")[0] in ("--preset", "--config") for word in words):
        words = ["--preset", config.preset, *words]
    for name, value in ours.items():
        words += [name, value]
    return f"tinyagent-fast train {shlex.join(words)}"


def _hours(forecast: Forecast, how: Checkpointing, tflops: float) -> list[float]:
    """Give the hours of an epoch at the best and the worst share of the card's rate."""
    from tinyagent_fast.training.footprint import hours_per_epoch, step_flops

    lengths = forecast.lengths
    tokens = lengths.rows * lengths.mean_tokens
    supervised = lengths.rows * lengths.supervised_tokens
    flops = step_flops(
        forecast.shape,
        forecast.config.lora,
        tokens=tokens,
        row_tokens=lengths.mean_tokens,
        head_tokens=tokens if forecast.backend == "unsloth" else supervised,
        checkpointing=how,
    )
    return [round(hours_per_epoch(flops, tflops * share), 2) for share in reversed(_REACHED)]


def _show(answer: dict[str, Any], config: Config) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    usable, lengths = answer["usable_gib"], answer["lengths"]
    columns: dict[tuple[str, str], dict[int, Text]] = {}
    for row in answer["predictions"]:
        cell = Text(f"{row['total_gib']:.1f}{_MARKS[row['fits']]}", _STYLES[row["fits"]])
        columns.setdefault((row["weights"], row["checkpointing"]), {})[row["batch"]] = cell
    table = Table(title=f"GiB of a micro-batch of rows of {answer['row_tokens']:,} tokens")
    table.add_column("rows", justify="right")
    for weights, checkpointing in columns:
        table.add_column(f"{weights}\n{checkpointing}", justify="right")
    for batch in _BATCHES:
        table.add_row(str(batch), *(cells[batch] for cells in columns.values()))
    lines = [
        f"{answer['base']} with LoRA r {config.lora.rank} ({config.lora.targets}), backend "
        f"{answer['backend']}, {usable:.1f} of {answer['gpu_gib']:.1f} GiB usable",
        f"rows: {lengths['rows']:,}, mean {lengths['mean_tokens']:,.0f} tokens, longest "
        f"{lengths['longest_tokens']:,} ({lengths['source']})",
        "estimates from shapes, good to 15-20 %, not measured on this card",
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
    lines = [""]
    if found["fits"]:
        lines.append(
            f"recommended: {found['batch']} x {found['accumulation']} rows, checkpointing "
            f"{found['checkpointing']}, {config.model.weights}: {found['total_gib']:.1f} GiB"
        )
        lines.append(f"  {found['command']}")
    else:
        lines.append(
            f"not even one row fits for certain: {found['total_gib']:.1f} GiB; take a card with "
            "more memory, --model.weights nf4, or shorter rows (--model.max-length-tokens with "
            "--data.over-long drop)"
        )
    hours = ", ".join(
        f"{best:.1f}-{worst:.1f} with checkpointing {how}"
        for how, (best, worst) in answer["hours_per_epoch"].items()
    )
    lines.append(
        f"hours per epoch at {100 * _REACHED[0]:.0f}-{100 * _REACHED[1]:.0f} % of "
        f"{answer['tflops']:g} TFLOP/s: {hours}"
    )
    if config.train.epochs != 1 and config.train.max_steps is None:
        lines.append(f"this config makes {config.train.epochs:g} epochs")
    return lines
