"""Disk and memory that a config needs, against what is free; sizes are estimates from shapes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinyagent_fast.config import Config
from tinyagent_fast.data.cache import cache_folder
from tinyagent_fast.data.download import DATASET_REPOSITORY
from tinyagent_fast.doctor.accelerator import estimator_of
from tinyagent_fast.doctor.findings import Finding, failure, ok, warning
from tinyagent_fast.doctor.machine import Machine
from tinyagent_fast.export.settings import (
    BITS_PER_WEIGHT,
    FEWEST_BITS,
    ExportSettings,
    quant_specs,
)
from tinyagent_fast.presets import REAL_TEST, REAL_TRAIN
from tinyagent_fast.training.memory import ERROR_SHARE, adapter_weights

if TYPE_CHECKING:
    from tinyagent_fast.models.families import ModelShape

_GIB = 2**30
PUBLISHED_BYTES = {REAL_TRAIN: 734_000_000, REAL_TEST: 12_800_000}
"""Sizes of the published files. Source: the dataset's page (squeeze-ai-lab/TinyAgent-dataset)."""
_GENERATED_BYTES = 3200
"""Of a generated entry as JSON; measured: 66.8 MB for 24,200 short ones, 1.2 MB for 400 long."""
_ROW_TOKEN_BYTES = 8
"""Ids and labels in 32 bits each."""
_CHECKPOINTS = 3
"""Two are kept, and a third is there while it is written."""
_LIBRARIES_GIB = 0.6
"""What torch, transformers and trl take; measured with `--preset smoke` on a CPU."""
_CUDA_LIBRARIES_GIB = 3.0
"""The same with CUDA's libraries; an estimate."""

Purpose = Literal["train", "export"]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Something that will be written."""

    what: str
    folder: Path
    size_bytes: float
    purpose: Purpose


def check_disk(config: Config) -> list[Finding]:
    """Compare what training and an export will write with what is free where they write it.

    Args:
        config: The run's config.

    Returns:
        One finding a disk: too little for training fails, too little for an export is a warning.
    """
    disks: dict[int, list[Need]] = {}
    for need in disk_needs(config):
        disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    found = []
    for needs in disks.values():
        folder = _existing(needs[0].folder)
        found.append(disk_finding(needs, shutil.disk_usage(folder).free / _GIB))
    return found


def disk_finding(needs: Sequence[Need], free_gib: float) -> Finding:
    """Say whether a disk is large enough.

    Args:
        needs: What will be written to it.
        free_gib: What is free.

    Returns:
        The finding.
    """
    train, export = (
        sum(need.size_bytes for need in needs if need.purpose == purpose) / _GIB
        for purpose in ("train", "export")
    )
    parts = ", ".join(
        f"{need.what} {need.size_bytes / _GIB:.1f}" for need in needs if need.size_bytes > 0.05e9
    )
    text = f"{free_gib:.1f} GiB free; training writes about {train:.1f}, an export {export:.1f}"
    text += f" ({parts})" if parts else ""
    where = "another disk: --runs FOLDER for runs, HF_HOME for the hub's cache"
    if train > free_gib:
        return failure("disk", text, f"free {train - free_gib:.1f} GiB, or use {where}")
    if train + export > free_gib:
        short = train + export - free_gib
        return warning(
            "disk", text, f"free {short:.1f} GiB before an export, or export with --out or --quant"
        )
    return ok("disk", text)


def disk_needs(config: Config) -> list[Need]:
    """List what training and an export will write, as far as it is not there yet.

    Args:
        config: The run's config.

    Returns:
        Sizes by folder; those of a base model whose size is not known are left out.
    """
    needs = _data_needs(config)
    estimator = estimator_of(config, backend="transformers", usable_gib=0.0)
    if estimator is None:
        return needs
    shape, runs, lengths = estimator.shape, config.runs, estimator.lengths
    if not any((cache_folder() / "rows").glob("*.arrow")):
        size = lengths.rows * lengths.mean_tokens * _ROW_TOKEN_BYTES
        needs.append(_train("rows", cache_folder(), size))
    adapter = adapter_weights(shape, config.lora)
    moments = 2 if config.train.optimizer == "adamw_8bit" else 8
    needs.append(_train("checkpoints", runs, _CHECKPOINTS * adapter * (4 + moments)))
    needs.append(_train("adapters", runs, 2 * adapter * 4))
    needs.append(_base_need(config, shape))
    return needs + _export_needs(config, shape)


def _data_needs(config: Config) -> list[Need]:
    data = config.data
    if data.train is None:
        size = data.generated_entries * _GENERATED_BYTES
        folder = Path("data")
    elif data.train.exists():
        size, folder = data.train.stat().st_size, data.train.parent
    else:
        size, folder = PUBLISHED_BYTES.get(data.train, 0), hub_cache(os.environ)
    there = data.train is not None and data.train.exists()
    cached = data.train == REAL_TRAIN and dataset_in_hub_cache(folder)
    needs = [] if there or cached else [_train("data", folder, size)]
    if not there and data.train is not None and _device(folder) != _device(data.train):
        needs.append(_train("a copy of the data", data.train.parent, size))
    if not any(cache_folder().glob("*.arrow")):
        needs.append(_train("cache", cache_folder(), size))
    return needs


def _base_need(config: Config, shape: ModelShape) -> Need:
    weights = _weights(shape)
    if config.model.base in ("nano", "random"):
        made = any((config.runs / "bases").glob(f"{config.model.base}-*"))
        return _train("base", config.runs, 0 if made else 4 * weights)
    cache = hub_cache(os.environ)
    there = Path(config.model.base).is_dir() or in_hub_cache(config.model.base, cache)
    return _train("base", cache, 0 if there else 2 * weights)


def _export_needs(config: Config, shape: ModelShape) -> list[Need]:
    """List what an export with the default flags makes, and what it makes in passing."""
    weights = _weights(shape)
    merged = (4 if config.model.base in ("nano", "random") else 2) * weights
    bits = [BITS_PER_WEIGHT.get(spec.quant, FEWEST_BITS) for spec in quant_specs(ExportSettings())]
    sizes = {
        "merged": merged,
        "GGUF files": weights * sum(bits) / 8,
        "f32 to compare with": 4 * weights,
    }
    return [
        Need(what=what, folder=config.runs, size_bytes=size, purpose="export")
        for what, size in sizes.items()
    ]


def _train(what: str, folder: Path, size_bytes: float) -> Need:
    return Need(what=what, folder=folder, size_bytes=size_bytes, purpose="train")


def _weights(shape: ModelShape) -> int:
    return shape.body_weights + shape.embedding_weights


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Find the folder in which huggingface_hub keeps models, without importing it.

    Args:
        environment: Environment variables.

    Returns:
        The folder, which may not exist.

    Source: huggingface_hub's documentation of its environment variables.
    """
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    if environment.get("HF_HOME"):
        return Path(environment["HF_HOME"]).expanduser() / "hub"
    general = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(general).expanduser() / "huggingface" / "hub"


def in_hub_cache(base: str, cache: Path) -> bool:
    """Say whether a model's weights have been downloaded.

    Args:
        base: Its name on the hub.
        cache: The hub's cache.

    Returns:
        Whether a file of weights is there.
    """
    folder = cache / f"models--{base.replace('/', '--')}" / "snapshots"
    return any(any(folder.glob(f"*/*.{kind}")) for kind in ("safetensors", "bin"))


def dataset_in_hub_cache(cache: Path) -> bool:
    """Say whether the published training file has been downloaded.

    Args:
        cache: The hub's cache.

    Returns:
        Whether it is there.
    """
    folder = cache / f"datasets--{DATASET_REPOSITORY.replace('/', '--')}" / "snapshots"
    return any(folder.glob(f"*/{REAL_TRAIN.name}"))


def _existing(folder: Path) -> Path:
    """Give the folder, or the nearest one above that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def check_memory(config: Config, machine: Machine) -> Finding:
    """Compare the memory that training needs beside the GPU, or instead of one, with what is there.

    Args:
        config: The run's config.
        machine: With or without a GPU.

    Returns:
        A failure where the machine surely has too little, a warning where too little is free now.
    """
    total, available = machine.memory_gib, machine.available_gib
    if total is None or available is None:
        return ok("memory", "not known: psutil is not installed")
    needed = needed_memory_gib(config, machine)
    if needed is None:
        text = f"{available:.1f} of {total:.1f} GiB free; the size of the base is not known"
        return ok("memory", text)
    text = f"{available:.1f} of {total:.1f} GiB free, about {needed:.1f} needed"
    smaller = "--train.batch 1 with a higher --train.accumulation, or --preset smoke"
    if needed * (1 - ERROR_SHARE) > total:
        return failure("memory", text, f"take a machine with more memory, or {smaller}")
    if needed > available:
        return warning("memory", text, f"close other programs, or {smaller}")
    return ok("memory", text)


def needed_memory_gib(config: Config, machine: Machine) -> float | None:
    """Estimate the host memory of a run.

    Args:
        config: The run's config.
        machine: With or without a usable GPU.

    Returns:
        GiB; none where the size of the base model is not known.
    """
    from tinyagent_fast.training.memory import preset_batch, with_batch

    model = config.model
    if not machine.torch_sees_gpu and model.weights in ("bf16", "fp16"):
        model = replace(model, weights="fp32")  # as training does
    config = with_batch(replace(config, model=model), preset_batch(config))
    estimator = estimator_of(config, backend="transformers", usable_gib=0.0)
    if estimator is None:
        return None
    if not machine.torch_sees_gpu:
        return _LIBRARIES_GIB + estimator.estimate().total_gib
    shape = estimator.shape
    needed = _CUDA_LIBRARIES_GIB + 2 * _weights(shape) / _GIB
    if model.gradient_checkpointing == "unsloth":
        tokens = config.train.rows_per_batch * estimator.row_tokens
        needed += 2 * tokens * shape.hidden * shape.layers / _GIB  # every layer's input
    return needed
