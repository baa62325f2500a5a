"""Dry runs through Unsloth's own code for GPUs, in a process of its own that needs no device.

Importing Unsloth changes transformers and peft for a whole process. Its kernels are left to
Triton's interpreter, and their launches do nothing: there is no content that they could change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyagent_fast.config import Checkpointing, dump_config, parse_config
from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.training.memory import MemoryEstimator, RowLengths

if TYPE_CHECKING:
    from tinyagent_fast.training.dry_run import DryRun

Case = tuple[MemoryEstimator, int, Checkpointing]
"""What to count: sizes, rows of the micro-batch, and what is computed again."""


def can_count() -> bool:
    """Say whether Unsloth and Triton are installed."""
    return find_spec("unsloth") is not None and find_spec("triton") is not None


def dry_runs_by_unsloth(cases: Sequence[Case]) -> list[DryRun]:
    """Count steps by Unsloth's functions, with shared prefixes.

    Raises:
        ModelError: Unsloth cannot be imported, or its functions are others by now.
    """
    from tinyagent_fast.training.dry_run import DryRun

    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_AUTO_INSTALL": "0",
        "UNSLOTH_COMPILE_DISABLE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([_written(*case) for case in cases]).encode(),
        capture_output=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise ModelError(
            "a dry run by Unsloth",
            f"its process ended with {done.returncode}: {said[-1]}",
            "install the versions of the requirements file, or add --model.backend transformers",
        )
    found = json.loads(done.stdout.splitlines()[-1])  # Unsloth greets on the lines before
    return [DryRun(**one) for one in found]


def _written(estimator: MemoryEstimator, batch: int, checkpointing: Checkpointing) -> list[Any]:
    values = asdict(estimator)
    return [{**values, "config": dump_config(estimator.config)}, batch, checkpointing]


def _read(written: list[Any]) -> Case:
    values, batch, checkpointing = written
    estimator = MemoryEstimator(
        config=parse_config(values["config"]),
        shape=ModelShape(**values["shape"]),
        lengths=RowLengths(**values["lengths"]),
        backend=values["backend"],
        usable_gib=values["usable_gib"],
    )
    return estimator, batch, checkpointing


def main() -> None:
    """Count the cases from standard input and write what was found, as JSON."""
    cases = [_read(one) for one in json.load(sys.stdin)]
    import unsloth  # noqa: F401  # patches transformers and peft, so it must come first

    from tinyagent_fast.training.dry_run import dry_run

    def launch_nothing(*_: object, **__: object) -> None:
        pass

    launcher: Any = sys.modules["triton.runtime.interpreter"]  # Unsloth has loaded it
    launcher.GridExecutor.__call__ = launch_nothing
    sys.stdout.write(f"{json.dumps([asdict(dry_run(*case)) for case in cases])}\n")


if __name__ == "__main__":
    main()
