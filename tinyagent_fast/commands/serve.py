"""`serve`: a small web page on this machine, where requests become plans that are carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinyagent_fast.agent.session import open_agent
from tinyagent_fast.commands.agent import AgentFlags
from tinyagent_fast.commands.planner_flags import read_flags


@dataclass(frozen=True, kw_only=True)
class ServeFlags(AgentFlags):
    """Flags of `serve`."""

    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine only."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""


def run(arguments: Sequence[str]) -> int:
    """Serve until Ctrl-C; gives 0."""
    flags = read_flags(ServeFlags, "serve", arguments, "agent")
    flags.check()
    from contextlib import suppress

    from rich.console import Console

    from tinyagent_fast.chat.web import PlannerServer, is_loopback, listen
    from tinyagent_fast.display import Display

    console = Console(highlight=False)
    flags.check_tools()
    with listen(flags.host, flags.port) as listener, flags.load() as planner:
        agent = open_agent(planner, flags)
        server = PlannerServer(planner, listener, flags.host, agent, ask=not flags.yes)
        Display(console).header("tinyagent-fast serve", planner.facts)
        if not is_loopback(flags.host):
            said = (
                f"warning: whoever can reach {flags.host} can use model and tools without password"
            )
            console.print(said, style="yellow", soft_wrap=True)
        print(f"{server.url} (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve()
    return 0
