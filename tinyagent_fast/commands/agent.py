"""`agent`: a request is planned, carried out and judged, in a sandbox or with your own tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tinyagent_fast.agent.evaluate import JoinerName
from tinyagent_fast.commands.planner_flags import PlannerFlags
from tinyagent_fast.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from tinyagent_fast.agent.loop import Outcome
    from tinyagent_fast.agent.tools import RunnableTool
    from tinyagent_fast.inference.planner import Planner


@dataclass(frozen=True, kw_only=True)
class AgentFlags(PlannerFlags):
    """Flags of `agent`."""

    request: Annotated[str, tyro.conf.Positional]
    """What should be done."""
    tools: Path | None = None
    """A Python file whose typed functions are the tools. Without it and `--mcp`, TinyAgent's 16
    tools work in a sandbox, where contacts and files are made up and nothing real is touched."""
    mcp: str | None = None
    """Command line of an MCP server, whose tools are used; it is started on stdio."""
    sandbox: Path | None = None
    """Keep the sandbox's database in this new file, to look into."""
    yes: bool = False
    """Do what changes something without asking; a sandbox never asks."""
    dry_run: bool = False
    """Only plan."""
    joiner: JoinerName = "auto"
    """Who judges the observations: the model, or a rule; `auto` is the model where it was trained
    on join points, else the rule."""
    max_replans: int = 2
    """How often another plan is made at most."""
    call_timeout_s: float = 30.0
    """Longest time for one call; a tool may have its own."""
    trace: Path | None = None
    """File that gets a line of JSON; by default agent/traces.jsonl in the run's folder."""
    json: bool = False
    """Print that line and nothing else; changes are made only with `--yes` or in the sandbox."""


def run(arguments: Sequence[str]) -> int:
    """Answer a request.

    Returns:
        0 when it is done, 1 when something of it is not.
    """
    flags = tyro.cli(AgentFlags, args=list(arguments), prog="tinyagent-fast agent")
    if not flags.request.strip():
        raise ConfigError("the request", "it is empty", "write what should be done")
    if flags.tools and flags.mcp:
        raise ConfigError("--tools with --mcp", "tools come from one place", "leave one out")
    if flags.sandbox and (flags.tools or flags.mcp or flags.sandbox.exists()):
        why = "the file exists" if flags.sandbox.exists() else "own tools need no sandbox"
        raise ConfigError(f"--sandbox {flags.sandbox}", why, "name a new file, or leave it out")
    if flags.max_replans < 0 or flags.call_timeout_s <= 0:
        raise ConfigError(
            f"--max-replans {flags.max_replans} --call-timeout-s {flags.call_timeout_s}",
            "the first cannot be negative, and the second must be above 0",
            "give other numbers",
        )
    from rich.console import Console

    from tinyagent_fast.chat.terminal import show_header, show_stream

    console = Console(highlight=False, quiet=flags.json)
    with flags.load() as planner:
        show_header(console, "tinyagent-fast agent", planner.facts)
        if flags.dry_run:
            if flags.json:
                print(json.dumps(planner.plan(flags.request).to_json(), ensure_ascii=False))
            else:
                show_stream(console, planner.stream(flags.request))
            return 0
        outcome = asyncio.run(_answer(flags, planner, console))
    if flags.json:
        print(json.dumps(outcome.to_json(), ensure_ascii=False))
    return int(outcome.failed)


async def _answer(flags: AgentFlags, planner: Planner, console: Console) -> Outcome:
    from contextlib import AsyncExitStack

    from tinyagent_fast.agent.evaluate import joiner_of_run
    from tinyagent_fast.agent.loop import Agent, AgentSettings, RuleJoiner
    from tinyagent_fast.agent.models import ModelJoiner, StreamingModel
    from tinyagent_fast.agent.sandbox import Desktop, Recorder
    from tinyagent_fast.agent.terminal import AgentView, show_outcome
    from tinyagent_fast.agent.tools import mcp_tools, tools_of_module
    from tinyagent_fast.inference.planner import find_source
    from tinyagent_fast.plans.tools import TINYAGENT

    source = find_source(flags.model, run=flags.run, runs=flags.runs)
    name, text = joiner_of_run(source.run, flags.joiner, None)
    model = StreamingModel(planner)
    tools: Mapping[str, RunnableTool]
    async with AsyncExitStack() as stack:
        if flags.tools:
            tools = tools_of_module(flags.tools)
        elif flags.mcp:
            tools = await stack.enter_async_context(mcp_tools(flags.mcp))
        else:
            known = planner.tools
            box = (
                Recorder(known, time_scale=1.0)
                if known is not None and not set(known) <= set(TINYAGENT)
                else Desktop(flags.sandbox, time_scale=1.0, obliging=True)
            )
            stack.callback(box.close)
            tools = box.tools
            console.print("in a sandbox: nothing real is touched", style="dim")
        real = bool(flags.tools or flags.mcp)
        if missing := [n for n in (planner.tools or TINYAGENT if real else ()) if n not in tools]:
            note = f"note: the model may call {', '.join(missing)}, which is not among the tools"
            console.print(note, style="yellow", soft_wrap=True)
        view = AgentView(console, {n: t.tool for n, t in tools.items()}, ask=real and not flags.yes)
        agent = Agent(
            model,
            RuleJoiner() if name == "rule" else ModelJoiner(model.complete, text),
            tools,
            AgentSettings(max_replans=flags.max_replans, call_timeout_s=flags.call_timeout_s),
            allow=_refuse_all if real and flags.json and not flags.yes else view.allow,
            on_event=view.on_event,
        )
        try:
            outcome = await agent.run(flags.request, planner.prompts.build(flags.request).prompt)
        finally:
            view.close()
    show_outcome(console, outcome)
    trace = flags.trace or (source.run.path / "agent" / "traces.jsonl" if source.run else None)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        with trace.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(outcome.to_json(), ensure_ascii=False) + "\n")
        console.print(f"written: {trace}", style="dim", soft_wrap=True)
    return outcome


async def _refuse_all(_tool: RunnableTool, _arguments: Sequence[object]) -> bool:
    """Refuse changes where nobody can be asked."""
    return False
