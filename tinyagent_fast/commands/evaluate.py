"""`eval`: plan success of a run on the test file, by its adapter, GGUF files or merged folder."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from tinyagent_fast.distributed import init_processes, launch_environment
from tinyagent_fast.evaluation.evaluate import EvalOptions


def run(arguments: Sequence[str]) -> int:
    """Evaluate; gives 0 when the evaluation has finished."""
    options = tyro.cli(EvalOptions, args=list(arguments), prog="tinyagent-fast eval")
    launched = launch_environment()
    with launched.main_process_reports():
        from rich.console import Console

        from tinyagent_fast.api import evaluate_run

        # One process of a launch speaks for all.
        console = Console(highlight=False, quiet=not launched.is_main_process)
        evaluate_run(options.run, options, console=console)
    init_processes().leave()
    return 0
