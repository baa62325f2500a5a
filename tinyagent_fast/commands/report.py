"""`report`: a run as one HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Flags of `report`."""

    run: str = "latest"
    """Run to report on: its name, its folder, or `latest`."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    out: Path | None = None
    """HTML file to write; the Markdown stands beside it. By default report.html in the run."""
    catalogue: Path | None = None
    """YAML catalogue with the tools that plans may call; by default the run's, else TinyAgent's."""


def run(arguments: Sequence[str]) -> int:
    """Write both files; a run may come first without a flag."""
    import tyro

    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--run")
    flags = tyro.cli(ReportFlags, args=words, prog="tinyagent-fast report")
    from tinyagent_fast.reports.pages import checked_page, run_headline, run_markdown, run_page
    from tinyagent_fast.reports.reading import read_run
    from tinyagent_fast.runs import find_run, write_text

    found = find_run(flags.run, flags.runs)
    page = checked_page(flags.out or found.path / "report.html")
    contents = read_run(found, flags.catalogue)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, run_page(contents))
    write_text(page.with_suffix(".md"), run_markdown(contents))
    print(f"run {contents.name}: {run_headline(contents)}")
    for note in contents.notes:
        print(f"note: {note}")
    print(f"written: {page}, {page.with_suffix('.md').name}")
    return 0
