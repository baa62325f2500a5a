"""`export`: merged weights and GGUF files of a run, proved against its adapter."""

from __future__ import annotations

from collections.abc import Sequence

from tinyagent_fast.export.settings import ExportSettings


def run(arguments: Sequence[str]) -> int:
    """Export a run; gives 0 when all files are made and all gates passed."""
    import tyro

    settings = tyro.cli(ExportSettings, args=list(arguments), prog="tinyagent-fast export")
    from tinyagent_fast.api import export_run

    folder = export_run(settings.run, settings)
    print(f"written: {folder}/export.json, report.md, README.md; next: make eval ENGINE=gguf")
    return 0
