"""`serve`: a small web page on this machine, where requests become plans and graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinyagent_fast.commands.planner_flags import PlannerFlags


@dataclass(frozen=True, kw_only=True)
class ServeFlags(PlannerFlags):
    """Flags of `serve`."""

    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine only."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""


def run(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C; gives 0."""
    import tyro

    flags = tyro.cli(ServeFlags, args=list(arguments), prog="tinyagent-fast serve")
    from contextlib import suppress

    from rich.console import Console

    from tinyagent_fast.chat.terminal import show_header
    from tinyagent_fast.chat.web import PlannerServer, is_loopback, listen

    console = Console(highlight=False)
    with listen(flags.host, flags.port) as listener, flags.load() as planner:
        server = PlannerServer(planner, listener, flags.host)
        show_header(console, "tinyagent-fast serve", planner.facts)
        if not is_loopback(flags.host):
            console.print(
                f"warning: whoever can reach {flags.host} can use the model; there is no password",
                style="yellow",
            )
        print(f"{server.url} (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve()
    return 0
