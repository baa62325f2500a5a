"""`chat`: type a request in the terminal, see its plan being written and its graph drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tinyagent_fast.commands.planner_flags import PlannerFlags
from tinyagent_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChatFlags(PlannerFlags):
    """Flags of `chat`."""

    once: str | None = None
    """Answer this request and end."""
    json: bool = False
    """With `--once`: print one JSON object with the plan, its graph and every problem."""


def run(arguments: Sequence[str]) -> int:
    """Chat; gives 0, whatever the plans are worth."""
    import tyro

    flags = tyro.cli(ChatFlags, args=list(arguments), prog="tinyagent-fast chat")
    if flags.json and flags.once is None:
        raise ConfigError("--json", "it prints one answer and ends", "add --once REQUEST")
    if flags.once is not None and not flags.once.strip():
        raise ConfigError("--once", "the request is empty", "write what should be done")
    from rich.console import Console

    from tinyagent_fast.chat.terminal import converse, show_header, show_stream

    console = Console(highlight=False)
    with flags.load() as planner:
        if flags.once is not None and flags.json:
            print(json.dumps(planner.plan(flags.once).to_json(), ensure_ascii=False))
            return 0
        show_header(console, "tinyagent-fast chat", planner.facts)
        if flags.once is not None:
            show_stream(console, planner.stream(flags.once))
        else:
            converse(console, planner)
    return 0
