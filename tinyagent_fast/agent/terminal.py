"""An agent at work in the terminal: the graph fills in, changes are asked for, the answer."""

from __future__ import annotations

import asyncio
import os
import select
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from tinyagent_fast.agent.loop import Outcome
from tinyagent_fast.agent.session import PlanUnderWay
from tinyagent_fast.agent.tools import RunnableTool
from tinyagent_fast.errors import printable
from tinyagent_fast.plans.grammar import render_call
from tinyagent_fast.plans.tools import Tool


class AgentView:
    """Shows what an agent tells; `on_event` and `allow` are for the agent."""

    def __init__(self, console: Console, tools: Mapping[str, Tool], *, ask: bool = True) -> None:
        """Print there plans of these tools; ask before each call that changes something, or not."""
        self.console = console
        self.ask = ask
        self._plan = PlanUnderWay(tools)
        self._asking = asyncio.Lock()
        self._all = False
        self._live = self._new_live()

    def on_event(self, kind: str, content: Mapping[str, Any]) -> None:
        """Take an event of the agent."""
        self._plan.on_event(kind, content)
        if kind == "plan":
            self._all = False
            if content["number"]:
                self.console.print(Text("planning again", style="bold"))
            self._live = self._new_live()
            if self.console.is_terminal:
                self._live.start()
        elif kind == "observation" and not self.console.is_terminal:
            told = f"{content['status']}: {content['observation']}"
            line = f"{content['number']}. {content['call']}: {told}"
            self.console.print(Text(printable(line)), soft_wrap=True)
        elif kind == "problem":
            self.console.print(Text(printable(content["observation"]), style="red"))
        elif kind == "join":
            self.close()
            thought = f"{content['thought']} " if content["thought"] else ""
            told = f"{thought}{content['action']}" + " (by rule)" * (content["by"] == "rule")
            self.console.print(Text(printable(told), style="dim"))

    def close(self) -> None:
        """Leave the graph as it is; a second call does nothing."""
        if self._live.is_started:
            self._live.stop()

    async def allow(self, tool: RunnableTool, arguments: Sequence[object]) -> bool:
        """Show what would be changed and ask, one call at a time; no answer is a no.

        The answer "all" holds for the calls of this plan, and not for those of another one.
        """
        if not self.ask:
            return True
        call = render_call(tool.name, arguments)
        async with self._asking:
            if self._all:
                return True
            live = self._live.is_started
            self.close()
            self.console.print(Text(f"this would be done: {printable(call)}", style="bold"))
            self.console.print("do it? \\[y/N, all: yes to the rest of this plan] ", end="")
            answer = (await _typed_line()).strip().lower()
            if live:
                self._live.start()
            self._all = answer in ("a", "all")
        return self._all or answer in ("y", "yes")

    def _new_live(self) -> Live:
        return Live(console=self.console, refresh_per_second=8, get_renderable=self._graph)

    def _graph(self) -> RenderableType:
        if not self._plan.text:
            return Text("reading the prompt", style="dim")
        return self._plan.drawing


async def _typed_line() -> str:
    """Read a line as it is typed; nothing goes on waiting for it when this is cancelled.

    Not input() in a thread: after Ctrl-C that would hold the program until the next Enter.
    """
    line = b""
    while not line.endswith(b"\n"):
        try:
            if not select.select([sys.stdin], [], [], 0)[0]:
                await asyncio.sleep(0.05)
                continue
            typed = os.read(sys.stdin.fileno(), 1)
        except (OSError, ValueError):  # there is no standard input
            break
        if not typed:
            break
        line += typed
    return line.decode(errors="replace")


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Print the answer and what it cost."""
    console.print(Text(printable(outcome.message), style="red" if outcome.failed else ""))
    console.print(Text(outcome.cost_sentence(), style="dim"))
    for name in {name for r in outcome.rounds for name in r.execution.left_running}:
        console.print(Text(f"still running, as it cannot be broken off: {name}", style="yellow"))
