"""Functions for Python programs; the commands of the same names call them too.

torch and transformers are imported when a function needs them, in the order that Unsloth asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import Config
from tinyagent_fast.export.settings import ExportSettings, check_settings
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.runs import Run, find_run

if TYPE_CHECKING:
    from rich.console import Console

    from tinyagent_fast.evaluation.evaluate import EvalOptions
    from tinyagent_fast.evaluation.running import EvaluationResult
    from tinyagent_fast.evaluation.scoring import Metrics


def train(config: Config, *, resume: Run | None = None, console: Console | None = None) -> Run:
    """Train an adapter as the config says.

    Args:
        config: All settings; its data files must be there (`tinyagent-fast data download`).
        resume: A run to go on with, from its last checkpoint; its config must be the same.
        console: Where progress is printed; None takes the standard output.

    Returns:
        The run; its `adapter` folder holds the adapter with the highest plan success.

    Raises:
        UserError: Anything that a user can repair, before the first step wherever possible.
    """
    from tinyagent_fast.training.fit import train as fit

    return fit(config, console, resume=resume)


def evaluate_run(
    run: Run | str = "latest",
    options: EvalOptions | None = None,
    *,
    console: Console | None = None,
) -> dict[str, EvaluationResult]:
    """Write a plan for every test query and score it.

    Args:
        run: A run, or its name or folder.
        options: Engine, files and settings; None takes the run's. Its `run` is not used.
        console: Where progress is printed; None takes the standard output.

    Returns:
        What was measured, by name: `adapter`, `base`, `merged`, or the names of GGUF files.

    Raises:
        UserError: Anything that a user can repair.
    """
    named = str(run.path) if isinstance(run, Run) else run
    from tinyagent_fast.models.libraries import quieten

    quieten()  # before the first import that reaches bitsandbytes
    from rich.console import Console

    from tinyagent_fast.display import Display
    from tinyagent_fast.evaluation.evaluate import EvalOptions, evaluate

    options = replace(options or EvalOptions(), run=named)
    return evaluate(options, Display(console or Console(highlight=False)))


def export_run(
    run: Run | str = "latest",
    settings: ExportSettings | None = None,
    *,
    console: Console | None = None,
) -> Path:
    """Make merged weights and GGUF files of a run, and prove them against its adapter.

    Args:
        run: A run, or its name or folder.
        settings: Which files and which proofs; None takes the defaults. Its `run` is not used.
        console: Where progress is printed; None takes the standard output.

    Returns:
        The folder with the files, export.json and report.md.

    Raises:
        GateError: A file does not do what the adapter does.
        UserError: Anything that a user can repair.
    """
    settings = settings or ExportSettings()
    check_settings(settings)
    found = run if isinstance(run, Run) else find_run(run, settings.runs)
    adapter = found.find_adapter(settings.adapter)
    config = found.config()
    from tinyagent_fast.models.libraries import prepare_libraries

    # The reference is plain transformers, whatever backend has trained the adapter.
    prepare_libraries(replace(config.model, backend="transformers"))
    from rich.console import Console

    from tinyagent_fast.display import Display
    from tinyagent_fast.export.pipeline import run_export
    from tinyagent_fast.export.preparation import prepare_export
    from tinyagent_fast.export.publishing import publish

    display = Display(console or Console(highlight=False))
    display.say(f"run {found.path.name}, adapter {adapter}")
    export = prepare_export(found, config, settings, adapter, display)
    folder = run_export(export)
    if settings.push_to_hub is not None:
        repository, content = settings.push_to_hub, export.record.content
        publish(folder, content, repository, dry_run=settings.dry_run, say=display.say)
    return folder


def score_pairs(
    pairs: Iterable[tuple[str, str]], tools: Mapping[str, Tool] | None = None
) -> Metrics:
    """Score predictions against labels; needs no torch.

    Args:
        pairs: Texts of (label, prediction).
        tools: The tools that plans may call, by name; None stands for TinyAgent's 16.

    Returns:
        Shares with their intervals, and how often each cause of failure occurs.
    """
    from tinyagent_fast.evaluation.scoring import score_pair, summarise

    return summarise([score_pair(label, prediction, tools) for label, prediction in pairs])
