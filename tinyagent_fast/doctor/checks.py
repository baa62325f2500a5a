"""Which checks there are, in the order in which they are shown.

The quick ones take a second and import nothing heavy: `train` runs them before anything else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import Config
from tinyagent_fast.doctor.accelerator import check_bf16, check_gpu, check_gpu_memory
from tinyagent_fast.doctor.attention import check_attention, takes_unsloth
from tinyagent_fast.doctor.dataset import check_data, offline
from tinyagent_fast.doctor.engine import check_llama_cpp
from tinyagent_fast.doctor.findings import Finding, failure, ok
from tinyagent_fast.doctor.machine import Machine, driver_is_loaded
from tinyagent_fast.doctor.packages import check_packages, check_python, install_command
from tinyagent_fast.doctor.resources import check_disk, check_memory, hub_cache, in_hub_cache

if TYPE_CHECKING:
    from tinyagent_fast.doctor.probe import Probe


def quick_checks(
    config: Config, machine: Machine, *, automatic: bool, probe: Probe | None = None
) -> list[Finding]:
    """Look at everything that shows without torch.

    Args:
        config: The run's config.
        machine: This machine.
        automatic: Whether its preset was chosen by what torch can use.
        probe: What torch said, where it was asked.

    Returns:
        All findings in order.
    """
    unsloth = takes_unsloth(config, machine)
    gpu = check_gpu(config, machine, automatic=automatic, probe=probe)
    on_gpu = (
        (
            check_bf16(config, machine),
            check_gpu_memory(config, machine, unsloth=unsloth),
        )
        if gpu.status == "ok"
        else ()
    )
    return [
        check_python(machine),
        *check_packages(machine, unsloth=unsloth),
        gpu,
        *(found for found in on_gpu if found is not None),
        check_attention(config, machine, probe),
        check_memory(config, machine),
        *check_disk(config),
        check_base(config),
        *check_data(config, thorough=False),
    ]


def all_checks(
    config: Config,
    machine: Machine,
    *,
    automatic: bool,
    probe: Probe | None = None,
    online: bool = False,
) -> list[Finding]:
    """Look at everything: also inside the data files, at llama.cpp and, if asked to, the hub.

    Args:
        config: The run's config.
        machine: This machine.
        automatic: Whether its preset was chosen by what torch can use.
        probe: What torch said, where it was asked.
        online: Whether to ask the hub.

    Returns:
        All findings in order.
    """
    quick = quick_checks(config, machine, automatic=automatic, probe=probe)
    found = [finding for finding in quick if finding.name not in ("data", "catalogue")]
    found += check_data(config, thorough=True)
    found.append(check_llama_cpp(install_command(machine)))
    if online:
        from tinyagent_fast.doctor.hub import check_hub

        found += check_hub(config, base_is_here=_base_is_here(config))
    return found


def ask_torch(machine: Machine, *, always: bool) -> tuple[Machine, Probe | None]:
    """Let torch say what it sees of the GPU, where it can and where that says more.

    Args:
        machine: As read without torch.
        always: Ask also where nvidia-smi has answered, which costs some seconds.

    Returns:
        The machine as torch sees it, and what torch said.
    """
    if machine.torch is None or machine.torch.cuda is None:
        return machine, None
    hidden = machine.gpu is None and machine.gpu_note is None and driver_is_loaded()
    if not hidden and not (always and machine.gpu is not None):
        return machine, None
    from tinyagent_fast.doctor.probe import probe_gpu

    probe = probe_gpu()
    return machine.as_probed(probe), probe


def check_base(config: Config) -> Finding:
    """Say where the base model comes from.

    Args:
        config: The run's config.

    Returns:
        A failure where it must be downloaded and that is forbidden.
    """
    base = config.model.base
    if base in ("nano", "random"):
        return ok("base", f"{base}, made on the spot")
    if Path(base).is_dir():
        if (Path(base) / "config.json").exists():
            return ok("base", f"folder {base}")
        fix = "copy the whole model into it, or name another folder with --model.base"
        return failure("base", f"folder {base} holds no config.json", fix)
    if _base_is_here(config):
        return ok("base", f"{base}, in the hub's cache")
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        fix = "name a folder with config.json and weights, or a model on the hub, with --model.base"
        return failure("base", f"there is no folder {base}", fix)
    if offline():
        return failure(
            "base",
            f"{base} is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it",
            "unset HF_HUB_OFFLINE, or put the model into a folder and name that with --model.base",
        )
    return ok("base", f"{base}, downloaded by the first run")


def _base_is_here(config: Config) -> bool:
    base = config.model.base
    if base in ("nano", "random") or Path(base).is_dir():
        return True
    return in_hub_cache(base, hub_cache(os.environ))
