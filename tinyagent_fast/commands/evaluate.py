"""`eval`: plan success of a run on the test file, by its adapter, GGUF files or merged folder."""

from __future__ import annotations

from collections.abc import Sequence

from tinyagent_fast.distributed import init_processes, launch_environment
from tinyagent_fast.evaluation.evaluate import EvalOptions, check_options

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
        _evaluate(flags)
    init_processes().leave()
    return 0


def _long(word: str) -> str:
    name, equals, value = word.partition("=")
    return _SHORT.get(name.replace("_", "-"), name) + equals + value


def _evaluate(options: EvalOptions) -> None:
    from io import StringIO

    from tinyagent_fast.evaluation.evaluate import evaluate
    from tinyagent_fast.models.libraries import quieten

    quieten()  # before the first import that reaches bitsandbytes
    from rich.console import Console

    from tinyagent_fast.training.display import TrainingDisplay

    console = Console(highlight=False)
    if not launch_environment().is_main_process:
        console = Console(file=StringIO(), quiet=True)
    evaluate(options, TrainingDisplay(console))
