"""What this machine has and lacks for a config: `doctor` shows it all, `train` looks at it first.

Every check gives one line, how bad it is, and the command that repairs it. The quick checks take a
second and import neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinyagent_fast.config import Config
from tinyagent_fast.data.cache import cache_folder
from tinyagent_fast.data.download import DATASET_REPOSITORY
from tinyagent_fast.data.reading import check_head, is_incomplete
from tinyagent_fast.errors import DataError, ModelError, TrainingError, UserError, count_of
from tinyagent_fast.models.published import PUBLISHED
from tinyagent_fast.presets import REAL_TEST, REAL_TRAIN

if TYPE_CHECKING:
    from tinyagent_fast.training.memory import MemoryEstimator

_GIB = 2**30
_ROOT = Path(__file__).resolve().parents[1]
_DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them is there where an NVIDIA driver runs; the last is that of Linux under Windows."""
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
"""Oldest Linux driver by major version of CUDA.

Source: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html.
"""
_EXPORT_PACKAGES = ("xllamacpp", "gguf")
_UNSLOTH_PACKAGES = ("unsloth", "unsloth-zoo", "xformers")
_SMALL_WEIGHTS = 400_000_000
"""In the layers; a larger model is no work for a CPU: a row of 128 tokens took TinyLlama a minute
on two cores. An embedding costs no time, so Gemma 3 270M and Qwen2.5 0.5B are small."""
_PUBLISHED_BYTES = {REAL_TRAIN: 734_000_000, REAL_TEST: 12_800_000}
"""Sizes of the published files. Source: the dataset's page (squeeze-ai-lab/TinyAgent-dataset)."""
_GENERATED_BYTES = 3200
"""Of a generated entry as JSON; measured: 66.8 MB for 24,200 short ones, 1.2 MB for 400 long."""
_EXPORT_BYTES_PER_WEIGHT = 12
"""Merged folder, f32 file to compare with and the GGUF files of the default flags, rounded up."""

Status = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    status: Status
    text: str
    fix: str | None = None
    """A command or setting; every warning and failure has one."""

    def __post_init__(self) -> None:
        """Hold warnings and failures to naming a fix."""
        assert self.status == "ok" or self.fix, f"{self.name}: what is wrong needs a fix"


def refuse_failures(findings: Sequence[Finding]) -> None:
    """Stop a command before it starts work that cannot end well.

    Raises:
        TrainingError: Names every failure and its fix; warnings are no reason to stop.
    """
    failures = [found for found in findings if found.status == "failure"]
    if failures:
        raise TrainingError(
            f"this machine is not ready: {len(failures)} check(s) failed",
            "\n       ".join(f"{found.name}: {found.text}" for found in failures),
            "\n       ".join(str(found.fix) for found in failures)
            + "\n       (tinyagent-fast doctor shows every check)",
        )


def find_out(
    config: Config, machine: Machine, *, automatic: bool, quick: bool = True, online: bool = False
) -> list[Finding]:
    """Make every check that takes about a second.

    Args:
        config: The run's config.
        machine: This machine.
        automatic: Whether the config's preset was chosen by what torch can use.
        quick: False makes the check of llama.cpp too.
        online: Asks the hub, too.
    """
    packages = check_packages(machine)
    found = [packages, check_gpu(config, machine, automatic=automatic)]
    if packages.status == "failure":
        return found  # the other checks would stumble over what is missing
    found += [check_memory(config, machine), check_backend(config, machine)]
    found += [*check_disk(config), check_base(config), *check_data(config)]
    found += check_catalogue(config)
    found += [] if quick else [check_export(machine), *check_exportable_base(config)]
    return [*found, *(check_hub(config) if online else [])]


# --- the machine


@dataclass(frozen=True)
class Gpu:
    """The GPU that a run would take; None stands for what the driver does not say."""

    name: str
    driver: str | None
    total_gib: float | None
    free_gib: float | None
    capability: tuple[int, int] | None

    @property
    def bf16(self) -> bool | None:
        """Whether it computes in bf16, which Ampere was the first to do."""
        return None if self.capability is None else self.capability >= (8, 0)


@dataclass(frozen=True)
class Machine:
    """Everything that the checks need to know of this machine."""

    gpu: Gpu | None
    gpu_problem: str | None
    """Why the installed torch cannot use the GPU, or sees no GPU where there may be one."""
    torch: str | None
    """Version of torch; None where it is not installed."""
    cuda: str | None
    """Version of CUDA that torch was built for; None for a build that knows no NVIDIA GPU."""
    memory_gib: float | None
    available_gib: float | None

    @property
    def usable_gpu(self) -> Gpu | None:
        """The GPU, where this torch can use it."""
        return self.gpu if self.cuda and not self.gpu_problem else None


def read_machine(*, ask_torch: bool = False) -> Machine:
    """Look at this machine, in a second and without importing torch.

    Args:
        ask_torch: Also let torch compute on the GPU, in a process of its own; takes seconds. It is
            asked in any case where a driver runs and nvidia-smi is not installed.
    """
    gpu, problem = _ask_nvidia_smi()
    torch, cuda = _torch_build()
    if gpu is not None and torch is not None:
        problem = _why_unusable(gpu, torch, cuda)
    hidden = gpu is None and any(path.exists() for path in _DRIVER_FILES)
    if cuda and problem is None and (hidden or (ask_torch and gpu is not None)):
        gpu, problem = _ask_torch(gpu)
    return Machine(gpu, problem, torch, cuda, *_memory_gib())


def _ask_nvidia_smi() -> tuple[Gpu | None, str | None]:
    """Give torch's first GPU, or why there is none; (None, None) where nothing speaks of one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None, f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, None
    asked = "driver_version,memory.total,memory.free,compute_cap,name"
    words = [program, f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    first = (visible or "").split(",")[0].strip()
    if first and not first.startswith("MIG"):  # the whole GPU is the best that is known of a part
        words.append(f"--id={first}")
    said, problem = _run(words, timeout_s=20)
    # The name comes last, because it alone may hold a comma.
    cells = said.partition("\n")[0].split(", ", 4)
    if problem or len(cells) < 5:
        return None, f"nvidia-smi says: {problem or said or 'nothing'}"
    driver, total, free, capability, name = cells
    # Cards that share the host's memory have [N/A] for it.
    total_gib, free_gib = (float(mib) / 1024 if mib.isdigit() else None for mib in (total, free))
    numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
    version = (int(numbers[1]), int(numbers[2])) if numbers else None
    return Gpu(name, driver, total_gib, free_gib, version), None


def _run(words: Sequence[str], *, timeout_s: float) -> tuple[str, str | None]:
    """Run a program; give its output, and in one line why it failed."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=_ROOT,  # so that a folder of our name in the current one is not imported
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer in {timeout_s:g} s"
    except OSError as error:
        return "", str(error)
    if done.returncode:
        said = (done.stderr + done.stdout).strip().splitlines()
        return "", f"exit code {done.returncode}: {said[-1] if said else 'nothing'}"
    return done.stdout.strip(), None


def _torch_build() -> tuple[str | None, str | None]:
    """Read torch's version and that of its CUDA from its version.py, which takes no time."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        try:
            text = (Path(folder) / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        values = dict(re.findall(r"^(__version__|cuda)\b.*=\s*['\"](.+)['\"]", text, re.MULTILINE))
        return values.get("__version__", "of unknown version"), values.get("cuda")
    return None, None


def _why_unusable(gpu: Gpu, torch: str, cuda: str | None) -> str | None:
    """Say why this torch cannot use the GPU, as far as that is known without asking it."""
    if cuda is None:
        return f"{gpu.name} is here, but torch {torch} was built without CUDA"
    oldest = _OLDEST_DRIVER.get(cuda.partition(".")[0], 0)
    driver = (gpu.driver or "").partition(".")[0]
    if driver.isdigit() and int(driver) < oldest:
        return (
            f"torch {torch} is built for CUDA {cuda} and needs driver {oldest} or newer, "
            f"{gpu.name} has {gpu.driver}"
        )
    return None


_COMPUTE = """
import json, torch
if not torch.cuda.is_available():
    raise SystemExit("torch.cuda.is_available() is False")
card = torch.cuda.get_device_properties(0)
ones = torch.ones((16, 16), device="cuda", dtype=torch.float16)
if not bool(((ones @ ones) == 16).all()):
    raise SystemExit("it multiplies wrongly")
free, total = torch.cuda.mem_get_info()
print(json.dumps([card.name, total / 2**30, free / 2**30, card.major, card.minor]))
"""


def _ask_torch(gpu: Gpu | None) -> tuple[Gpu | None, str | None]:
    """Let torch compute in a process of its own, because a broken driver can end that process."""
    said, problem = _run([sys.executable, "-c", _COMPUTE], timeout_s=120)
    if problem is not None:
        return gpu, f"{gpu.name if gpu else 'a driver'} is here, but torch says: {problem}"
    name, total_gib, free_gib, *capability = json.loads(said.splitlines()[-1])
    driver = gpu.driver if gpu else None
    return Gpu(name, driver, total_gib, free_gib, tuple(capability)), None


def _memory_gib(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[float | None, float | None]:
    """Give all and available memory, within the limit of a container where there is one."""
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    try:
        limit, used, about = (
            (cgroup / f"memory.{name}").read_text(encoding="ascii").strip()
            for name in ("max", "current", "stat")
        )
    except OSError:
        limit = used = about = ""
    if limit.isdigit() and int(limit) < total:  # "max" is no limit
        # File caches count as used, and are given up where memory is short.
        cached = re.search(r"^inactive_file (\d+)$", about, re.MULTILINE)
        total = int(limit)
        available = min(available, total - int(used) + int(cached[1] if cached else 0))
    return total / _GIB, available / _GIB


# --- packages, GPU and memory


def check_packages(machine: Machine) -> Finding:
    """Compare the installed packages with the versions that this project is tested with."""
    install = install_command(machine)
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in metadata.requires("tinyagent-fast") or ()]
    except metadata.PackageNotFoundError:
        text = "tinyagent-fast runs from its folder, so versions of packages were not compared"
        return Finding("packages", "warning", text, "python -m pip install --no-deps -e .")
    except ImportError as error:
        text = f"{error.name or 'what training needs'} is not installed"
        return Finding("packages", "failure", text, install)
    missing, other, count = [], [], 0
    for package in asked:
        extras = ("train", "gpu") if machine.gpu else ("train",)
        if package.marker and not any(package.marker.evaluate({"extra": e}) for e in extras):
            continue
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            if package.name.replace("_", "-") not in (*_EXPORT_PACKAGES, *_UNSLOTH_PACKAGES):
                missing.append(package.name)
            continue
        count += 1
        if not package.specifier.contains(version, prereleases=True):
            other.append(f"{package.name} {version} (tested: {package.specifier})")
    if missing:
        return Finding("packages", "failure", f"missing: {', '.join(sorted(missing))}", install)
    if any(text.startswith("trl 1.15.") for text in other) and find_spec("triton") is None:
        # Source: run on a machine without triton; its requirements file has the message.
        text = "trl 1.15 cannot train without triton"
        return Finding("packages", "failure", text, f"{install} (or: pip install trl==1.14.2)")
    if other:
        text = f"not as tested: {', '.join(other)}"
        return Finding("packages", "warning", text, install)
    python = ".".join(map(str, sys.version_info[:3]))
    return Finding("packages", "ok", f"{count} as tested, Python {python}")


def install_command(machine: Machine) -> str:
    """Give the command that installs what the project is tested with on such a machine."""
    lock = _ROOT / ("requirements.txt" if machine.gpu else "requirements-cpu.txt")
    if not lock.exists():  # the project was installed without its sources
        return f'python -m pip install "tinyagent-fast[{"gpu" if machine.gpu else "train"}]"'
    here = Path.cwd()
    return f"python -m pip install -r {lock.relative_to(here) if here in lock.parents else lock}"


def check_gpu(config: Config, machine: Machine, *, automatic: bool) -> Finding:
    """Say which GPU a run will take, and whether this torch can use it.

    It is a failure if something keeps torch from the GPU, unless a preset for the CPU was asked
    for by name, and a warning if bf16 is asked for and the GPU has none.
    """
    gpu, problem, small = machine.gpu, machine.gpu_problem, _is_small(config)
    if gpu is None:
        text = f"no NVIDIA GPU ({problem})" if problem else "no NVIDIA GPU"
        if not small:
            text = f"{text}: {config.model.base} takes minutes a step on a CPU"
            fix = "train on a machine with a GPU, or take --preset cpu"
            return Finding("gpu", "warning", text, fix)
        if problem and "hides" not in problem:
            fix = "repair the driver, if there is a GPU in this machine"
            return Finding("gpu", "warning", text, fix)
        return Finding("gpu", "ok", f"{text}: training runs on the CPU")
    if problem is not None:
        # The lock file is made for CUDA 12.
        fix = f"{install_command(machine)}, with driver {_OLDEST_DRIVER['12']} or newer"
        fix += "; to train the small model without it: --preset cpu"
        return Finding("gpu", "warning" if small and not automatic else "failure", problem, fix)
    text = gpu.name
    text += f", {gpu.total_gib:.1f} GiB" if gpu.total_gib is not None else ""
    text += f", compute capability {'.'.join(map(str, gpu.capability))}" if gpu.capability else ""
    text += f", driver {gpu.driver}" if gpu.driver else ""
    text += f", torch {machine.torch} for CUDA {machine.cuda}" if machine.torch else ""
    text += ", no bf16: it computes in fp16" if gpu.bf16 is False else ""
    if gpu.bf16 is False and config.model.weights == "bf16":
        return Finding("gpu", "warning", text, "--model.weights nf4 or fp16")
    return Finding("gpu", "ok", text)


def takes_unsloth(config: Config, machine: Machine) -> bool:
    """Say whether a run of this config on this machine uses Unsloth."""
    from tinyagent_fast.models.loading import choose_backend

    cuda = machine.usable_gpu is not None
    return config.train.qat == "off" and choose_backend(config.model, cuda=cuda) == "unsloth"


def check_backend(config: Config, machine: Machine) -> Finding:
    """Say which backend trains, and warn where torch's own attention (SDPA) is slow.

    That is on GPUs without bf16, and with the dense masks of packed rows.

    Source: select_attention_backend in unsloth/utils/attention_dispatch.py (2026.10).
    """
    install, gpu = install_command(machine), machine.usable_gpu
    if config.model.backend == "unsloth" and find_spec("unsloth") is None:
        text = "unsloth is asked for and not installed"
        return Finding("backend", "failure", text, f"{install}, or --model.backend transformers")
    unsloth = takes_unsloth(config, machine)
    backend = "unsloth" if unsloth else "transformers"
    if gpu is None:
        return Finding("backend", "ok", f"{backend}, on the CPU")
    wanted = config.model.backend == "auto" and config.train.qat == "off"
    if wanted and find_spec("unsloth") is None:
        text = "transformers, because unsloth is not installed: slower"
        return Finding("backend", "warning", text, install)
    packed, old = config.train.batching == "packed", gpu.bf16 is False
    kernels = ["xformers"] if old else ["flash_attn", "xformers"]
    if unsloth and (packed or old) and not any(map(find_spec, kernels)):
        why = "with packed rows" if packed else "on a GPU without bf16"
        text = f"unsloth, with torch's own attention (SDPA): slow {why}; xformers is not installed"
        return Finding("backend", "warning", text, install)
    return Finding("backend", "ok", backend)


def _estimator(
    config: Config, backend: str = "transformers", usable_gib: float = 0.0
) -> MemoryEstimator | None:
    """Estimate with rows of the longest length allowed; None where the base's size is not known."""
    from tinyagent_fast.training.memory import MemoryEstimator, base_shape, row_lengths

    try:
        shape = base_shape(config.model.base)
    except ModelError:
        return None
    longest = config.model.max_length_tokens
    lengths, _ = row_lengths(config, (longest, longest))
    return MemoryEstimator(
        config=config, shape=shape, lengths=lengths, backend=backend, usable_gib=usable_gib
    )


def _weights(estimator: MemoryEstimator) -> int:
    return estimator.shape.body_weights + estimator.shape.embedding_weights


def _is_small(config: Config) -> bool:
    """Say whether a CPU can train the base model in a reasonable time."""
    estimator = _estimator(config)
    return estimator is not None and estimator.shape.body_weights < _SMALL_WEIGHTS


def check_memory(config: Config, machine: Machine) -> Finding:
    """Compare what a micro-batch is predicted to need with what is free, on the GPU or without one.

    Where it may not fit there is a warning, as it is an estimate, and training measures it before
    step 1; a machine without a GPU that surely has too little is a failure.
    """
    from tinyagent_fast.training.memory import ERROR_SHARE, LIBRARIES_GIB, RESERVE_GIB, with_batch

    gpu, model = machine.usable_gpu, config.model
    name = "gpu memory" if gpu else "memory"
    total = gpu.total_gib if gpu else machine.memory_gib
    free = gpu.free_gib if gpu else machine.available_gib
    if total is None or free is None:
        return Finding(name, "ok", "how much is free is not known")
    text = f"{free:.1f} of {total:.1f} GiB free"
    usable = min(free, total - RESERVE_GIB) if gpu else free - LIBRARIES_GIB
    if gpu is None and model.weights in ("bf16", "fp16"):
        config = replace(config, model=replace(model, weights="fp32"))  # as training does on a CPU
    backend = "unsloth" if takes_unsloth(config, machine) else "transformers"
    estimator = _estimator(config, backend, usable)
    if estimator is None:
        text += f"; the size of {model.base} is not known before it is loaded"
        return Finding(name, "ok", text)
    largest = estimator.largest_batch(model.gradient_checkpointing)
    if config.train.batch == "auto":
        estimator = replace(estimator, config=with_batch(config, largest.batch))
    predicted = estimator.estimate()
    text += (
        f"; {predicted.total_gib:.1f} GiB predicted (+-{100 * ERROR_SHARE:.0f} %) for "
        f"{_micro_batch(estimator)}"
    )
    if predicted.fits(usable):
        return Finding(name, "ok", text)
    fixes = []
    if total - free > 1.0:  # what a desktop shows is less
        fixes.append("end other programs" + " (nvidia-smi lists them)" * bool(gpu))
    if largest.fits:
        fixes.append(f"--train.batch {largest.batch} --train.accumulation {largest.accumulation}")
    show = f"tinyagent-fast memory --gpu-gib {total:.0f} shows what fits"
    fixes.append(show if gpu else "take a machine with more memory")
    too_small = gpu is None and predicted.total_gib * (1 - ERROR_SHARE) > total - LIBRARIES_GIB
    status: Status = "failure" if too_small else "warning"
    return Finding(name, status, f"{text} may not fit", ", or ".join(fixes))


def _micro_batch(estimator: MemoryEstimator) -> str:
    """Say what is computed at one time: the config's rows, or as many tokens as `auto` leaves."""
    batch = estimator.config.train.rows_per_batch
    kept = estimator.kept_tokens(batch)
    how = estimator.config.model.gradient_checkpointing
    if how != "auto" or kept >= estimator.computed_tokens(batch):
        return f"{batch} x {estimator.row_tokens:,} tokens"
    if kept >= estimator.computed_tokens(1):
        return f"micro-batches that are cut to {kept:,} tokens"
    return f"1 x {estimator.row_tokens:,} tokens, whose layers are computed again"


# --- disk, base model and data


def disk_uses(config: Config) -> list[tuple[str, Path, float]]:
    """List what training and an export with its default flags will write, as far as it is missing.

    Returns:
        Name, folder and GiB of each; a base model of unknown size is left out.
    """
    from huggingface_hub import constants

    from tinyagent_fast.training.memory import adapter_weights

    data, runs = config.data, config.runs
    size = float(data.generated_entries * _GENERATED_BYTES)
    if data.train is not None:
        there = data.train.exists()
        size = data.train.stat().st_size if there else _PUBLISHED_BYTES.get(data.train, 0)
    uses = [("cache", cache_folder(), 2 * size)]  # entries, and rows as token ids
    if data.train is None or not data.train.exists():
        # The hub's cache and this folder share one copy if they are on the same disk.
        uses.append(("data", data.train.parent if data.train else Path("data"), size))
    estimator = _estimator(config)
    if estimator is not None:
        weights, adapter = _weights(estimator), adapter_weights(estimator.shape, config.lora)
        if not _base_is_here(config):
            uses.append(("base", Path(constants.HF_HUB_CACHE), 2 * weights))
        elif not Path(config.model.base).is_dir() and _made_here(config.model.base):
            uses.append(("base", runs, 4 * weights))
        # Three checkpoints with AdamW's moments, and two copies of the adapter.
        moments = 2 if config.train.optimizer == "adamw_8bit" else 8
        uses.append(("checkpoints", runs, adapter * (3 * (4 + moments) + 2 * 4)))
        uses.append(("export", runs, _EXPORT_BYTES_PER_WEIGHT * weights))
    return [(what, folder, size / _GIB) for what, folder, size in uses]


def check_disk(config: Config) -> list[Finding]:
    """Compare what will be written with what is free on each disk that gets some of it."""
    disks: dict[int, dict[str, float]] = {}
    free_gib: dict[int, float] = {}
    for what, wanted, size_gib in disk_uses(config):
        path = wanted.absolute()
        folder = next(folder for folder in (path, *path.parents) if folder.exists())
        disk = folder.stat().st_dev
        free_gib[disk] = shutil.disk_usage(folder).free / _GIB
        disks.setdefault(disk, {})[what] = size_gib
    return [disk_finding(sizes_gib, free_gib[disk]) for disk, sizes_gib in disks.items()]


def disk_finding(sizes_gib: Mapping[str, float], free_gib: float) -> Finding:
    """Say whether a disk is large enough: for training it must be, for an export it should be."""
    total = sum(sizes_gib.values())
    train = total - sizes_gib.get("export", 0.0)
    parts = [f"{what} {size:.1f}" for what, size in sizes_gib.items() if size >= 0.05]
    text = f"{free_gib:.1f} GiB free, about {total:.1f} needed ({', '.join(parts) or 'little'})"
    if train > free_gib:
        where = "another disk: --runs FOLDER for runs, HF_HOME for the hub's cache"
        fix = f"free {train - free_gib:.1f} GiB, or use {where}"
        return Finding("disk", "failure", text, fix)
    if total > free_gib:
        fix = f"free {total - free_gib:.1f} GiB before an export, or export with --out or --quant"
        return Finding("disk", "warning", text, fix)
    return Finding("disk", "ok", text)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _is_cached(repo: str, name: str, kind: str, revision: str | None = None) -> bool:
    """Say whether the hub's cache has a file."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, repo_type=kind, revision=revision)
    return isinstance(found, str)


def _made_here(base: str) -> bool:
    """Say whether the first run puts the base into its own folder, whatever it makes it from."""
    return base in ("nano", "random", *PUBLISHED) or base.endswith(".gguf")


def _base_is_here(config: Config) -> bool:
    base, revision = config.model.base, config.model.revision
    if Path(base).is_dir() or _made_here(base):
        return True
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return any(_is_cached(base, name, "model", revision) for name in names)


def check_base(config: Config) -> Finding:
    """Say where the base model comes from; a failure where it cannot be had."""
    base = config.model.base
    if base in ("nano", "random"):
        return Finding("base", "ok", f"{base}, made on the spot")
    if base in PUBLISHED:
        known = PUBLISHED[base]
        text = f"{known.title} ({known.licence}), from {known.hub} on the hub where it answers, "
        text += f"else from the package {known.package}, {known.wheel_mib} MiB"
        return Finding("base", "ok", text)
    if base.endswith(".gguf"):
        if Path(base).is_file():
            return Finding("base", "ok", f"file {base}, dequantised by the first run")
        return Finding("base", "failure", f"there is no file {base}", "correct --model.base")
    if Path(base).is_dir():
        if (Path(base) / "config.json").exists():
            return Finding("base", "ok", f"folder {base}")
        fix = "copy the whole model into it, or name another folder with --model.base"
        return Finding("base", "failure", f"folder {base} holds no config.json", fix)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        fix = "name a folder with config.json and weights, or a model on the hub, with --model.base"
        return Finding("base", "failure", f"there is no folder {base}", fix)
    if _base_is_here(config):
        return Finding("base", "ok", f"{base}, in the hub's cache")
    if _offline():
        text = f"{base} is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
        fix = "unset HF_HUB_OFFLINE, or put the model into a folder and name that with --model.base"
        return Finding("base", "failure", text, fix)
    return Finding("base", "ok", f"{base}, downloaded by the first run")


def check_catalogue(config: Config) -> list[Finding]:
    """Read the tools of a catalogue, which scoring would only need after the model is loaded."""
    from tinyagent_fast.data.generation.catalogue import plan_tools

    if config.data.catalogue is None:
        return []
    try:
        tools = plan_tools(config.data.catalogue) or {}
    except DataError as error:
        return [Finding("catalogue", "failure", f"{error.what}: {error.why}", error.fix)]
    return [Finding("catalogue", "ok", f"{config.data.catalogue}: {count_of(len(tools), 'tool')}")]


def check_data(config: Config) -> list[Finding]:
    """Look at both ends of the data files; `data check` reads all of them."""
    data, download = config.data, "tinyagent-fast data download"
    if data.train is None:
        text = f"{data.generated_entries:,} entries are generated on the spot"
        return [Finding("data", "ok", text)]
    if data.train == REAL_TRAIN and not REAL_TRAIN.exists():
        if _offline() and not _is_cached(DATASET_REPOSITORY, REAL_TRAIN.name, "dataset"):
            text = f"{REAL_TRAIN} is not there, and HF_HUB_OFFLINE forbids to download it"
            fix = f"unset HF_HUB_OFFLINE and run {download}, or copy it as data/README.md says"
            return [Finding("data", "failure", text, fix)]
        size = sum(_PUBLISHED_BYTES.values()) / 1e6
        text = f"{REAL_TRAIN} is not there: training downloads the published files ({size:.0f} MB)"
        return [Finding("data", "ok", text)]
    found = []
    for path in filter(None, (data.train, data.test)):
        try:
            check_head(path)
        except DataError as error:
            problem = f"{error.what}: {error.why}"
        else:
            problem = f"{path} is cut off: its JSON object is not closed" * is_incomplete(path)
        if problem:
            named = "name another file with --data.train and --data.test"
            fix = download if path in _PUBLISHED_BYTES else named
            found.append(Finding("data", "failure", problem, fix))
        else:
            size = path.stat().st_size / 1e6
            found.append(Finding("data", "ok", f"{path}: {size:,.1f} MB"))
    return found


# --- export and hub


def check_export(machine: Machine) -> Finding:
    """Load llama.cpp's package in a process of its own, since a wrong build can abort."""
    install, needed_for = install_command(machine), "an export needs it, training does not"
    missing = [name for name in _EXPORT_PACKAGES if find_spec(name) is None]
    if missing:
        text = f"{', '.join(missing)} missing: {needed_for}"
        return Finding("export", "warning", text, install)
    words = [sys.executable, "-c", "import xllamacpp; xllamacpp.Server"]
    _, problem = _run(words, timeout_s=30)
    if problem is not None:
        fix = "apt-get install libgomp1 (dnf install libgomp)" if "libgomp" in problem else install
        text = f"xllamacpp cannot be loaded: {problem}; {needed_for}"
        return Finding("export", "warning", text, fix)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _EXPORT_PACKAGES)
    return Finding("export", "ok", versions)


def check_exportable_base(config: Config) -> list[Finding]:
    """Say whether a base model that is here can become a GGUF file after training."""
    model = config.model
    here = _base_is_here(config) and not _made_here(model.base)
    if not here or check_base(config).status == "failure" or find_spec("gguf") is None:
        return []
    from tinyagent_fast.export.conversion import export_obstacle
    from tinyagent_fast.prompts.loading import load_tokenizer, resolve_tokenizer_folder
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    try:
        loaded = load_tokenizer(resolve_tokenizer_folder(model.base, model.revision))
    except UserError as error:
        return [Finding("base", "failure", f"{error.what}: {error.why}", error.fix)]
    tokenizer = PromptTokenizer(loaded, model.prompt_format)
    obstacle = export_obstacle(model.base, model.revision, tokenizer)
    if obstacle is None:
        return [Finding("base", "ok", f"{model.base} can become a GGUF file")]
    fix = "take a base of docs/models.md, or train and evaluate without a GGUF file"
    return [Finding("base", "warning", f"it trains, and cannot be exported: {obstacle}", fix)]


def check_hub(config: Config) -> list[Finding]:
    """Ask the hub for what a run would download, and cannot do without."""
    found = []
    if not _base_is_here(config):
        found.append(_ask_hub(config.model.base, "config.json", "model", config.model.revision))
    data = config.data
    encoder = data.retriever_encoder
    retrieves = data.prompts == "retrieved" and data.retriever == "encoder"
    if (
        retrieves
        and not Path(encoder).is_dir()
        and not _is_cached(encoder, "model.safetensors", "model")
    ):
        found.append(_ask_hub(encoder, "config.json", "model", None))
    named = (data.train, data.test)
    missing = [path for path in (REAL_TRAIN, REAL_TEST) if path in named and not path.exists()]
    if missing:
        found.append(_ask_hub(DATASET_REPOSITORY, missing[0].name, "dataset", None))
    return found or [Finding("hub", "ok", "not asked: nothing has to be fetched from it")]


def _ask_hub(repo: str, name: str, kind: str, revision: str | None) -> Finding:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(repo, name, repo_type=kind, revision=revision)
        get_hf_file_metadata(url, timeout=8.0)
    except Exception as error:  # its library raises its own errors, those of httpx and of sockets
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = f"{repo} cannot be fetched: {first_line}"
        fix = "check the network, a proxy or HF_ENDPOINT; `hf auth login` if it asks for that"
        return Finding("hub", "failure", text, fix)
    return Finding("hub", "ok", f"{repo} can be fetched")
