"""`tools check`: what a planner could call, from functions, a catalogue or an MCP server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeGuard

import tyro

from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.interrupts import run_async

if TYPE_CHECKING:
    from tinyagent_fast.agent.tools import RunnableTool
    from tinyagent_fast.data.generation.catalogue import Catalogue, SlotParameter
    from tinyagent_fast.plans.tools import Parameter, Tool

_FEW_WORDS = 100  # a choice; the built-in names are some hundred each
_YAML = (".yaml", ".yml")
_LOOKS = {True: "changes something", False: "only looks up"}


@dataclass(frozen=True, kw_only=True)
class ToolsFlags:
    """Flags of `tools check`."""

    source: Annotated[Path | None, tyro.conf.Positional] = None
    """A Python file with typed functions, or a YAML catalogue."""
    mcp: str | None = None
    """Command line of an MCP server, instead of a file."""
    catalogue: Path | None = None
    """Check that this catalogue has the same tools with the same parameters and defaults, and gives
    no text that is none of a parameter's choices."""
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

    runnable: Mapping[str, RunnableTool] = {}
    tools: Mapping[str, Tool]
    catalogue = None if flags.catalogue is None else load_catalogue(flags.catalogue)
    if flags.source is not None and flags.source.suffix in _YAML:
        own = load_catalogue(flags.source)
        tools, catalogue = own.by_name, catalogue or own
    else:
        runnable = _runnable(flags)
        tools = {name: tool.tool for name, tool in runnable.items()}
    for name, tool in tools.items():
        print(_listed(tool, runnable.get(name)))
        for line in tool.description:
            print(f"    {line}")
    if flags.catalogue is not None and catalogue is not None:
        if problems := _differences(tools, runnable, catalogue):
            raise DataError(
                f"{flags.source or flags.mcp} and {flags.catalogue}",
                "\n       ".join(problems),
                "a plan passes all arguments by position, so both must have them alike",
            )
        print(f"{len(tools)} tools, the same in {flags.catalogue}")
    if catalogue is not None and (few := ", ".join(_few_words(catalogue, tools))):
        print(
            f"note: few words: {few}. A planner learns so few by heart, and may write one of them "
            f"where another is typed; unless these are all there are, give {_FEW_WORDS} or more "
            "(docs/own_tools.md)"
        )
    if flags.draft is not None:
        _draft(flags.draft, runnable)
        print(f"written: {flags.draft}; edit its phrases and words, then `tools check` it again")
    return 0


def _draft(path: Path, runnable: Mapping[str, RunnableTool]) -> None:
    """Write a catalogue that can be loaded, or none."""
    from tinyagent_fast.data.generation.catalogue import load_catalogue
    from tinyagent_fast.data.generation.drafts import draft_catalogue
    from tinyagent_fast.runs import whole_file

    why = "" if runnable else "the source is a catalogue already"
    why = why or "the file exists" * path.exists()
    why = why or "a catalogue's name ends in .yaml" * (path.suffix not in _YAML)
    if why:
        raise ConfigError(f"--draft {path}", why, "name a new .yaml file, or leave it out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(draft_catalogue(path.stem, runnable), encoding="utf-8")
        try:
            load_catalogue(part)
        except DataError as error:
            fix = "change that in the functions, such as a default; nothing was written"
            raise DataError(f"--draft {path}", error.why, fix) from error


def _runnable(flags: ToolsFlags) -> Mapping[str, RunnableTool]:
    from tinyagent_fast.agent.tools import mcp_tools, tools_of_module

    if flags.source is not None:
        return tools_of_module(flags.source)

    async def listed() -> Mapping[str, RunnableTool]:
        assert flags.mcp is not None
        async with mcp_tools(flags.mcp) as tools:
            return tools

    return run_async(listed())


def _listed(tool: Tool, runnable: RunnableTool | None) -> str:
    """Write a tool with its defaults and what it gives, which no prompt shows."""
    defaults = _defaults(tool, runnable)
    parts = [
        f"{p.name}: {p.type}{' | None' * p.nullable}"
        + (f" = {defaults[p.name]!r}" if p.name in defaults else "")
        for p in tool.parameters
    ]
    gives = "str" if runnable is None else runnable.gives
    looks = "" if runnable is None else f", {_LOOKS[runnable.changes]}"
    return f"{tool.name}({', '.join(parts)}){f' -> {gives}' * bool(gives)}{looks}"


def _defaults(tool: Tool, runnable: RunnableTool | None) -> Mapping[str, object]:
    if runnable is not None:
        return runnable.defaults
    return {p.name: p.default for p in tool.parameters if _has_default(p)}


def _differences(
    tools: Mapping[str, Tool], runnable: Mapping[str, RunnableTool], catalogue: Catalogue
) -> list[str]:
    """Say how tools differ from a catalogue, and where its values are none of a tool's."""
    from tinyagent_fast.plans.tools import signature_differences

    known = catalogue.by_name
    found = [f"{name}: only in the catalogue" for name in known if name not in tools]
    found += [f"{name}: not in the catalogue" for name in tools if name not in known]
    found += signature_differences(tools, known)
    for name, tool in tools.items():
        theirs = {p.name: p for p in known[name].parameters} if name in known else {}
        defaults = _defaults(tool, runnable.get(name))
        found += [
            f"{name}.{p.name}: {told}"
            for p in tool.parameters
            if p.name in theirs
            for told in _parameter_differences(p, theirs[p.name], defaults, catalogue)
        ]
    return found


def _parameter_differences(
    mine: Parameter, theirs: SlotParameter, defaults: Mapping[str, object], catalogue: Catalogue
) -> Iterator[str]:
    from tinyagent_fast.data.generation.catalogue import SlotParameter

    if mine.nullable != theirs.nullable:
        only = "the source" if mine.nullable else "the catalogue"
        yield f"may be None in {only} only"
    if mine.name in defaults:
        default = defaults[mine.name]
        default = list(default) if isinstance(default, tuple) else default
        if not theirs.may_be_left_out:
            yield f"is {default!r} by default, and has no default in the catalogue"
        elif _has_default(theirs) and repr(default) != repr(theirs.default):
            yield f"is {default!r} by default, in the catalogue {theirs.default!r}"
    elif isinstance(mine, SlotParameter) and _has_default(theirs):
        yield f"has no default, in the catalogue {theirs.default!r}"
    if mine.choices:
        given: list[object] = [*catalogue.words.get(theirs.value or "", ())]
        if theirs.value is not None and not given:
            yield f"must be {mine.wanted}; the built-in kind {theirs.value} gives other texts"
        if _has_default(theirs):
            given.append(theirs.default)
        if odd := [one for one in given if one is not None and one not in mine.choices]:
            yield f"must be {mine.wanted}; the catalogue also gives {', '.join(map(repr, odd))}"


def _few_words(catalogue: Catalogue, tools: Mapping[str, Tool]) -> Iterator[str]:
    """Name the kinds of texts passed that have few words, apart from choices, which are all."""
    passed = catalogue.passed_kinds
    whole = {
        theirs.value
        for name, tool in tools.items()
        if name in catalogue.by_name
        for mine, theirs in zip(tool.parameters, catalogue.by_name[name].parameters, strict=True)
        if mine.choices
    }
    for kind, words in catalogue.words.items():
        few = len(words) < _FEW_WORDS and isinstance(words[0], str)
        if few and kind in passed and kind not in whole:
            yield f"{kind} ({len(words)})"


def _has_default(parameter: Parameter) -> TypeGuard[SlotParameter]:
    from tinyagent_fast.data.generation.catalogue import REQUIRED, SlotParameter

    return isinstance(parameter, SlotParameter) and parameter.default is not REQUIRED
