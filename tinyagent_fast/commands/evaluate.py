"""`eval`: plan success of a run on the test file, by its adapter, GGUF files or merged folder."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

import tyro

from tinyagent_fast.distributed import init_processes, launch_environment
from tinyagent_fast.evaluation.evaluate import EvalOptions, check_options


def run(arguments: Sequence[str]) -> int:
    """Evaluate.

    Args:
        arguments: Flags of the command.

    Returns:
        0 when the evaluation has finished.
    """
    options = tyro.cli(EvalOptions, args=list(arguments), prog="tinyagent-fast eval")
    with launch_environment().main_process_reports():
        check_options(options)
        from rich.console import Console

        from tinyagent_fast.api import evaluate_run

        quiet = Console(file=StringIO(), quiet=True)  # one process of a launch speaks for all
        speaks = launch_environment().is_main_process
        evaluate_run(options.run, options, console=Console(highlight=False) if speaks else quiet)
    init_processes().leave()
    return 0
