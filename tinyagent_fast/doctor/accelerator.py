"""The GPU: whether torch can use it, whether it has bf16, and whether the config fits it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tinyagent_fast.config import Config
from tinyagent_fast.doctor.findings import Finding, failure, ok, warning
from tinyagent_fast.doctor.machine import Gpu, Machine
from tinyagent_fast.doctor.packages import install_command
from tinyagent_fast.errors import ModelError

if TYPE_CHECKING:
    from tinyagent_fast.doctor.probe import Probe
    from tinyagent_fast.training.memory import MemoryEstimator

_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Oldest driver by major version of CUDA, on Linux.

Source: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.
"""
_SMALL_WEIGHTS = 100_000_000
"""A larger model is no work for a CPU: a row of 128 tokens took TinyLlama a minute on two cores."""
_TAKEN_GIB = 1.0
"""What a desktop shows pictures with is no reason to say that others use the card."""


def check_gpu(
    config: Config, machine: Machine, *, automatic: bool, probe: Probe | None = None
) -> Finding:
    """Say which GPU a run will take, and whether this torch can use it.

    Args:
        config: The run's config.
        machine: With or without a GPU.
        automatic: Whether its preset was chosen by what torch can use.
        probe: What torch said, where it was asked.

    Returns:
        The finding. What keeps torch from the GPU is a failure, unless a preset for the CPU was
        asked for by name.
    """
    if machine.gpu is None:
        return _without_gpu(config, machine)
    problem = _unusable(machine, machine.gpu)
    if problem is None and probe is not None and probe.problem is not None:
        problem = f"{machine.gpu.name} is here, but torch cannot use it: {probe.problem}"
    if problem is None:
        return ok("gpu", _described(machine.gpu, machine))
    wants_cpu = not automatic and _is_small(config)
    fix = f"{_remedy(machine, machine.gpu)}; to train the small model without it: --preset cpu"
    return warning("gpu", problem, fix) if wants_cpu else failure("gpu", problem, fix)


def _without_gpu(config: Config, machine: Machine) -> Finding:
    none_found = f"no NVIDIA GPU ({machine.gpu_note})" if machine.gpu_note else "no NVIDIA GPU"
    small_fix = "train on a machine with a GPU, or take --preset cpu"
    if not _is_small(config):
        return warning(
            "gpu", f"{none_found}: {config.model.base} takes minutes a step on a CPU", small_fix
        )
    if machine.gpu_note and "hides" not in machine.gpu_note:
        return warning("gpu", none_found, "repair the driver, if there is a GPU in this machine")
    return ok("gpu", f"{none_found}: training runs on the CPU")


def _is_small(config: Config) -> bool:
    """Say whether a CPU can train the base model in a reasonable time."""
    from tinyagent_fast.training.memory import base_shape

    try:
        shape = base_shape(config.model.base)
    except ModelError:
        return False
    return shape.body_weights + shape.embedding_weights < _SMALL_WEIGHTS


def _unusable(machine: Machine, gpu: Gpu) -> str | None:
    """Say why this torch cannot use the GPU, as far as that is known without asking it."""
    torch = machine.torch
    if torch is None:
        return None  # the check of packages says so
    if torch.cuda is None:
        return f"{gpu.name} is here, but torch {torch.version} was built without CUDA"
    oldest = _OLDEST_DRIVER.get(_major(torch.cuda))
    if oldest is not None and gpu.driver is not None and _major(gpu.driver) < oldest:
        return (
            f"torch {torch.version} is built for CUDA {torch.cuda} and needs driver {oldest} or "
            f"newer, {gpu.name} has {gpu.driver}"
        )
    return None


def _remedy(machine: Machine, gpu: Gpu) -> str:
    oldest = _OLDEST_DRIVER[12]  # which the requirements file is made for
    if gpu.driver is not None and _major(gpu.driver) < oldest:
        return f"install driver {oldest} or newer"
    return install_command(machine)


def _major(version: str) -> int:
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 0


def _described(gpu: Gpu, machine: Machine) -> str:
    parts = [gpu.name]
    if gpu.total_gib is not None:
        parts.append(f"{gpu.total_gib:.1f} GiB")
    if gpu.capability is not None:
        parts.append(f"compute capability {gpu.capability[0]}.{gpu.capability[1]}")
    if gpu.driver is not None:
        parts.append(f"driver {gpu.driver}")
    if machine.torch is not None:
        parts.append(f"torch {machine.torch.version} for CUDA {machine.torch.cuda}")
    return ", ".join(parts)


def check_bf16(config: Config, machine: Machine) -> Finding | None:
    """Say in which type the GPU computes.

    Args:
        config: The run's config.
        machine: With or without a GPU.

    Returns:
        A warning where bf16 is asked for and cannot be had; none without a usable GPU.
    """
    if not machine.torch_sees_gpu or machine.gpu is None or machine.gpu.bf16 is None:
        return None
    if machine.gpu.bf16:
        return ok("bf16", "yes")
    if config.model.weights == "bf16":
        return warning(
            "bf16", "this GPU has none: weights are held in fp16", "--model.weights nf4 or fp16"
        )
    return ok("bf16", "this GPU has none: it computes in fp16")


def check_gpu_memory(config: Config, machine: Machine, *, unsloth: bool) -> Finding | None:
    """Compare what a micro-batch is predicted to need with what is free on the GPU.

    Args:
        config: The run's config.
        machine: With or without a GPU.
        unsloth: Whether the run will use it.

    Returns:
        A warning where it may not fit, because the prediction is an estimate and training measures
        it before step 1; none without a usable GPU.
    """
    gpu = machine.gpu
    if not machine.torch_sees_gpu or gpu is None or gpu.free_gib is None or gpu.total_gib is None:
        return None
    from tinyagent_fast.training.memory import ERROR_SHARE, RESERVE_GIB, with_batch

    free = f"{gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free"
    taken = gpu.total_gib - gpu.free_gib > _TAKEN_GIB
    if taken:
        free += ", other programs use the rest"
    usable = min(gpu.free_gib, gpu.total_gib - RESERVE_GIB)
    backend = "unsloth" if unsloth else "transformers"
    estimator = estimator_of(config, backend=backend, usable_gib=usable)
    if estimator is None:
        text = f"{free}; the size of {config.model.base} is not known before it is loaded"
        return ok("gpu memory", text)
    found = estimator.largest_batch(config.model.gradient_checkpointing)
    if config.train.batch == "auto":
        estimator = replace(estimator, config=with_batch(config, found.batch))
    predicted = estimator.estimate()
    need = (
        f"{predicted.total_gib:.1f} GiB predicted (+-{100 * ERROR_SHARE:.0f} %) for "
        f"{estimator.config.train.batch} x {estimator.row_tokens:,} tokens"
    )
    if predicted.fits(usable):
        return ok("gpu memory", f"{free}; {need}")
    fixes = ["end the other programs (nvidia-smi lists them)"] if taken else []
    if found.fits:
        fixes.append(f"--train.batch {found.batch} --train.accumulation {found.accumulation}")
    fixes.append(f"tinyagent-fast memory --gpu-gib {gpu.total_gib:.0f} shows what fits")
    return warning("gpu memory", f"{free}; {need} may not fit", ", or ".join(fixes))


def estimator_of(config: Config, *, backend: str, usable_gib: float) -> MemoryEstimator | None:
    """Predict a run's memory before its rows are read: with rows of the longest length allowed.

    Args:
        config: The run's config.
        backend: `unsloth` or `transformers`.
        usable_gib: Memory there is.

    Returns:
        What predictions are made from; none where the size of the base model is not known.
    """
    from tinyagent_fast.training.memory import MemoryEstimator, base_shape, row_lengths

    try:
        shape = base_shape(config.model.base)
    except ModelError:
        return None
    longest = config.model.max_length_tokens
    lengths, _ = row_lengths(config, f"{longest},{longest}")
    return MemoryEstimator(
        config=config, shape=shape, lengths=lengths, backend=backend, usable_gib=usable_gib
    )
