"""`train`: choose a preset for this machine unless one is named, then train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.commands.config_flags import parser_of, resolve_config
from tinyagent_fast.config import Config
from tinyagent_fast.distributed import init_processes
from tinyagent_fast.presets import REAL_TRAIN, choose_preset
from tinyagent_fast.runs import Run, find_run

if TYPE_CHECKING:
    from rich.console import Console


def run(arguments: Sequence[str]) -> int:
    """Train an adapter, together with the other processes of the launch; gives 0 at its end."""
    processes = init_processes()
    with processes.main_process_reports():
        config, resumed = processes.on_main_process(lambda: _settings(arguments))
        from tinyagent_fast.api import train

        train(config, resume=resumed)
    processes.leave()
    return 0


def _settings(arguments: Sequence[str]) -> tuple[Config, Run | None]:
    """Resolve the config, look at the machine and fetch the data; also find a run to go on with."""
    parser = parser_of("train")
    parser.add_argument("--resume", metavar="RUN")
    parser.add_argument("--runs", type=Path)
    known, rest = parser.parse_known_args(list(arguments))
    if known.runs is not None:
        rest += ["--runs", str(known.runs)]  # which is a part of the config too
    from rich.console import Console

    console = Console(highlight=False)
    automatic = False

    def preset_of_this_machine() -> str:
        nonlocal automatic
        automatic = True
        preset, reason = choose_preset()
        console.print(f"preset {preset}: {reason}", markup=False)
        console.print('another one: make train PRESET=l4 ARGS="--train.epochs 4"', markup=False)
        return preset

    resumed = find_run(known.resume, known.runs or Path("runs")) if known.resume else None
    config = resolve_config(
        "train",
        rest,
        preset_of_this_machine,
        start=resumed.config() if resumed else None,
        more_flags="--resume RUN goes on with a run that was broken off.",
    )
    if not automatic and resumed is None:
        console.print(f"preset {config.preset}: as asked for", markup=False)
    here = resumed.located(config) if resumed else config
    check_machine(here, console, automatic=automatic)
    if resumed is None and config.data.train == REAL_TRAIN and not REAL_TRAIN.exists():
        from tinyagent_fast.commands import data_download

        data_download.run([])
    return config, resumed


def check_machine(config: Config, console: Console, *, automatic: bool) -> None:
    """Look at this machine for a second, before anything takes long, and print warnings.

    Raises:
        TrainingError: The run cannot end well.
    """
    from tinyagent_fast.display import Display
    from tinyagent_fast.doctor import find_out, read_machine, refuse_failures

    with Display(console).working("looking at this machine"):
        findings = find_out(config, read_machine(), automatic=automatic)
    for found in findings:
        if found.status == "warning":
            text = f"warning: {found.name}: {found.text}; fix: {found.fix}"
            console.print(text, markup=False, soft_wrap=True)
    refuse_failures(findings)
