"""`tools check`: what a planner could call, from functions, a catalogue or an MCP server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.interrupts import run_async

if TYPE_CHECKING:
    from tinyagent_fast.agent.tools import RunnableTool
    from tinyagent_fast.plans.tools import Tool


@dataclass(frozen=True, kw_only=True)
class ToolsFlags:
    """Flags of `tools check`."""

    source: Annotated[Path | None, tyro.conf.Positional] = None
    """A Python file with typed functions, or a YAML catalogue."""
    mcp: str | None = None
    """Command line of an MCP server, instead of a file."""
    catalogue: Path | None = None
    """Check that this catalogue has the same tools with the same parameters."""
    draft: Path | None = None
    """Write a first catalogue for the tools into this new file."""


def run(arguments: Sequence[str]) -> int:
    """Check; gives 0 when nothing is wrong."""
    flags = tyro.cli(ToolsFlags, args=list(arguments), prog="tinyagent-fast tools check")
    if (flags.source is None) == (flags.mcp is None):
        raise ConfigError(
            "tools check", "it checks one source", "name a .py or .yaml file first, or --mcp"
        )
    from tinyagent_fast.data.generation.catalogue import load_catalogue
    from tinyagent_fast.data.generation.drafts import draft_catalogue
    from tinyagent_fast.plans.tools import signature

    runnable: Mapping[str, RunnableTool] = {}
    tools: Mapping[str, Tool]
    if flags.source is not None and flags.source.suffix in (".yaml", ".yml"):
        tools = {tool.name: tool for tool in load_catalogue(flags.source).tools}
    else:
        runnable = _runnable(flags)
        tools = {name: tool.tool for name, tool in runnable.items()}
    for name, tool in tools.items():
        told = runnable.get(name)
        looks = "" if told is None else ", changes something" if told.changes else ", only looks up"
        print(f"{signature(tool)}{looks}")
        for line in tool.description:
            print(f"    {line}")
    if flags.catalogue is not None:
        known = {tool.name: tool for tool in load_catalogue(flags.catalogue).tools}
        if problems := list(_differences(tools, known)):
            raise DataError(
                f"{flags.source or flags.mcp} and {flags.catalogue}",
                "\n       ".join(problems),
                "a plan passes arguments by position, so both must have them alike",
            )
        print(f"{len(tools)} tools, the same in {flags.catalogue}")
    if flags.draft is not None:
        if flags.draft.exists() or not runnable:
            why = "the file exists" if runnable else "the source is a catalogue already"
            raise ConfigError(f"--draft {flags.draft}", why, "name a new file, or leave it out")
        flags.draft.write_text(draft_catalogue(flags.draft.stem, runnable), encoding="utf-8")
        load_catalogue(flags.draft)
        print(f"written: {flags.draft}; edit its phrases and words, then `tools check` it again")
    return 0


def _runnable(flags: ToolsFlags) -> Mapping[str, RunnableTool]:
    from tinyagent_fast.agent.tools import mcp_tools, tools_of_module

    if flags.source is not None:
        return tools_of_module(flags.source)

    async def listed() -> Mapping[str, RunnableTool]:
        assert flags.mcp is not None
        async with mcp_tools(flags.mcp) as tools:
            return tools

    return run_async(listed())


def _differences(tools: Mapping[str, Tool], known: Mapping[str, Tool]) -> Sequence[str]:
    from tinyagent_fast.plans.tools import signature

    found = [f"{name}: only in the catalogue" for name in known if name not in tools]
    found += [f"{name}: not in the catalogue" for name in tools if name not in known]
    for name in tools.keys() & known.keys():
        mine, theirs = (
            [(p.name, p.type) for p in t.parameters] for t in (tools[name], known[name])
        )
        if mine != theirs:
            found.append(f"{signature(tools[name])}, in the catalogue {signature(known[name])}")
    return found
