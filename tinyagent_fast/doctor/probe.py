"""Asks torch itself about the GPU, in a process of its own.

A driver or a kernel that aborts takes that process along and not the program, and the memory that
CUDA takes for itself is given back before a run starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_TIMEOUT_S = 120
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What torch said."""

    problem: str | None = None
    """Why the GPU cannot compute, or why torch could not be asked."""
    cuda: bool = False
    name: str | None = None
    total_gib: float | None = None
    free_gib: float | None = None
    capability: tuple[int, int] | None = None
    flash_attn: str | None = "not asked"
    """Why flash-attn cannot run; none where it does."""
    xformers: str | None = "not asked"
    """Why xformers cannot run; none where it does."""


def probe_gpu() -> Probe:
    """Ask torch in a new process, which takes some seconds.

    Returns:
        What it said, or why it said nothing.
    """
    words = [sys.executable, "-m", "tinyagent_fast.doctor.probe"]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            cwd=Path(__file__).parents[2],  # else a folder of our name there would be imported
        )
    except subprocess.TimeoutExpired:
        return Probe(problem=f"torch gave no answer in {_TIMEOUT_S} s")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        return Probe(problem=f"torch's process ended with code {done.returncode}: {said}")
    raw = json.loads(lines[-1])
    capability = raw.pop("capability")
    return Probe(**raw, capability=tuple(capability) if capability else None)


def look_at_gpu() -> Probe:
    """Ask torch in this process: compute something, and try the attention kernels.

    Returns:
        What it says.
    """
    import torch

    if not torch.cuda.is_available():
        return Probe(problem="torch.cuda.is_available() is False")
    try:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        ones = torch.ones((16, 16), device="cuda", dtype=torch.float16)
        torch.cuda.synchronize()
        right = bool(((ones @ ones) == 16).all())
    except RuntimeError as error:
        return Probe(problem=_first_line(error))
    capability = (int(properties.major), int(properties.minor))
    bf16 = capability >= (8, 0)
    return Probe(
        problem=None if right else "it multiplies wrongly",
        cuda=True,
        name=str(properties.name),
        total_gib=total / _GIB,
        free_gib=free / _GIB,
        capability=capability,
        flash_attn=_reason(lambda: _run_flash_attention(torch), "flash_attn")
        if bf16
        else "it needs compute capability 8.0",
        xformers=_reason(lambda: _run_xformers(torch, bf16), "xformers"),
    )


def _reason(run: Callable[[], None], package: str) -> str | None:
    """Say why kernels cannot run; none where they do."""
    if find_spec(package) is None:
        return "not installed"
    try:
        run()
    except Exception as error:  # a package of another build fails in any way it likes
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _run_flash_attention(torch: Any) -> None:
    # By name, as a package that nothing here needs.
    flash = import_module("flash_attn.flash_attn_interface")
    query = torch.zeros((1, 8, 1, 64), device="cuda", dtype=torch.bfloat16)
    flash.flash_attn_func(query, query, query, causal=True)
    torch.cuda.synchronize()


def _run_xformers(torch: Any, bf16: bool) -> None:
    fmha = import_module("xformers.ops.fmha")
    dtype = torch.bfloat16 if bf16 else torch.float16
    query = torch.zeros((1, 8, 1, 64), device="cuda", dtype=dtype)
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens([8])
    fmha.memory_efficient_attention(query, query, query, attn_bias=bias)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(asdict(look_at_gpu())) + "\n")
