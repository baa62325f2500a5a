"""The results of `gpu_check`: one JSON file that is whole at any time, ratios, a table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_check_plan import DECODING, L4_TRAINING, SHARING, Measurement, Scale

_COLUMNS = (
    "samples_per_s",
    "tokens_per_s",
    "median_step_s",
    "first_step_s",
    "peak_reserved_gib",
    "peak_allocated_gib",
    "predicted_gib",
    "predicted_over_measured",
    "shared_prefix",
    "computed_share",
    "plans_per_s",
    "load_s",
    "fused_layers",
    "tflop_per_s_4096",
    "tflop_per_s_8192",
    "plans_per_s_batch_1",
    "plans_per_s_batch_16",
    "plans_per_s_batch_32",
    "loss_relative_difference",
    "gradient_cosine",
    "padded_pair_relative_difference",
    "masked_loss_relative_difference",
    "reproduced",
    "reproduced_of",
    "preflight_s",
    "passed",
    "failed",
    "skipped",
    "loss_plausible",
    "mean_tokens",
    "longest_tokens",
)


class Results:
    """The one JSON file; it is replaced as a whole after every change."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Start the file.

        Args:
            path: Target.
            head: What is known before the first measurement.
        """
        self.path = path
        self.measurements: dict[str, dict[str, Any]] = {}
        self.head = dict(head)
        self.write()

    def record(self, item: Measurement, **changes: Any) -> None:
        """Set fields of a measurement's result and write the file.

        Args:
            item: The measurement.
            **changes: status, reason, figures, seconds, log.
        """
        entry = self.measurements.setdefault(
            item.name,
            {
                "status": None,
                "reason": None,
                "figures": None,
                "seconds": None,
                "kind": item.kind,
                "model": asdict(item.model) if item.model else None,
                "environment": {},
                "arguments": dict(item.arguments),
            },
        )
        entry.update(changes)
        self.write()

    def ok(self, name: str) -> bool:
        """Tell whether a measurement succeeded.

        Args:
            name: Its name.

        Returns:
            Whether it did.
        """
        return self.measurements.get(name, {}).get("status") == "ok"

    def write(self) -> None:
        """Replace the file; a full disk is no reason to measure nothing more."""
        content = finite({**self.head, "measurements": self.measurements})
        temporary = self.path.with_name(f".{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            print(f"cannot write {self.path}: {error}")


def finite(value: Any) -> Any:
    """Make a value that every JSON reader takes: NaN and infinity become their names.

    Args:
        value: Plain values.

    Returns:
        The same with strings in place of such floats.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def ratios(measurements: Mapping[str, Mapping[str, Any]], scale: Scale) -> dict[str, float | None]:
    """Put measured figures in relation; a ratio of something unmeasured is none.

    Args:
        measurements: All results.
        scale: Names the shapes and batches.

    Returns:
        Ratios by name.
    """

    def figure(name: str, key: str) -> float | None:
        entry = measurements.get(name) or {}
        value = (entry.get("figures") or {}).get(key)
        return value if entry.get("status") == "ok" and isinstance(value, int | float) else None

    def ratio(top: tuple[str, str], bottom: tuple[str, str]) -> float | None:
        above, below = figure(*top), figure(*bottom)
        return round(above / below, 4) if above is not None and below else None

    l4, seed, bf16 = L4_TRAINING, "train: seed preset", "train: bf16 weights"
    batch, tokens = scale.main_shape
    with_it = f"step {batch} x {tokens}: unsloth checkpointing"
    found = {
        "l4_over_seed_samples_per_s": ratio((l4, "samples_per_s"), (seed, "samples_per_s")),
        "l4_over_seed_tokens_per_s": ratio((l4, "tokens_per_s"), (seed, "tokens_per_s")),
        "bf16_over_nf4_tokens_per_s": ratio((bf16, "tokens_per_s"), (l4, "tokens_per_s")),
        "without_over_with_block_compile_tokens_per_s": ratio(
            (f"{l4} without block compile", "tokens_per_s"), (l4, "tokens_per_s")
        ),
        "without_over_with_checkpointing_tokens_per_s": ratio(
            (f"step {batch} x {tokens}: no checkpointing", "tokens_per_s"),
            (with_it, "tokens_per_s"),
        ),
    }
    off, on = SHARING
    found["shared_prefix_on_over_off_samples_per_s"] = ratio(
        (on, "samples_per_s"), (off, "samples_per_s")
    )
    plain, shared, guessing = DECODING
    for key, name in (("shared_prefix_on", shared), ("lookup", guessing)):
        found[f"generate_{key}_over_off_plans_per_s"] = ratio(
            (name, "plans_per_s"), (plain, "plans_per_s")
        )
    rate, fastest = figure(l4, "tokens_per_s"), f"tflop_per_s_{scale.matmul_sizes[-1]}"
    matmul, row_tokens = figure("matmul", fastest), figure("rows", "mean_tokens")
    found["l4_work_over_matmul_rate"] = None
    if rate is not None and matmul and row_tokens is not None:
        work = rate * work_flop_per_token(scale, row_tokens)
        found["l4_work_over_matmul_rate"] = round(work / matmul / 1e12, 4)
    for size in scale.batches:
        found[f"batch_{size}_over_1_plans_per_s"] = ratio(
            ("generate", f"plans_per_s_batch_{size}"), ("generate", "plans_per_s_batch_1")
        )
    return found


def work_flop_per_token(scale: Scale, row_tokens: float) -> float:
    """Count the products that a step cannot do without: forwards and backwards to the activations.

    Recomputing, the output layer (few tokens are supervised) and the adapter are left out.

    Args:
        scale: The shape.
        row_tokens: Mean length of a row, on which causal attention depends.

    Returns:
        Floating-point operations for each token.
    """
    key_value = scale.hidden // scale.heads * scale.kv_heads
    attention_weights = 2 * scale.hidden * (scale.hidden + key_value)
    layer_weights = attention_weights + 3 * scale.hidden * scale.ffn
    # Causal attention: 2 T h forwards, two and a half times that backwards.
    return scale.layers * (4 * layer_weights + 7 * row_tokens * scale.hidden)


def print_table(results: Results) -> None:
    """Print what came out, with rich where it is installed.

    Args:
        results: All results.
    """
    lines = [
        (name, str(entry["status"]), _told(entry)) for name, entry in results.measurements.items()
    ]
    told = {k: v for k, v in (results.head["ratios"] or {}).items() if v is not None}
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in lines:
            print(" | ".join(line))
    else:
        table = Table("measurement", "status", "figures", title="gpu check")
        for line in lines:
            table.add_row(*line)
        width = None if sys.stdout.isatty() else 150
        Console(highlight=False, markup=False, width=width).print(table)
    for name, value in told.items():
        print(f"{name}: {value}")


def _told(entry: Mapping[str, Any]) -> str:
    if entry["status"] not in ("ok", "timeout"):
        return str(entry["reason"] or "")[:160]
    figures = entry["figures"] or {}
    parts = [f"{k} {json.dumps(figures[k])}" for k in _COLUMNS if figures.get(k) is not None]
    start = [str(entry["reason"])] if entry["reason"] else []
    return ", ".join(start + parts)
