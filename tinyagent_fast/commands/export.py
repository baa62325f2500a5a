"""`export`: merged weights and GGUF files of a run, proved against its adapter."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from tinyagent_fast.export.settings import ExportSettings


def run(arguments: Sequence[str]) -> int:
    """Export a run; gives 0 when all files are made and all gates passed."""
    import tyro

    settings = tyro.cli(ExportSettings, args=list(arguments), prog="tinyagent-fast export")
    from tinyagent_fast.api import export_run
    from tinyagent_fast.export.record import ExportRecord
    from tinyagent_fast.runs import find_run

    folder = export_run(settings=settings)
    files = [one.path for one in ExportRecord(folder).artefacts if one.kind == "gguf"]
    further = ""
    if files:
        named = find_run(settings.run, settings.runs).named
        model = "" if settings.out is None else f" MODEL={shlex.quote(str(folder / files[0]))}"
        further = f"; next: make eval RUN={named} ENGINE=gguf{model}"
    print(f"written: {folder}/export.json, report.md, README.md{further}")
    return 0
