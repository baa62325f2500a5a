"""`export`: merged weights and GGUF files of a run, proved against its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinyagent_fast.config import Config
from tinyagent_fast.export.settings import ExportSettings, check_settings, quant_specs
from tinyagent_fast.runs import Run, find_run


def run(arguments: Sequence[str]) -> int:
    """Export a run.

    Args:
        arguments: Flags of the command.

    Returns:
        0 when all files are made and all gates passed.
    """
    import tyro

    settings = tyro.cli(ExportSettings, args=list(arguments), prog="tinyagent-fast export")
    check_settings(settings)
    quant_specs(settings)
    found = find_run(settings.run, settings.runs)
    adapter = found.find_adapter(settings.adapter)
    config = _config(found, settings)
    from tinyagent_fast.models.libraries import prepare_libraries

    # The reference is plain transformers, whatever backend has trained the adapter.
    prepare_libraries(replace(config.model, backend="transformers"))
    from rich.console import Console

    from tinyagent_fast.export.pipeline import run_export
    from tinyagent_fast.export.preparation import prepare_export, resolve_model_folder
    from tinyagent_fast.export.publishing import publish
    from tinyagent_fast.training.display import TrainingDisplay
    from tinyagent_fast.training.session import scoring_tools

    display = TrainingDisplay(Console(highlight=False))
    display.say(f"run {found.path.name}, adapter {adapter}")
    export = prepare_export(
        found,
        config,
        settings,
        base=resolve_model_folder(found.base_of(config), config.model.revision),
        adapter=adapter,
        tools=scoring_tools(config),
        display=display,
    )
    folder = run_export(export)
    if settings.push_to_hub is not None:
        publish(
            folder,
            export.record.content,
            settings.push_to_hub,
            dry_run=settings.dry_run,
            say=display.say,
        )
    display.say(f"written: {folder}/export.json, report.md, README.md; next: make eval ENGINE=gguf")
    return 0


def _config(found: Run, settings: ExportSettings) -> Config:
    """Take the run's config with as many validation plans as the gates use."""
    config = found.config()
    sample = max(settings.gate_prompts, settings.quant_prompts)
    return replace(config, eval=replace(config.eval, sample=sample))
