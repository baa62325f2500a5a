"""`chat`: type a request in the terminal, see its plan being written and its graph drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyagent_fast.commands.planner_flags import PlannerFlags
from tinyagent_fast.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from rich.console import Console

    from tinyagent_fast.inference.planner import Planner


@dataclass(frozen=True, kw_only=True)
class ChatFlags(PlannerFlags):
    """Flags of `chat`."""

    once: str | None = None
    """Answer this request and end."""
    json: bool = False
    """With `--once`: print one JSON object with the plan, its graph and every problem."""


def run(arguments: Sequence[str]) -> int:
    """Chat.

    Args:
        arguments: Flags of the command.

    Returns:
        0, whatever the plans are worth.
    """
    import tyro

    flags = tyro.cli(ChatFlags, args=list(arguments), prog="tinyagent-fast chat")
    if flags.json and flags.once is None:
        raise ConfigError("--json", "there is nobody to chat with", "add --once REQUEST")
    if flags.once is not None and not flags.once.strip():
        raise ConfigError("--once", "the request is empty", "write what should be done")
    from rich.console import Console

    from tinyagent_fast.chat.terminal import show_header, show_stream

    console = Console(highlight=False)
    with flags.load() as planner:
        if flags.once is not None and flags.json:
            print(json.dumps(planner.plan(flags.once).to_json(), ensure_ascii=False))
            return 0
        show_header(console, "tinyagent-fast chat", planner.facts)
        if flags.once is not None:
            show_stream(console, planner.stream(flags.once))
            return 0
        _converse(console, planner)
    return 0


def _converse(console: Console, planner: Planner) -> None:
    """Answer requests until the input ends."""
    from rich.text import Text

    from tinyagent_fast.chat.terminal import show_stream
    from tinyagent_fast.plans.drawing import printable

    with suppress(ImportError):
        import readline  # noqa: F401  (gives the prompt a history and line editing)
    console.print("Type a request; Ctrl-C breaks a plan off, Ctrl-D ends.", style="dim")
    while True:
        try:
            request = input("\nrequest> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D ends", style="dim")
            continue
        if not request:
            continue
        stream = planner.stream(request)
        if planner.prompts.retrieve is not None:
            console.print(Text(f"system text: {printable(stream.built.source)}", style="dim"))
        try:
            show_stream(console, stream)
        except KeyboardInterrupt:
            console.print("\nbroken off", style="dim")
        except ModelError as error:
            console.print(Text(str(error), style="red"))
