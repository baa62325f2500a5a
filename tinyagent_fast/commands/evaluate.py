"""`eval`: plan success of a run on the test file, by its adapter, GGUF files or merged folder."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from tinyagent_fast.distributed import init_processes, launch_environment
from tinyagent_fast.evaluation.evaluate import EvalOptions, check_options

if TYPE_CHECKING:
    from rich.console import Console

_SHORT = {
    f"--{name}": f"--eval.{name}"
    for name in ("batch", "max-new-tokens", "parity-prompts", "lookup-tokens", "limit")
}
"""Short names of flags, beside those that `train` has for them too."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate.

    Args:
        arguments: Flags of the command.

    Returns:
        0 when the evaluation has finished.
    """
    import tyro

    flags = tyro.cli(
        EvalOptions,
        args=[_long(word) for word in arguments],
        prog="tinyagent-fast eval",
        description=f"Flags of --eval.* may be written short: {', '.join(_SHORT)}.",
    )
    with launch_environment().main_process_reports():
        check_options(flags)
        from tinyagent_fast.api import evaluate_run

        evaluate_run(flags.run, flags, console=_console())
    init_processes().leave()
    return 0


def _long(word: str) -> str:
    name, equals, value = word.partition("=")
    return _SHORT.get(name.replace("_", "-"), name) + equals + value


def _console() -> Console:
    """Let one process of a launch speak for all."""
    from rich.console import Console

    if launch_environment().is_main_process:
        return Console(highlight=False)
    return Console(file=StringIO(), quiet=True)
