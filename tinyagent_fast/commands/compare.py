"""`compare`: two runs or folders of predictions on the same queries, and which plans flipped."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from tinyagent_fast.reports.flips import FlippedPlans

_SHOWN_ROWS = 12


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Flags of `compare`."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A run, a folder with predictions.jsonl, or such a file."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The same, to be held against A."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    common: bool = False
    """Compare on the queries that both planned for, where they are not all the same."""
    catalogue: Path | None = None
    """YAML catalogue with the tools that plans may call; by default the runs', else TinyAgent's."""
    html: bool = False
    """Write a page with all flips drawn, compare-A.html beside B's predictions."""
    out: Path | None = None
    """Write that page into this file instead."""
    json: bool = False
    """Print all figures as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Compare; gives 0 whatever the outcome is."""
    flags = tyro.cli(CompareFlags, args=list(arguments), prog="tinyagent-fast compare")
    from tinyagent_fast.reports.flips import find_planners, flipped_plans, tools_of_both
    from tinyagent_fast.reports.pages import checked_page, compare_page
    from tinyagent_fast.runs import write_text

    out = None if flags.out is None else checked_page(flags.out)
    a, b = find_planners(flags.a, flags.b, flags.runs)
    tools = tools_of_both(a, b, flags.catalogue)
    compared = flipped_plans(a, b, tools, common=flags.common)
    if flags.json:
        print(json.dumps(compared.to_json(), indent=2))
    else:
        print("\n".join(_text(compared)))
    if flags.html or out is not None:
        name = a.name.strip("/").replace("/", "-")
        path = out or b.folder / f"compare-{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, compare_page(compared))
        # Beside the JSON of --json, the line would break what reads it.
        print(f"written: {path}", file=sys.stderr if flags.json else sys.stdout)
    return 0


def _text(compared: FlippedPlans) -> Iterator[str]:
    from tinyagent_fast.reports.flips import chosen_flips

    yield from compared.lines()
    # Of both sides, however many there are of one.
    shown = replace(compared, flips=tuple(chosen_flips(compared.flips, _SHOWN_ROWS)))
    for table, whole in zip(shown.tables(), compared.tables(), strict=True):
        if table.rows:
            yield "\n" + replace(table, rows=table.rows[:_SHOWN_ROWS]).to_markdown().rstrip()
        if (more := len(whole.rows) - _SHOWN_ROWS) > 0:
            yield f"and {more} more; --html lists all"
