"""Called before transformers, trl and peft are imported: Unsloth patches them, and some chatter."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

from tinyagent_fast.config import ModelConfig


def prepare_libraries(config: ModelConfig) -> None:
    """Hold back other libraries' chatter, and import Unsloth first where it will be used.

    Args:
        config: Says which backend is asked for.
    """
    quieten()
    if config.backend == "transformers" or find_spec("unsloth") is None:
        return
    import torch

    if torch.cuda.is_available() or config.backend == "unsloth":
        # It must not install packages or write into this folder.
        os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
        cache = Path.home() / ".cache" / "tinyagent_fast" / "unsloth_compiled"
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache))
        import unsloth  # noqa: F401


def quieten() -> None:
    """Hold back other libraries' chatter; what matters is said by the display.

    Commands that run no model of torch call it too, because peft imports bitsandbytes.
    """
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    for name in ("transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
