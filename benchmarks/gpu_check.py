"""Measure on a CUDA machine what the project claims: `make gpu-check`, under eight minutes.

Needs no network and no installed package: weights, tokenizer and rows are made on the spot, in the
real model's shape. Each group of measurements has its own process; a failure, a lack of memory or a
hang costs that measurement alone. The JSON file is whole at any time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_check_plan import FULL, TINY, Group, Measurement, Scale, as_one_process, groups
from gpu_check_results import Results, print_table, ratios
from gpu_check_runner import Runner

FORMAT = 1
NO_CUDA_EXIT = 2
_SUMMARY_S = 5.0
_MACHINE = Measurement(name="machine", kind="machine", least_s=0, limit_s=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table.

    Args:
        arguments: Without the program's name; none takes those of the process.

    Returns:
        0 when all that was tried ran or only lacked memory, 1 when something failed, 2 without a
        CUDA device.
    """
    flags = _flags(arguments)
    started = time.time()
    scale = TINY if flags.tiny else FULL
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    _set_environment(work, flags.tiny)
    card = "cpu-tiny" if flags.tiny else _card_name()
    stamp = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(started))
    results = Results(
        flags.out / f"gpu-check-{card}-{stamp}.json",
        {
            "format": FORMAT,
            "tiny": flags.tiny,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
            "finished": None,
            "seconds": None,
            "budget_s": flags.budget_s,
            "cap_gib": flags.cap_gib,
            "ratios": None,
        },
    )
    runner = Runner(
        results=results,
        work=work,
        scale=scale,
        deadline=started + flags.budget_s - _SUMMARY_S,
        tiny=flags.tiny,
        cap_gib=flags.cap_gib,
        tokenizer=flags.tokenizer.resolve() if flags.tokenizer else None,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if not _measure(runner, scale, flags):
            return NO_CUDA_EXIT
    except KeyboardInterrupt:
        print("stopped from outside; what was measured is kept")
    finally:
        runner.stop()
        _finish(results, started, scale)
        shutil.rmtree(work, ignore_errors=True)
    bad = [r for r in results.measurements.values() if r["status"] not in ("ok", "oom", "not run")]
    return 1 if bad else 0


def _measure(runner: Runner, scale: Scale, flags: argparse.Namespace) -> bool:
    """Look at the machine first; tell whether there is a device, or none is asked for."""
    chosen = groups(scale)
    if flags.tiny:
        chosen = as_one_process(
            [Group(name="machine", measurements=(_MACHINE,)), *_selected(chosen, flags.only)]
        )
        runner.run(chosen)
        return True
    runner.run([Group(name="machine", measurements=(_MACHINE,))])
    figures = runner.results.measurements["machine"]["figures"]
    if figures is not None and figures["card"] is None:
        print(
            "error: no CUDA device was found\n"
            "  why: every figure of this check is one of a GPU\n"
            "  fix: run it on a CUDA machine; --tiny goes through all parts on the CPU"
        )
        return False
    runner.run(_selected(chosen, flags.only))
    return True


def _selected(chosen: Sequence[Group], only: Sequence[str]) -> list[Group]:
    return [g for g in chosen if not only or g.name in only or g.name == "inputs"]


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    root = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=root / "results", help="folder of the JSON")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--cap-gib", type=float, default=22.0, help="GPU memory to use; 0: all")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model for real token counts")
    parser.add_argument("--only", nargs="*", default=[], help="names of groups; none: all")
    parser.add_argument("--tiny", action="store_true", help="all parts on the CPU, in small")
    flags = parser.parse_args(arguments)
    if flags.tokenizer is not None and not flags.tokenizer.is_file():
        parser.error(f"--tokenizer {flags.tokenizer}: there is no such file")
    known = [group.name for group in groups(FULL)]
    if unknown := [name for name in flags.only if name not in known]:
        parser.error(f"--only {' '.join(unknown)}: groups are {', '.join(known)}")
    return flags


def _set_environment(work: Path, tiny: bool) -> None:
    """Keep libraries off the network, and their caches in the work folder."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_AUTO_INSTALL": "0",
        "PYTHONUNBUFFERED": "1",
    }
    folders = {
        "HF_DATASETS_CACHE": "datasets",
        "UNSLOTH_COMPILE_LOCATION": "unsloth",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    os.environ.update(fixed)
    os.environ.update({name: str(work / folder) for name, folder in folders.items()})
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _card_name() -> str:
    """Name the card for the file, without loading torch."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        name = done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _finish(results: Results, started: float, scale: Scale) -> None:
    for entry in results.measurements.values():
        if entry["status"] == "running":
            entry.update(status="timeout", reason="stopped from outside")
    now = time.time()
    results.head["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now))
    results.head["seconds"] = round(now - started, 1)
    results.head["ratios"] = ratios(results.measurements, scale)
    results.write()
    print_table(results)
    print(f"results: {results.path}")


if __name__ == "__main__":
    sys.exit(main())
