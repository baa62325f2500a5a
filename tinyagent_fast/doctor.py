"""What this machine has and lacks for a config: `doctor` shows it all, `train` looks at it first.

Every check gives one line, how bad it is, and the command that repairs it. Neither torch nor
transformers is imported; where an NVIDIA driver runs, torch is asked in a process of its own.
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
from tinyagent_fast.display import size_text
from tinyagent_fast.errors import DataError, ModelError, TrainingError, UserError, count_of
from tinyagent_fast.models.published import PUBLISHED
from tinyagent_fast.presets import REAL_TEST, REAL_TRAIN

if TYPE_CHECKING:
    from tinyagent_fast.training.memory import MemoryEstimator

_GIB = 2**30
_ROOT = Path(__file__).resolve().parents[1]
_DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them is there where an NVIDIA driver runs; the last is that of Linux under Windows."""
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

    `automatic` says that the preset was chosen by what torch can use. Without `quick` llama.cpp is
    loaded too, and with `online` the hub is asked.
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
    """The GPU that a run would take, as torch sees it."""

    name: str
    total_gib: float
    free_gib: float
    capability: tuple[int, int]

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16, which Ampere was the first to do."""
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Machine:
    """Everything that the checks need to know of this machine."""

    gpu: Gpu | None
    """None where torch can use none."""
    gpu_problem: str | None
    """Why it cannot, where something speaks of a GPU."""
    is_listed: bool
    """Whether nvidia-smi lists a GPU; the packages are then those for CUDA."""
    memory_gib: float | None
    available_gib: float | None


def read_machine() -> Machine:
    """Look at this machine; torch computes on its GPU, if there may be one, which takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        hidden = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
        return Machine(None, hidden, False, *main_memory_gib())
    gpu, problem, said = None, None, ""
    if program := shutil.which("nvidia-smi"):
        words = [program, "--query-gpu=name", "--format=csv,noheader"]
        first = (visible or "").split(",")[0].strip()
        if first and not first.startswith("MIG"):  # it knows no parts of a GPU
            words.append(f"--id={first}")
        said, problem = _run(words, timeout_s=20)
    is_listed = bool(said) and "No devices" not in said
    if is_listed or any(path.exists() for path in _DRIVER_FILES):
        gpu, problem = _ask_torch()
        if not is_listed and problem and "not compiled with CUDA" in problem:
            problem = None  # the driver is that of the machine around a container
    elif program:
        problem = f"nvidia-smi says: {problem or said or 'nothing'}"
    return Machine(gpu, problem, is_listed, *main_memory_gib())


def _run(words: Sequence[str], *, timeout_s: float) -> tuple[str, str | None]:
    """Run a program; give its output, and in one line why it failed."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
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


_COMPUTE = """
import json, torch
try:
    card = torch.cuda.get_device_properties(0)
    ones = torch.ones((16, 16), device="cuda", dtype=torch.float16)
    right = bool(((ones @ ones) == 16).all())
    free, total = torch.cuda.mem_get_info()
except Exception as error:
    raise SystemExit(" ".join(str(error).split())[:300] or repr(error))
if not right:
    raise SystemExit("it multiplies wrongly")
print(json.dumps([card.name, total / 2**30, free / 2**30, [card.major, card.minor]]))
"""


def _ask_torch() -> tuple[Gpu | None, str | None]:
    """Let torch compute in a process of its own, because a broken driver can end that process."""
    said, problem = _run([sys.executable, "-c", _COMPUTE], timeout_s=120)
    if problem is not None:
        return None, f"torch says: {problem}"
    name, total_gib, free_gib, capability = json.loads(said.splitlines()[-1])
    return Gpu(name, total_gib, free_gib, tuple(capability)), None


def main_memory_gib(cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[float | None, float | None]:
    """Give all and available main memory, within the limit of a container where there is one."""
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
        extras = ("train", "gpu") if machine.is_listed else ("train",)
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
    if other:
        text = f"not as tested: {', '.join(other)}"
        return Finding("packages", "warning", text, install)
    python = ".".join(map(str, sys.version_info[:3]))
    return Finding("packages", "ok", f"{count} as tested, Python {python}")


def install_command(machine: Machine) -> str:
    """Give the command that installs what the project is tested with on such a machine."""
    lock = _ROOT / ("requirements.txt" if machine.is_listed else "requirements-cpu.txt")
    if not lock.exists():  # the project was installed without its sources
        return f'python -m pip install "tinyagent-fast[{"gpu" if machine.is_listed else "train"}]"'
    here = Path.cwd()
    return f"python -m pip install -r {lock.relative_to(here) if here in lock.parents else lock}"


def check_gpu(config: Config, machine: Machine, *, automatic: bool) -> Finding:
    """Say which GPU a run will take, and whether this torch can use it.

    It is a failure if something keeps torch from the GPU, unless a preset for the CPU was asked
    for by name, and a warning if bf16 is asked for and the GPU has none.
    """
    gpu, problem, small = machine.gpu, machine.gpu_problem, _is_small(config)
    if gpu is not None:
        text = f"{gpu.name}, {gpu.total_gib:.1f} GiB, compute capability "
        text += ".".join(map(str, gpu.capability))
        text += "" if gpu.bf16 else ", no bf16: it computes in fp16"
        if config.model.weights == "bf16" and not gpu.bf16:
            return Finding("gpu", "warning", text, "--model.weights nf4 or fp16")
        return Finding("gpu", "ok", text)
    if machine.is_listed:
        fix = f"{install_command(machine)}, and a driver that is new enough for it"
        fix += "; to train the small model without the GPU: --preset cpu"
        status: Status = "warning" if small and not automatic else "failure"
        return Finding("gpu", status, f"a GPU is here, but {problem}", fix)
    text = f"no NVIDIA GPU ({problem})" if problem else "no NVIDIA GPU"
    if not small:
        text = f"{text}: {config.model.base} takes minutes a step on a CPU"
        fix = "train on a machine with a GPU, or take --preset cpu"
        return Finding("gpu", "warning", text, fix)
    if problem and "hides" not in problem:
        fix = "repair the driver, if there is a GPU in this machine"
        return Finding("gpu", "warning", text, fix)
    return Finding("gpu", "ok", f"{text}: training runs on the CPU")


def takes_unsloth(config: Config, machine: Machine) -> bool:
    """Say whether a run of this config on this machine uses Unsloth."""
    from tinyagent_fast.models.loading import choose_backend

    backend = choose_backend(config.model, cuda=machine.gpu is not None)
    return config.train.qat == "off" and backend == "unsloth"


def check_backend(config: Config, machine: Machine) -> Finding:
    """Say which backend trains, and warn where torch's own attention (SDPA) is slow.

    That is on GPUs without bf16, and with the dense masks of packed rows.

    Source: select_attention_backend in unsloth/utils/attention_dispatch.py (2026.10).
    """
    install, gpu = install_command(machine), machine.gpu
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
    packed, old = config.train.batching == "packed", not gpu.bf16
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
    from tinyagent_fast.training.memory import MemoryEstimator, base_shape, longest_rows

    try:
        shape = base_shape(config.model.base)
    except ModelError:
        return None
    return MemoryEstimator(
        config=config,
        shape=shape,
        lengths=longest_rows(config),
        backend=backend,
        usable_gib=usable_gib,
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

    gpu, model = machine.gpu, config.model
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
    text += f"; {predicted.total_gib:.1f} GiB predicted (+-{100 * ERROR_SHARE:.0f} %)"
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


# --- disk, base model and data


def disk_uses(config: Config) -> list[tuple[str, Path, float]]:
    """List what training and an export with its default flags will write, as far as it is missing.

    Returns:
        Name, folder and GiB of each; a base model of unknown size is left out.
    """
    from huggingface_hub import constants

    from tinyagent_fast.training.memory import adapter_weights

    data, runs = config.data, config.runs
    folder, own, missing, generated = Path("data"), 0, 0, data.generated_entries * _GENERATED_BYTES
    if data.train is not None:
        generated *= data.with_generated
        if data.train.exists():
            own = data.train.stat().st_size
        else:
            folder, own = data.train.parent, _PUBLISHED_BYTES.get(data.train, 0)
            missing = own  # its copy in the hub's cache is the same one on the same disk
    # Entries, and rows as token ids, of which own ones may stand there several times.
    cached = own + generated + (own * data.own_passes + generated)
    uses = [("cache", cache_folder(), float(cached))]
    if missing or generated:
        uses.append(("data", folder, float(missing + generated)))
    estimator = _estimator(config)
    if estimator is not None:
        weights, adapter = _weights(estimator), adapter_weights(estimator.shape, config.lora)
        if not _base_is_here(config):
            uses.append(("base", Path(constants.HF_HUB_CACHE), 2 * weights))
        elif not Path(config.model.base).is_dir() and _made_here(config.model.base):
            uses.append(("base", runs, 4 * weights))
        # Three checkpoints with AdamW's moments, and two copies of the adapter.
        uses.append(("checkpoints", runs, adapter * (3 * (4 + 8) + 2 * 4)))
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

    try:
        return isinstance(
            try_to_load_from_cache(repo, name, repo_type=kind, revision=revision), str
        )
    except ValueError:  # a name that no repository can have, such as that of a missing folder
        return False


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
    base, path = config.model.base, Path(config.model.base)
    if base in ("nano", "random"):
        return Finding("base", "ok", f"{base}, made on the spot")
    if base in PUBLISHED:
        known = PUBLISHED[base]
        text = f"{known.title} ({known.licence}), from {known.hub} on the hub where it answers, "
        text += f"else from the package {known.package}, {known.wheel_mib} MiB"
        return Finding("base", "ok", text)
    is_gguf = base.endswith(".gguf")
    if path.is_file() if is_gguf else (path / "config.json").exists():
        return Finding("base", "ok", f"{base}{', dequantised by the first run' * is_gguf}")
    if is_gguf or path.is_dir() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        text = f"there is no file {base}" if is_gguf else f"no folder {base} holds a config.json"
        fix = "name a folder with config.json and weights, a .gguf file, or a model on the hub, "
        return Finding("base", "failure", text, f"{fix}with --model.base")
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
        size = size_text(sum(_PUBLISHED_BYTES.values()))
        text = f"{REAL_TRAIN} is not there: training downloads the published files ({size})"
        return [Finding("data", "ok", text)]
    found = []
    if data.with_generated:
        text = f"{data.generated_entries:,} entries are generated on the spot, beside the file's"
        found.append(Finding("data", "ok", text))
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
            found.append(Finding("data", "ok", f"{path}: {size_text(path.stat().st_size)}"))
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
