"""`data roundtrip`: are system prompts taken apart and put together again byte for byte?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class RoundtripFlags:
    """Flags of `data roundtrip`."""

    file: Annotated[Path, tyro.conf.Positional]
    """Data file in the published schema."""
    catalogue: Path | None = None
    """YAML file with tools of your own; None takes TinyAgent's 16."""


def run(arguments: Sequence[str]) -> int:
    """Take every plan's system prompt apart and together; 1 if one does not come back as it was."""
    flags = tyro.cli(RoundtripFlags, args=list(arguments), prog="tinyagent-fast data roundtrip")
    from tinyagent_fast.data.generation.catalogue import plan_tools
    from tinyagent_fast.data.reading import read_entries
    from tinyagent_fast.plans.tools import TINYAGENT
    from tinyagent_fast.prompts.system_text import parse, render

    known = plan_tools(flags.catalogue) or TINYAGENT
    prompts = same = listing = 0
    for entry in read_entries(flags.file, on_bad_entry="error"):
        text = entry.examples[0].system
        if text is None:
            continue
        parts = parse(text, known)
        prompts += 1
        same += render(parts) == text
        listing += bool(parts.tools)
    print(f"{same:,} of {prompts:,} system prompts of plans come back byte for byte")
    print(f"{listing:,} of {prompts:,} have a tool list that was found; others are kept whole")
    return 0 if same == prompts else 1
