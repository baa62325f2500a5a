"""`chat`: type a request in the terminal, see its plan being written and its graph drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyagent_fast.commands.planner_flags import PlannerFlags, read_flags
from tinyagent_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChatFlags(PlannerFlags):
    """Flags of `chat`."""

    once: str | None = None
    """Answer this request and end."""
    requests: Path | None = None
    """Answer all requests of this file, a JSON list, and end; needs `--json`."""
    batch: int = 4
    """Requests of a file that are answered together; llama.cpp reserves memory for each."""
    json: bool = False
    """With `--once` or `--requests`: print a JSON object a line for each request, in order, with
    `request`, `plan`, the plan's graph, every problem, and the request's share in seconds of the
    time that those answered together took (`share_s`)."""


def run(arguments: Sequence[str]) -> int:
    """Chat; gives 0, whatever the plans are worth."""
    flags = read_flags(ChatFlags, "chat", arguments, "chat --once")
    if flags.once is not None and flags.requests is not None:
        raise ConfigError("--once with --requests", "both say what to answer", "leave one out")
    if flags.json and flags.once is None and flags.requests is None:
        why, fix = "it prints answers and ends", "add --once REQUEST or --requests FILE"
        raise ConfigError("--json", why, fix)
    if flags.requests is not None and not flags.json:
        why = "the answers to a file are printed as JSON, an object a line"
        raise ConfigError(f"--requests {flags.requests}", why, "add --json")
    if flags.once is not None and not flags.once.strip():
        raise ConfigError("--once", "the request is empty", "write what should be done")
    from rich.console import Console

    from tinyagent_fast.chat.terminal import converse, show_stream
    from tinyagent_fast.display import Display

    console = Console(highlight=False)
    if flags.requests is not None:
        _answer_file(flags, flags.requests)
        return 0
    with flags.load() as planner:
        if flags.once is not None and flags.json:
            print(json.dumps(planner.plan(flags.once).to_json(), ensure_ascii=False))
            return 0
        Display(console).header("tinyagent-fast chat", planner.facts)
        if flags.once is not None:
            show_stream(console, planner.stream(flags.once))
        else:
            converse(console, planner)
    return 0


def _answer_file(flags: ChatFlags, path: Path) -> None:
    """Print answers to the standard output, and what is going on beside it."""
    from rich.console import Console

    from tinyagent_fast.chat.requests import answer_all, read_requests
    from tinyagent_fast.display import Display

    entries = read_requests(path)  # before the model is loaded, which can take long
    display = Display(Console(highlight=False, stderr=True))
    with flags.load(flags.batch) as planner:
        display.header("tinyagent-fast chat", planner.facts)
        for entry, planned in answer_all(planner, entries, display):
            label = {} if entry.label is None else {"label": entry.label}
            line = json.dumps(planned.to_json() | label, ensure_ascii=False)
            print(line, flush=True)
