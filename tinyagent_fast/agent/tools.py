"""Tools that can be run: typed Python functions, and the tools of MCP servers.

A plan's arguments are positional Python literals; a reference is filled in with what an earlier
call gave. `converted` makes of either what the parameter's type asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.plans.tools import Parameter, Tool

_TYPES: Mapping[object, str] = {str: "str", int: "int", bool: "bool"}
_START_S = 120.0
"""How long an MCP server may take to start; on a busy machine imports alone take half a minute."""
_JSON_TYPES = {"string": "str", "integer": "int", "boolean": "bool"}


TRY_AGAIN = "try again"
"""What an observation says, in any case, where another plan can mend the matter: joiners, trained
ones too, go by these words, which also come from the sandbox and from MCP servers."""


class ToolError(Exception):
    """A call could not do what it was asked; the message becomes its observation."""

    def __init__(self, text: str, *, retry: bool = False) -> None:
        """Take the message.

        Args:
            text: What went wrong, and with `retry` what to do otherwise.
            retry: Another plan can mend the matter, so one should be made.
        """
        if retry and TRY_AGAIN not in text.lower():
            text = f"{text.rstrip('.')}; {TRY_AGAIN}"
        super().__init__(text)


@dataclass(frozen=True, kw_only=True)
class RunnableTool:
    """A tool with what runs it."""

    tool: Tool
    run: Callable[..., Any]
    """Plain or async; takes one argument a parameter, in their order."""
    changes: bool = True
    """It changes something, and does not only give an answer; a user is asked before."""
    timeout_s: float | None = None
    """Longest time for one call; None takes the agent's."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Default values by parameter, for a catalogue made of the tool."""

    @property
    def name(self) -> str:
        """The name that plans call it by."""
        return self.tool.name

    @property
    def gives(self) -> str:
        """The type of its result as it is annotated; empty if it is not."""
        hint = _type_hints(self.run).get("return", inspect.Signature.empty)
        if hint is type(None):
            return "None"
        return "" if hint is inspect.Signature.empty else inspect.formatannotation(hint)

    @property
    def is_async(self) -> bool:
        """Whether it can be broken off; a plain function runs in a thread to its end."""
        return inspect.iscoroutinefunction(self.run)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function itself."""
        return self.run(*arguments, **named)

    def arguments(self, values: Sequence[object]) -> list[object]:
        """Convert a call's arguments.

        Raises:
            ToolError: One of them is no value of its parameter's type.
        """
        return [converted(p, v) for p, v in zip(self.tool.parameters, values, strict=True)]


def plain_tools(tools: Mapping[str, RunnableTool]) -> dict[str, Tool]:
    """Give tools as plans know them, by name."""
    return {name: one.tool for name, one in tools.items()}


def converted(parameter: Parameter, value: object) -> object:
    """Make of a plan's argument, or of whatever a tool gave, what the parameter's type asks for.

    Raises:
        ToolError: It cannot be read as that type, or is none of the parameter's choices.
    """
    if value is None and parameter.nullable:
        return None
    if parameter.type == "str":
        text = as_text(value)
        if not parameter.choices or text in parameter.choices:
            return text
    elif parameter.type == "list[str]":
        items = value if isinstance(value, (list, tuple)) else [value]
        flat = (part for i in items for part in (i if isinstance(i, (list, tuple)) else [i]))
        return [as_text(part) for part in flat]
    elif parameter.type == "bool":
        known = {"true": True, "false": False}
        if isinstance(value, bool) or str(value).lower() in known:
            return value if isinstance(value, bool) else known[str(value).lower()]
    elif not isinstance(value, bool):
        try:
            return int(str(value))
        except ValueError:
            pass  # said below
    raise ToolError(f"{parameter.name} must be {parameter.wanted}, got {value!r}", retry=True)


def as_text(value: object) -> str:
    """Write a result as an observation or as a text argument: texts as they are, else JSON.

    Half a character, which neither a file nor a model can take, becomes a question mark.
    """
    if value is None:
        return "done"
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError):  # a dict with odd keys, or a circle
            value = str(value)
    return value.encode("utf-8", "replace").decode()


# --- Python functions


def tool(
    *, changes: bool = True, timeout_s: float | None = None
) -> Callable[[Callable[..., Any]], RunnableTool]:
    """Decorate a typed function as a tool, where a plain function would not say enough.

    One that only looks something up, and so needs no permission, says `changes=False`.
    """
    return lambda function: replace(
        tool_of_function(function), changes=changes, timeout_s=timeout_s
    )


def tool_of_function(function: Callable[..., Any]) -> RunnableTool:
    """Make a tool of a function by its name, type hints and docstring.

    Raises:
        DataError: A parameter has no type, or one that no plan can write.
    """
    hints = _type_hints(function)
    parameters, lines = [], [*_description(function)]
    defaults: dict[str, object] = {}
    for name, given in inspect.signature(function).parameters.items():
        if given.kind not in (given.POSITIONAL_ONLY, given.POSITIONAL_OR_KEYWORD):
            raise DataError(
                f"tool {function.__name__}, parameter {name}",
                "plans pass arguments by position only",
                "give it one ordinary parameter for each argument",
            )
        parameter = _parameter(function.__name__, name, hints.get(name))
        parameters.append(parameter)
        if parameter.choices:
            lines.append(f"{name} is one of {', '.join(parameter.choices)}.")
        if given.default is not given.empty:
            defaults[name] = given.default
    made = Tool(function.__name__, tuple(parameters), description=tuple(lines))
    return RunnableTool(tool=made, run=function, defaults=defaults)


def _type_hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise DataError(
            f"tool {function.__name__}",
            f"its type hints cannot be read: {error}",
            "import or define what they name, also where the program runs",
        ) from error


def _description(function: Callable[..., Any]) -> Iterable[str]:
    lines = (line.strip() for line in (inspect.getdoc(function) or "").splitlines())
    for line in lines:
        if line in ("Args:", "Returns:", "Raises:"):
            return
        if line:
            yield line


def _parameter(function: str, name: str, hint: object) -> Parameter:
    """Make a parameter of a type hint."""
    nullable = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [one for one in typing.get_args(hint) if one is not type(None)]
        nullable = len(others) < len(typing.get_args(hint))
        hint = others[0] if len(others) == 1 else None
    if typing.get_origin(hint) is Literal and all(
        isinstance(a, str) for a in typing.get_args(hint)
    ):
        return Parameter(name, "str", nullable=nullable, choices=typing.get_args(hint))
    is_list = typing.get_origin(hint) in (list, Sequence) and typing.get_args(hint) == (str,)
    kind = "list[str]" if is_list else _TYPES.get(hint)
    if kind is None:
        raise DataError(
            f"tool {function}, parameter {name}",
            "it has no type that a plan can write" if hint else "it has no type hint that is clear",
            "annotate it as str, int, bool, list[str], a Literal of texts, or one of them | None",
        )
    return Parameter(name, kind, nullable=nullable)


def tools_of_module(path: Path) -> dict[str, RunnableTool]:
    """Load a Python file, and make a tool of every public function that it defines.

    Raises:
        DataError: The file cannot be loaded, or holds no function that can be a tool.
    """
    # A name of its own: the file may be called as a module that others import later.
    spec = importlib.util.spec_from_file_location(f"tinyagent_fast_tools_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        why = "it is no Python file" if path.exists() else "there is no such file"
        raise DataError(f"tools {path}", why, "name a .py file with functions")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # type hints are looked up there
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the output may be read as JSON
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise DataError(
            f"tools {path}",
            f"it cannot be loaded: {type(error).__name__}: {error}",
            "run it with python, and mend what fails",
        ) from error
    found = {}
    for name, value in vars(module).items():
        if isinstance(value, RunnableTool):
            found[value.name] = value
        elif (
            inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not name.startswith("_")
        ):
            found[name] = tool_of_function(value)
    if not found:
        raise DataError(
            f"tools {path}", "it defines no public function", "write a typed function for each tool"
        )
    return found


# --- tools of MCP servers


@asynccontextmanager
async def mcp_tools(command: str | Sequence[str]) -> AsyncIterator[dict[str, RunnableTool]]:
    """Start an MCP server as a child on stdio, and give its tools while it runs.

    Parameters that are neither texts, whole numbers, truth values nor lists of texts are written
    as texts in plans, and read as JSON for the server.

    Raises:
        ConfigError: The `mcp` package is not installed, or the server does not answer.
    """
    try:
        from mcp import ClientSession, StdioServerParameters
        from mcp.client.stdio import stdio_client
    except ModuleNotFoundError as error:
        raise ConfigError(
            "MCP tools",
            "the package `mcp` is not installed",
            "pip install -e '.[mcp]' in the project's folder",
        ) from error
    words = shlex.split(command) if isinstance(command, str) else list(command)
    server = StdioServerParameters(command=words[0], args=words[1:])
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    leave = asyncio.Event()

    async def keep() -> None:
        """Hold the connection in a task of its own: it would wrap up what the caller raises."""
        # Not sys.stderr: a child needs a real file, which a notebook's or a test's is not.
        errors = sys.__stderr__ or sys.stderr
        async with (
            stdio_client(server, errlog=errors) as (read, write),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            ready.set_result((session, (await session.list_tools()).tools))
            await leave.wait()

    keeper = asyncio.create_task(keep())
    try:
        await asyncio.wait({keeper, ready}, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise ConfigError(
                f"MCP server {shlex.join(words)}",
                f"it does not answer as one: {_reason(keeper)}",
                "start it by hand, and see what it says",
            )
        session, listed = ready.result()
        made = [_mcp_tool(session, one) for one in listed]
        yield {one.name: one for one in made}
    finally:
        leave.set()
        if not ready.done():
            keeper.cancel()
        await asyncio.wait({keeper})


def _reason(ended: asyncio.Task[None]) -> str:
    if not ended.done():
        return f"no answer within {_START_S:g} s"
    error = ended.exception()
    while error is not None and getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}"


def _mcp_tool(session: Any, listed: Any) -> RunnableTool:
    schema = listed.input_schema or {}
    properties: Mapping[str, Any] = schema.get("properties", {})
    required = set(schema.get("required", ()))
    parameters, as_json = [], set()
    for name, about in properties.items():
        items = about.get("items") or {}
        kind = _JSON_TYPES.get(str(about.get("type")))
        if about.get("type") == "array" and items.get("type") == "string":
            kind = "list[str]"
        if kind is None:
            as_json.add(name)
        listed_texts = about.get("enum") or []
        parameters.append(
            Parameter(
                name,
                kind or "str",
                nullable=name not in required,
                choices=tuple(listed_texts) if _are_choices(kind, listed_texts) else (),
            )
        )
    made = Tool(
        re.sub(r"\W", "_", listed.name),
        tuple(parameters),
        description=tuple(filter(None, (listed.description or "").splitlines())),
    )

    async def run(*values: object) -> str:
        given = {p.name: v for p, v in zip(parameters, values, strict=True) if v is not None}
        arguments = {k: _json_or_text(v) if k in as_json else v for k, v in given.items()}
        result = await session.call_tool(listed.name, arguments)
        text = "\n".join(getattr(part, "text", f"<{part.type}>") for part in result.content)
        if result.is_error:
            raise ToolError(text or f"{listed.name} failed")
        return text

    hints = listed.annotations
    return RunnableTool(tool=made, run=run, changes=not (hints and hints.read_only_hint))


def _are_choices(kind: str | None, listed: Sequence[object]) -> bool:
    return kind == "str" and all(isinstance(one, str) for one in listed)


def _json_or_text(value: object) -> object:
    try:
        return json.loads(str(value))
    except ValueError:
        return value
