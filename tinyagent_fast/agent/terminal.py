"""An agent at work in the terminal: the graph fills in, changes are asked for, the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from tinyagent_fast.agent.loop import Outcome
from tinyagent_fast.agent.tools import RunnableTool
from tinyagent_fast.plans.drawing import draw_plan, printable
from tinyagent_fast.plans.grammar import render_call
from tinyagent_fast.plans.tools import Tool


class AgentView:
    """Shows what an agent tells; `on_event` and `allow` are for the agent."""

    def __init__(
        self, console: Console, tools: Mapping[str, Tool] | None, *, ask: bool = True
    ) -> None:
        """Prepare.

        Args:
            console: Where to print.
            tools: Tools that plans may call; None stands for TinyAgent's own.
            ask: Ask before each call that changes something; else all are allowed.
        """
        self.console = console
        self.tools = tools
        self.ask = ask
        self._text = ""
        self._outcomes: dict[int, tuple[str, str]] = {}
        self._asking = asyncio.Lock()
        self._live = self._new_live()

    def on_event(self, kind: str, content: Mapping[str, Any]) -> None:
        """Take an event of the agent."""
        if kind == "plan":
            if content["number"]:
                self.console.print(Text("planning again", style="bold"))
            self._text, self._outcomes = "", {}
            self._live = Live(
                console=self.console, refresh_per_second=8, get_renderable=self._graph
            )
            if self.console.is_terminal:
                self._live.start()
        elif kind == "text":
            self._text += content["piece"]
        elif kind == "start":
            self._outcomes[content["number"]] = ("running", "")
        elif kind == "observation":
            told = (content["status"], content["observation"])
            self._outcomes[content["number"]] = told
            if not self.console.is_terminal:
                call = render_call(content["tool"], content["arguments"])
                line = f"{content['number']}. {call}: {told[0]}: {told[1]}"
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
        """Show what would be changed and ask, one call at a time; no answer is a no."""
        if not self.ask:
            return True
        call = render_call(tool.name, arguments)
        async with self._asking:
            live = self._live.is_started
            self.close()
            self.console.print(Text(f"this would be done: {printable(call)}", style="bold"))
            try:
                answer = await asyncio.to_thread(input, "do it? [y/N] ")
            except EOFError:
                answer = ""
            if live:
                self._live.start()
        return answer.strip().lower() in ("y", "yes")

    def _new_live(self) -> Live:
        return Live(console=self.console, refresh_per_second=8, get_renderable=self._graph)

    def _graph(self) -> RenderableType:
        if not self._text:
            return Text("reading the prompt", style="dim")
        drawing = draw_plan(self._text, self.tools, finished=False)
        return Group(drawing.with_outcomes(self._outcomes))


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Print the answer and what it cost."""
    console.print(Text(printable(outcome.message or "done"), style="red" if outcome.failed else ""))
    cost = outcome.cost()
    replans = f", {outcome.replans} replans" * bool(outcome.replans)
    told = (
        f"{cost['calls']:.0f} calls in {cost['calls_s']:.1f} s (one after another "
        f"{cost['calls_one_after_another_s']:.1f} s), {cost['new_tokens']:.0f} tokens in "
        f"{cost['model_s']:.1f} s{replans}"
    )
    console.print(Text(told, style="dim"))
    for name in {name for r in outcome.rounds for name in r.execution.left_running}:
        console.print(Text(f"still running, as it cannot be broken off: {name}", style="yellow"))
