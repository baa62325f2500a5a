"""`train`: choose a preset for this machine unless one is named, then train."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tinyagent_fast.commands.config_flags import resolve_config
from tinyagent_fast.config import Config
from tinyagent_fast.presets import REAL_TRAIN
from tinyagent_fast.runs import find_run


def run(arguments: Sequence[str]) -> int:
    """Train an adapter.

    Args:
        arguments: Flags of the command.

    Returns:
        0 when training has finished.
    """
    parser = argparse.ArgumentParser(
        prog="tinyagent-fast train", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--resume", metavar="RUN")
    known, rest = parser.parse_known_args(list(arguments))
    from rich.console import Console

    console = Console(highlight=False)

    def preset_of_this_machine() -> str:
        preset, reason = choose_preset()
        console.print(f"preset {preset}: {reason}", markup=False)
        console.print('another one: make train PRESET=l4 ARGS="--train.epochs 4"', markup=False)
        return preset

    resumed = find_run(known.resume, _runs_folder(rest)) if known.resume else None
    config = resolve_config(
        "train",
        rest,
        preset_of_this_machine,
        start=resumed.config() if resumed else None,
        more_flags="--resume RUN goes on with a run that was broken off.",
    )
    if resumed is None:
        _download_if_absent(config, console)
    from tinyagent_fast.training.libraries import prepare_libraries

    prepare_libraries(config.model)
    from tinyagent_fast.training.fit import train

    train(config, console, resume=resumed)
    return 0


def choose_preset() -> tuple[str, str]:
    """Choose the preset for this machine.

    Returns:
        Its name and the reason, as a sentence for the user.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu", "no CUDA device was found, so a small model learns generated data"
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / 2**30
    preset = "t4" if memory_gib < 18 else "l4" if memory_gib < 36 else "a100"
    if properties.major < 8 and preset != "t4":
        preset = "t4"
    return preset, f"{properties.name} with {memory_gib:.0f} GiB was found"


def _download_if_absent(config: Config, console: object) -> None:
    """Fetch the published files when the config names them and they are not there."""
    if config.data.train != REAL_TRAIN or REAL_TRAIN.exists():
        return
    from tinyagent_fast.commands import data_download

    data_download.run([])


def _runs_folder(arguments: Sequence[str]) -> Path:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    known, _ = parser.parse_known_args(list(arguments))
    folder: Path = known.runs
    return folder
