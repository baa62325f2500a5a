"""Which backend trains, and which attention kernel it will really use.

Unsloth takes flash-attn, else xformers, else torch's own attention, and says little about it.
"""

from __future__ import annotations

import json
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import Config
from tinyagent_fast.doctor.findings import Finding, failure, ok, warning
from tinyagent_fast.doctor.machine import Machine, TorchBuild
from tinyagent_fast.doctor.packages import install_command

if TYPE_CHECKING:
    from tinyagent_fast.doctor.probe import Probe

COST_OF_SDPA = (
    "3.9 times the time and 7 times the memory of xformers in one published measurement "
    "(rows of 8k tokens, B200, unsloth PR #8957)"
)


def takes_unsloth(config: Config, machine: Machine) -> bool:
    """Say which backend a config comes to on this machine.

    Args:
        config: The run's config.
        machine: With or without a GPU.

    Returns:
        Whether it is Unsloth.
    """
    from tinyagent_fast.models.loading import choose_backend

    if config.train.qat != "off":
        return False
    return choose_backend(config.model, cuda=machine.torch_sees_gpu) == "unsloth"


def check_attention(config: Config, machine: Machine, probe: Probe | None = None) -> Finding:
    """Say which backend and which attention kernel a run will use.

    Args:
        config: The run's config.
        machine: With or without a GPU.
        probe: What torch said, where it was asked; without it, files are looked at.

    Returns:
        A failure where Unsloth is asked for and absent, a warning where its slow attention is all
        that is left.

    Source: select_attention_backend in unsloth/utils/attention_dispatch.py (2026.10).
    """
    install = install_command(machine)
    if config.model.backend == "unsloth" and find_spec("unsloth") is None:
        return failure(
            "attention",
            "the backend is unsloth, which is not installed",
            f"{install}, or --model.backend transformers",
        )
    if not machine.torch_sees_gpu:
        return ok("attention", "torch's own (SDPA), on the CPU")
    if not takes_unsloth(config, machine):
        text = "transformers with torch's own attention (SDPA)"
        if config.model.backend == "auto" and config.train.qat == "off":
            return warning("attention", f"{text}: unsloth is not installed, so slower", install)
        return ok("attention", text)
    no_flash = _no_flash_attention(machine, probe)
    if no_flash is None:
        return ok("attention", f"Unsloth with flash-attn {_version('flash-attn')}")
    no_xformers = _no_xformers(machine.torch, probe)
    if no_xformers is None:
        return ok("attention", f"Unsloth with xformers {_version('xformers')}")
    text = (
        f"Unsloth falls back to torch's own (SDPA): {COST_OF_SDPA}; flash-attn: {no_flash}; "
        f"xformers: {no_xformers}"
    )
    return warning("attention", text, install)


def _no_flash_attention(machine: Machine, probe: Probe | None) -> str | None:
    """Say why flash-attn cannot run."""
    if probe is not None and probe.cuda:
        return probe.flash_attn
    spec = find_spec("flash_attn")
    if spec is None:
        return "not installed"
    if spec.origin is None:
        return "only version 4 is installed, which Unsloth does not use"  # a bare namespace
    assert machine.gpu is not None, "the caller has looked"
    return "it needs compute capability 8.0" if machine.gpu.bf16 is False else None


def _no_xformers(torch: TorchBuild | None, probe: Probe | None) -> str | None:
    """Say why xformers cannot run."""
    if probe is not None and probe.cuda:
        return probe.xformers
    spec = find_spec("xformers")
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        return xformers_mismatch(Path(folder) / "cpp_lib.json", torch)
    return "not installed"


def xformers_mismatch(about: Path, torch: TorchBuild | None) -> str | None:
    """Compare what xformers was built for with the installed torch.

    Args:
        about: Its cpp_lib.json.
        torch: The installed torch.

    Returns:
        Why it cannot load; none where nothing speaks against it.
    """
    try:
        version = json.loads(about.read_text(encoding="utf-8"))["version"]
        built_for, cuda = str(version["torch"]), int(version["cuda"] or 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if torch is None or torch.cuda is None or not cuda:
        return None
    if torch.cuda.partition(".")[0] == str(cuda // 100):
        return None
    return (
        f"built for torch {built_for} (CUDA {cuda // 100}.{cuda % 100}), "
        f"not for CUDA {torch.cuda} of torch {torch.version}"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"
