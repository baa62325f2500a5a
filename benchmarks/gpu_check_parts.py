"""What `gpu_check` measures of the machine, its inputs and of loading, each a function."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_check_inputs import write_base, write_rows, write_tokenizer
from gpu_check_worker import Bench, Part

_PACKAGES = (
    "tinyagent-fast",
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "xformers",
    "flash-attn",
    "tokenizers",
    "safetensors",
    "numpy",
)
_ENVIRONMENT = ("UNSLOTH_", "TORCH", "PYTORCH_", "TRITON_", "NVIDIA_VISIBLE", "CUDA_", "OMP_")
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
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_ENVIRONMENT)},
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
        synchronize(bench)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(a, b)
        synchronize(bench)
        seconds = (time.perf_counter() - started) / repeats
        figures[f"tflop_per_s_{size}"] = round(2 * size**3 / seconds / 1e12, 3)
        bench.partial(figures)
    return figures


def base(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Write the base model and its tokenizer."""
    bench.base.mkdir(parents=True, exist_ok=True)
    given = bench.job["tokenizer"]
    figures = write_tokenizer(bench.base, bench.scale, Path(given) if given else None)
    scale = replace(bench.scale, vocab_pieces=figures["pieces"])
    return {**figures, **write_base(bench.base, scale)}


def rows(bench: Bench, item: Mapping[str, Any]) -> dict[str, Any]:
    """Encode the synthetic rows."""
    encoded = write_rows(bench.base, bench.work / "rows", bench.scale)
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
    synchronize(bench)
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


def synchronize(bench: Bench) -> None:
    """Wait for the device, if there is one.

    Args:
        bench: Says whether there is one.
    """
    if bench.cuda:
        import torch

        torch.cuda.synchronize()


PARTS: Mapping[str, Part] = {
    "machine": machine,
    "matmul": matmul,
    "base": base,
    "rows": rows,
    "load": load,
}
"""Every function by the kind that a measurement names."""
