"""What `gpu_check` measures of the machine, of loading and of training, each a function."""

from __future__ import annotations

import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_check_inputs import exact_rows, write_base, write_rows, write_tokenizer
from gpu_check_worker import Bench, Part, release

_PACKAGES = ("tinyagent-fast", "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "unsloth", "unsloth_zoo", "xformers", "flash-attn", "tokenizers", "safetensors", "numpy")  # fmt: skip
_NVIDIA_SMI = ("name", "driver_version", "power.limit", "memory.total", "clocks.max.sm", "pstate")


def machine(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Record versions and the card; nothing of the project is needed for it."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    card = None
    if bench.cuda:
        properties = torch.cuda.get_device_properties(0)
        card = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 2),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return {
        "versions": versions,
        "platform": platform.platform(),
        "card": card,
        "nvidia_smi": _nvidia_smi(),
    }


def _nvidia_smi() -> dict[str, str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = f"--query-gpu={','.join(_NVIDIA_SMI)}"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = done.stdout.strip().splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(_NVIDIA_SMI, values, strict=False)}


def matmul(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Time square bf16 matrix products: the rate that the steps' rates are to be held against."""
    import torch

    device = "cuda" if bench.cuda else "cpu"
    figures: dict[str, Any] = {}
    for size in bench.scale.matmul_sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        repeats = bench.scale.matmul_repeats
        for _ in range(3):
            torch.matmul(a, b)
        _synchronize(bench)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(a, b)
        _synchronize(bench)
        seconds = (time.perf_counter() - started) / repeats
        figures[f"tflop_per_s_{size}"] = round(2 * size**3 / seconds / 1e12, 3)
        bench.partial(figures)
    return figures


def base(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Write the base model and its tokenizer."""
    bench.base.mkdir(parents=True, exist_ok=True)
    given = bench.job["tokenizer"]
    figures = write_tokenizer(bench.base, bench.scale, Path(given) if given else None)
    return {**figures, **write_base(bench.base, bench.scale)}


def rows(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Encode the synthetic rows."""
    encoded = write_rows(bench.base, bench.work / "rows.arrow", bench.scale)
    return {
        "rows": encoded.statistics.rows,
        "dropped": len(encoded.statistics.dropped),
        "mean_tokens": round(encoded.statistics.mean_tokens, 1),
        "longest_tokens": encoded.statistics.longest_tokens,
        "supervised_share": round(encoded.statistics.supervised_share, 4),
    }


def load(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Load the model with its adapter, and look at what Unsloth has fused."""
    started = time.perf_counter()
    if item["model"]["backend"] == "unsloth" and not bench.tiny:
        import unsloth  # noqa: F401
    imported = time.perf_counter()
    loaded = bench.loaded(item["model"])
    _synchronize(bench)
    parameters = [p.numel() for p in loaded.model.parameters() if p.requires_grad]
    return {
        "import_s": round(imported - started, 2),
        "load_s": round(time.perf_counter() - imported, 2),
        "backend": loaded.backend,
        "compute_dtype": loaded.compute_dtype,
        "notes": list(loaded.notes),
        "trainable_parameters": sum(parameters),
        "fused_layers": fused_layers(loaded.model),
        "attention": _attention(loaded.backend, bench),
        **memory(bench),
    }


def fused_layers(model: Any) -> dict[str, int]:
    """Count the layers whose LoRA runs through Unsloth's fused functions.

    Args:
        model: A model with its adapter.

    Returns:
        Layers, and how many of them have fused QKV, O and MLP.
    """
    counts = {"layers": 0, "qkv": 0, "o": 0, "mlp": 0}
    for module in model.modules():
        if not type(module).__name__.endswith("DecoderLayer"):
            continue
        counts["layers"] += 1
        names = {
            "qkv": getattr(module.self_attn, "apply_qkv", None),
            "o": getattr(module.self_attn, "apply_o", None),
            "mlp": module.mlp.forward,
        }
        for key, function in names.items():
            if "apply_lora" in getattr(function, "__name__", ""):
                counts[key] += 1
    return counts


def _attention(backend: str, bench: Bench) -> str | None:
    if backend != "unsloth" or not bench.cuda:
        return None
    from unsloth.utils import attention_dispatch

    return str(attention_dispatch.select_attention_backend())


def memory(bench: Bench) -> dict[str, float | None]:
    """Read the allocator.

    Args:
        bench: Says whether there is a device.

    Returns:
        GiB now and at the peak since the last `release`; none without CUDA.
    """
    names = ("allocated_gib", "peak_allocated_gib", "peak_reserved_gib")
    if not bench.cuda:
        return dict.fromkeys(names)
    import torch

    values = (
        torch.cuda.memory_allocated(),
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
    )
    return {name: round(value / 2**30, 3) for name, value in zip(names, values, strict=True)}


def train_shape(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Time single micro-batches of one exact shape through the project's trainer."""
    batch, tokens = item["arguments"]["batch"], item["arguments"]["tokens"]
    loaded = bench.loaded(item["model"])
    steps = _Steps(warmup=2, most=bench.scale.steps, most_s=bench.scale.steps_s)
    dataset = exact_rows(bench.rows(), batch, tokens, steps.warmup + steps.most + 1)
    train = replace(bench.config.train, batch=batch, accumulation=1)
    return measure_training(bench, loaded, dataset, train, steps)


def train_rows(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Time optimizer steps of a whole recipe on the synthetic rows."""
    loaded = bench.loaded(item["model"])
    steps = _Steps(warmup=2, most=bench.scale.recipe_steps, most_s=bench.scale.recipe_s)
    train = bench.config.train
    if item["arguments"].get("packed"):
        train = replace(train, batching="packed", batch=1, accumulation=1)
        steps = replace(steps, most=bench.scale.steps)
    return measure_training(bench, loaded, bench.rows(), train, steps)


@dataclass(frozen=True)
class _Steps:
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
    bench: Bench, loaded: Any, dataset: Any, train: Any, steps: _Steps
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
    from tinyagent_fast.training.trainer import build_trainer

    release(bench.cuda)
    before = memory(bench)["allocated_gib"]
    clock = _Clock()
    # One step more than will be made: the trainer saves a checkpoint at its last step.
    train = replace(train, max_steps=steps.warmup + steps.most + 1)
    started = time.perf_counter()
    trainer = build_trainer(
        loaded,
        dataset,
        train,
        max_length_tokens=bench.config.model.max_length_tokens,
        output_dir=bench.work / "checkpoints",
        save_every_steps=10**6,
    )
    built_s = time.perf_counter() - started

    def figures() -> dict[str, Any]:
        rows_per_step = train.batch * train.accumulation
        return {
            "batch": train.batch,
            "accumulation": train.accumulation,
            "before_gib": before,
            "trainer_s": round(built_s, 2),
            **rates(clock.seconds, clock.tokens, steps.warmup, rows_per_step),
            **losses(trainer.state.log_history),
            **memory(bench),
        }

    trainer.add_callback(_stopper(bench, trainer, clock, steps, figures))
    trainer.train()
    outcome = figures()
    if train.batching == "packed":
        outcome["samples_per_s"] = None  # a packed row holds several samples
    del trainer
    release(bench.cuda)
    return outcome


def _stopper(bench: Bench, trainer: Any, clock: _Clock, steps: _Steps, figures: Any) -> Any:
    """Make the callback that times steps and stops the trainer."""
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):  # type: ignore[misc]
        last_s = 0.0
        last_tokens = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _synchronize(bench)
            self.last_s, self.last_tokens = time.perf_counter(), trainer.tokens_seen

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _synchronize(bench)
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
    from gpu_check_inputs import prompts_of

    from tinyagent_fast.training.preflight import preflight as project_preflight
    from tinyagent_fast.training.trainer import build_trainer

    loaded, dataset = bench.loaded(item["model"]), bench.rows()
    release(bench.cuda)
    trainer = build_trainer(
        loaded,
        dataset,
        replace(bench.config.train, max_steps=2),
        max_length_tokens=bench.config.model.max_length_tokens,
        output_dir=bench.work / "checkpoints",
        save_every_steps=10**6,
    )
    started = time.perf_counter()
    report = project_preflight(
        trainer, loaded, dataset, prompts_of(dataset, bench.scale), bench.config.eval.batch
    )
    seconds = round(time.perf_counter() - started, 2)
    del trainer
    return {"preflight_s": seconds, "report": asdict(report), **memory(bench)}


def _synchronize(bench: Bench) -> None:
    if bench.cuda:
        import torch

        torch.cuda.synchronize()


PARTS: Mapping[str, Part] = {
    "machine": machine,
    "matmul": matmul,
    "base": base,
    "rows": rows,
    "load": load,
    "train_shape": train_shape,
    "train_rows": train_rows,
    "preflight": preflight,
}
"""Every function by the kind that a measurement names."""
