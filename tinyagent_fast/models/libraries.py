"""Called before transformers, trl and peft are imported: Unsloth patches them, and some chatter."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from tinyagent_fast.config import ModelConfig

_MALLOPT = {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20, -8: 1}
"""Bytes from which a block is mapped alone (the most that glibc takes), that stay at the heap's
end, and by which the heap grows; and how many heaps there are, as others give everything back."""


def set_environment() -> None:
    """Set what torch reads once, which is when it is imported or first looks at a GPU."""
    # Threads that spin for long while they wait starve each other on a shared machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Without it a step's blocks of many sizes took 22.0 GiB of a card where 18.4 were in use.
    # Where it does not work (WSL, Windows, boards with shared memory), torch fails with it.
    if sys.platform == "linux" and platform.machine() == "x86_64":
        if "microsoft" not in platform.release().lower():
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def prepare_libraries(config: ModelConfig) -> None:
    """Hold back other libraries' chatter, and import Unsloth first where it will be used."""
    quieten()
    set_environment()
    _keep_freed_memory()
    if config.backend == "transformers" or find_spec("unsloth") is None:
        return
    import torch

    if torch.cuda.is_available() or config.backend == "unsloth":
        # It must not install packages or write into this folder.
        os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
        cache = Path.home() / ".cache" / "tinyagent_fast" / "unsloth_compiled"
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache))
        import unsloth  # noqa: F401


def _keep_freed_memory() -> None:
    """Let glibc keep the large blocks that torch frees: the next step needs them again.

    Given back to the system, they come again page by page, filled with zeros: on a CPU about a
    tenth of a training step.

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def quieten() -> None:
    """Hold back other libraries' chatter; what matters is said by the display.

    Commands that run no model of torch call it too, because peft imports bitsandbytes.
    """
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    for name in ("transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
