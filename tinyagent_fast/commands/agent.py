"""`agent`: a request is planned, carried out and judged, in a sandbox or with your own tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from tinyagent_fast.agent.session import AgentSpec, open_agent, refuse_unplanned
from tinyagent_fast.commands.planner_flags import PlannerFlags, read_flags
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.inference import planner
from tinyagent_fast.interrupts import run_async

if TYPE_CHECKING:
    from rich.console import Console

    from tinyagent_fast.agent.loop import Outcome
    from tinyagent_fast.agent.tools import RunnableTool
    from tinyagent_fast.inference.planner import Planner
    from tinyagent_fast.prompts.builder import PromptBuilder


@dataclass(frozen=True, kw_only=True)
class AgentFlags(PlannerFlags, AgentSpec):
    """Flags that also say which tools plans are carried out with; `serve` has them too."""

    yes: bool = False
    """Do what changes something without asking; a sandbox never asks."""

    def check_tools(self) -> None:
        """Refuse own tools that are none, before the model is loaded, which takes long.

        Raises:
            ConfigError: The model plans with none of them, or knows other parameters.
            DataError: The file gives no tools.
        """
        if self.own_tools is not None:
            source = planner.find_source(self.model, run=self.run, runs=self.runs)
            refuse_unplanned(source.tools(), self.own_tools, grammar=self.grammar == "on")


@dataclass(frozen=True, kw_only=True)
class RequestFlags(AgentFlags):
    """Flags of `agent`."""

    request: Annotated[str, tyro.conf.Positional]
    """What should be done."""
    dry_run: bool = False
    """Only plan."""
    json: bool = False
    """Print that line and nothing else; changes are made only with `--yes` or in the sandbox."""


def run(arguments: Sequence[str]) -> int:
    """Answer a request; gives 0 when it is done, 1 when something of it is not."""
    flags = read_flags(RequestFlags, "agent", arguments, "agent")
    if not flags.request.strip():
        raise ConfigError("the request", "it is empty", "write what should be done")
    flags.check()
    from rich.console import Console

    from tinyagent_fast.chat.terminal import show_stream
    from tinyagent_fast.display import Display

    console = Console(highlight=False, quiet=flags.json)
    flags.check_tools()
    with flags.load() as planner:
        Display(console).header("tinyagent-fast agent", planner.facts)
        if flags.dry_run:
            if flags.own_tools is not None or flags.mcp:
                planner.prompts = run_async(_limited_prompts(flags, planner))
            if flags.json:
                print(json.dumps(planner.plan(flags.request).to_json(), ensure_ascii=False))
            else:
                show_stream(console, planner.stream(flags.request))
            return 0
        outcome = run_async(_answer(flags, planner, console))
    if flags.json:
        print(json.dumps(outcome.to_json(), ensure_ascii=False))
    return int(outcome.failed)


async def _limited_prompts(flags: RequestFlags, planner: Planner) -> PromptBuilder:
    """Let plans know what own tools take, also where they are not carried out."""
    async with open_agent(planner, flags) as agent:
        return agent.prompts


async def _answer(flags: RequestFlags, planner: Planner, console: Console) -> Outcome:
    from tinyagent_fast.agent.terminal import AgentView, show_outcome

    async with open_agent(planner, flags) as agent:
        for note in agent.notes:
            console.print(note, style="dim", soft_wrap=True)
        view = AgentView(console, agent.plain_tools, ask=agent.real and not flags.yes)
        try:
            outcome = await agent.answer(
                flags.request,
                allow=_refuse_all if flags.json and view.ask else view.allow,
                on_event=view.on_event,
            )
        finally:
            view.close()
    show_outcome(console, outcome)
    if agent.trace is not None:
        console.print(f"written: {agent.trace}", style="dim", soft_wrap=True)
    return outcome


async def _refuse_all(_tool: RunnableTool, _arguments: Sequence[object]) -> bool:
    """Refuse changes where nobody can be asked."""
    return False
