"""Functions for Python programs; the commands of the same names call them too.

torch and transformers are imported when a function needs them, in the order that Unsloth asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tinyagent_fast.config import Config, typed
from tinyagent_fast.display import Display
from tinyagent_fast.errors import ConfigError, wrong_type
from tinyagent_fast.evaluation.evaluate import EvalOptions, evaluate
from tinyagent_fast.evaluation.running import EvaluationResult
from tinyagent_fast.evaluation.scoring import Metrics, score_pair, summarise
from tinyagent_fast.export.settings import ExportSettings, check_settings
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.runs import Run, find_run, holding


@typed
def train(
    config: Config, *, resume: Run | str | Path | None = None, console: Console | None = None
) -> Run:
    """Train an adapter as the config says.

    Args:
        config: All settings; its data files must be there (`tinyagent-fast data download`).
        resume: A run, or its name or folder, to go on with from its last checkpoint; its config
            must be the same.
        console: Where progress is printed; None takes the standard output.

    Returns:
        The run; its `adapter` folder holds the adapter with the highest plan success.

    Raises:
        UserError: Anything that a user can repair, before the first step wherever possible.
    """
    from tinyagent_fast.training.fit import train as fit

    found = resume if isinstance(resume, Run | None) else find_run(resume, config.runs)
    return fit(config, console, resume=found)


@typed
def evaluate_run(
    run: Run | str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    console: Console | None = None,
) -> dict[str, EvaluationResult]:
    """Write a plan for every test query and score it.

    Args:
        run: A run, or its name or folder; None takes what the settings name.
        options: Engine, files and settings; None takes the run's.
        console: Where progress is printed; None takes the standard output.

    Returns:
        What was measured, by name: `adapter`, `base`, `merged`, or the names of GGUF files.

    Raises:
        UserError: Anything that a user can repair.
    """
    from tinyagent_fast.models.libraries import quieten

    quieten()  # before the first import that reaches bitsandbytes
    options = options or EvalOptions()
    options = replace(options, run=str(_run_meant(run, options.run, options.runs).path))
    return evaluate(options, Display(console or Console(highlight=False)))


@typed
def export_run(
    run: Run | str | Path | None = None,
    settings: ExportSettings | None = None,
    *,
    console: Console | None = None,
) -> Path:
    """Make merged weights and GGUF files of a run, and prove them against its adapter.

    Args:
        run: A run, or its name or folder; None takes what the settings name.
        settings: Which files and which proofs; None takes the defaults.
        console: Where progress is printed; None takes the standard output.

    Returns:
        The folder with the files, export.json and report.md.

    Raises:
        GateError: A file does not do what the adapter does.
        UserError: Anything that a user can repair.
    """
    settings = settings or ExportSettings()
    check_settings(settings)
    found = _run_meant(run, settings.run, settings.runs)
    adapter = found.find_adapter(settings.adapter)
    config = found.config()
    display = Display(console or Console(highlight=False))
    display.say(f"run {found.path.name}, adapter {adapter}")
    if (unfinished := found.unfinished()) is not None:
        display.say(f"note: the training of run {found.path.name} is {unfinished}")
    held = holding(settings.out or found.path, "export", "name another folder with --out")
    with held, display.working("export"):  # for whatever has no label of its own
        from tinyagent_fast.models.libraries import prepare_libraries

        # The reference is plain transformers, whatever backend has trained the adapter.
        prepare_libraries(replace(config.model, backend="transformers"))
        from tinyagent_fast.export.pipeline import run_export
        from tinyagent_fast.export.preparation import prepare_export
        from tinyagent_fast.export.publishing import publish

        export = prepare_export(found, config, settings, adapter, display)
        folder = run_export(export)
        if settings.push_to_hub is not None:
            repository, content = settings.push_to_hub, export.record.content
            publish(folder, content, repository, dry_run=settings.dry_run, say=display.say)
    return folder


def _run_meant(run: Run | str | Path | None, in_settings: str, runs: Path) -> Run:
    """Find the run that was named, beside the settings or in them."""
    if run is None:
        return find_run(in_settings, runs)
    found = run if isinstance(run, Run) else find_run(run, runs)
    if in_settings not in ("latest", run) and find_run(in_settings, runs) != found:
        raise ConfigError(
            f"run {found.path.name} with settings for run {in_settings}",
            "one call works on one run",
            "name it once",
        )
    return found


@typed
def score_pairs(
    pairs: Iterable[tuple[str, str]], tools: Mapping[str, Tool] | None = None
) -> Metrics:
    """Score predictions against labels; needs no torch.

    Args:
        pairs: Texts of (label, prediction).
        tools: The tools that plans may call, by name; None stands for TinyAgent's 16.

    Returns:
        Shares with their intervals, and how often each cause of failure occurs. A label that calls
        a tool outside `tools` cannot be scored: it is no success, and counts as a `bad_label`.

    Raises:
        ConfigError: Something else than two texts is given as a pair.
    """
    scores = []
    for pair in pairs:
        match pair:
            case (str(label), str(prediction)):
                scores.append(score_pair(label, prediction, tools))
            case _:
                wanted = "two texts, (label, prediction); a plan that is missing is the text ''"
                raise wrong_type(f"pair {len(scores)}", pair, wanted)
    return summarise(scores)
