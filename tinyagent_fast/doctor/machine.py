"""What this machine is, read in a second and without importing torch: GPU, torch's build, memory.

nvidia-smi answers for the GPU, and a file of torch's says what it was built for. Where that is not
enough, `probe` asks torch itself in a process of its own.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyagent_fast.doctor.probe import Probe

_GIB = 2**30
_ASKED = ("index", "uuid", "driver_version", "memory.total", "memory.free", "compute_cap", "name")
_SMI_TIMEOUT_S = 20
_CGROUP = Path("/sys/fs/cgroup")
_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them is there where a driver runs; the last is that of Linux under Windows."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU that a run would take; none stands for what the driver does not say."""

    name: str
    driver: str | None
    total_gib: float | None
    free_gib: float | None
    capability: tuple[int, int] | None

    @property
    def bf16(self) -> bool | None:
        """Whether it computes in bf16, which Ampere was the first to do."""
        return None if self.capability is None else self.capability >= (8, 0)


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """What the installed torch was built for."""

    version: str
    cuda: str | None
    """Version of CUDA; none for a build that knows no NVIDIA GPU."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything that checks need to know of this machine."""

    python: tuple[int, int, int]
    gpu: Gpu | None
    gpu_note: str | None
    """Why no GPU is seen where there may be one."""
    torch: TorchBuild | None
    memory_gib: float | None
    available_gib: float | None

    @property
    def torch_sees_gpu(self) -> bool:
        """Whether torch is of a build that can use the GPU."""
        return self.gpu is not None and self.torch is not None and self.torch.cuda is not None

    def as_probed(self, probe: Probe | None) -> Machine:
        """Take what torch says of the GPU for what nvidia-smi said.

        Args:
            probe: What torch said; none changes nothing.

        Returns:
            The machine as a run will see it.
        """
        if probe is None or not probe.cuda or probe.name is None:
            return self
        gpu = Gpu(
            name=probe.name,
            driver=self.gpu.driver if self.gpu else None,
            total_gib=probe.total_gib,
            free_gib=probe.free_gib,
            capability=probe.capability,
        )
        return replace(self, gpu=gpu, gpu_note=None)


def read_machine() -> Machine:
    """Look at this machine.

    Returns:
        What it is.
    """
    gpu, note = _read_gpu(os.environ)
    total, available = _read_memory()
    return Machine(
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        gpu=gpu,
        gpu_note=note,
        torch=read_torch_build(),
        memory_gib=total,
        available_gib=available,
    )


def driver_is_loaded() -> bool:
    """Say whether an NVIDIA driver runs, also where nvidia-smi is not installed.

    Returns:
        Whether it does.
    """
    return any(path.exists() for path in _DRIVER)


def read_torch_build() -> TorchBuild | None:
    """Read what torch was built for from its version.py, which takes no time.

    Returns:
        The build; none where torch is not installed.
    """
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        try:
            tree = ast.parse((Path(folder) / "version.py").read_text(encoding="utf-8"))
        except (OSError, SyntaxError):
            continue
        values = dict(filter(None, map(_assigned, tree.body)))
        if values.get("__version__"):
            return TorchBuild(version=str(values["__version__"]), cuda=values.get("cuda"))
    return None


def _assigned(statement: ast.stmt) -> tuple[str, str | None] | None:
    """Give name and value of a line like `cuda: Optional[str] = '12.8'`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target, value = statement.target, statement.value
    else:
        return None
    if not isinstance(target, ast.Name) or not isinstance(value, ast.Constant):
        return None
    return target.id, value.value if isinstance(value.value, str) else None


def _read_gpu(environment: Mapping[str, str]) -> tuple[Gpu | None, str | None]:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None, f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, None
    rows, problem = _ask_smi(program, _ASKED)
    if problem and "compute_cap" in problem:  # unknown to drivers before R510
        rows, problem = _ask_smi(program, tuple(f for f in _ASKED if f != "compute_cap"))
    if problem:
        return None, f"nvidia-smi says: {problem}"
    chosen = _chosen(rows, visible)
    if chosen is None:
        return None, f"CUDA_VISIBLE_DEVICES={visible!r} names no GPU of nvidia-smi's"
    return _gpu(chosen), None


def _ask_smi(program: str, fields: tuple[str, ...]) -> tuple[list[dict[str, str]], str | None]:
    """Give a row for each GPU, or what is wrong."""
    words = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], str(error)
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        return [], said.split("\n")[0] or f"exit code {done.returncode}"
    # The name comes last, because it alone may hold a comma.
    cells = [line.split(", ", len(fields) - 1) for line in done.stdout.splitlines() if line.strip()]
    rows = [dict(zip(fields, row, strict=True)) for row in cells if len(row) == len(fields)]
    return (rows, None) if rows else ([], said or "nothing")


def _chosen(rows: list[dict[str, str]], visible: str | None) -> dict[str, str] | None:
    """Find the GPU that is torch's first one."""
    if visible is None:
        return rows[0]
    first = visible.split(",")[0].strip()
    for row in rows:
        if row["index"] == first or (first.startswith("GPU-") and row["uuid"].startswith(first)):
            return row
    # A part of a GPU is named by an id of its own; the GPU is the best that is known of it.
    return rows[0] if first.startswith("MIG") else None


def _gpu(row: Mapping[str, str]) -> Gpu:
    major, _, minor = row.get("compute_cap", "").partition(".")
    known = major.isdigit() and minor.isdigit()
    return Gpu(
        name=row["name"],
        driver=row["driver_version"],
        total_gib=_gib_of_mib(row["memory.total"]),
        free_gib=_gib_of_mib(row["memory.free"]),
        capability=(int(major), int(minor)) if known else None,
    )


def _gib_of_mib(text: str) -> float | None:
    """Read a size; cards that share the host's memory have [N/A] there."""
    return float(text) / 1024 if text.isdigit() else None


def _read_memory() -> tuple[float | None, float | None]:
    """Give all and available memory, within the limit of a container where there is one."""
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit, used = _container_memory(_CGROUP)
    if limit is not None and limit < total:
        total = limit
        available = min(available, max(0, limit - (used or 0)))
    return total / _GIB, available / _GIB


def _container_memory(folder: Path) -> tuple[int | None, int | None]:
    """Give limit and use of a control group, in version 2 or 1 of them; file caches can shrink."""
    for limit, used, statistics, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            most = (folder / limit).read_text(encoding="ascii").strip()
            now = (folder / used).read_text(encoding="ascii").strip()
            lines = (folder / statistics).read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        if not (most.isdigit() and now.isdigit()):
            continue  # "max": no limit
        words = (line.split() for line in lines)
        shrinkable = sum(int(w[1]) for w in words if len(w) == 2 and w[0] == cached)
        return int(most), max(0, int(now) - shrinkable)
    return None, None
