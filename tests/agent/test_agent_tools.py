"""Tools of Python functions and of MCP servers: what they take, and what they give."""

from __future__ import annotations

import asyncio
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from tinyagent_fast.agent.loop import Execution, Pieces, RuleJoiner, execute
from tinyagent_fast.agent.tools import (
    RunnableTool,
    ToolError,
    converted,
    mcp_tools,
    tool,
    tool_of_function,
    tools_of_module,
)
from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.plans.tools import Parameter

HOME = '''
"""Lamps."""
from collections.abc import Sequence
from typing import Literal
from pathlib import Path  # imported names are no tools
from tinyagent_fast.agent.tools import tool

@tool(changes=False, timeout_s=3)
def find_lamp(room: str) -> str:
    """Gives the id of the lamp in a room."""
    return f"lamp-{room}"

async def set_scene(lamps: list[str], scene: Literal["film", "dinner"], percent: int = 100) -> str:
    """Sets lamps to a scene.

    Percent is 100 unless I ask for less.

    Args:
        lamps: Their ids.
    """
    return f"{lamps} {scene} {percent}"

def _hidden(x): ...
'''


@pytest.fixture
def home(tmp_path: Path) -> dict[str, RunnableTool]:
    path = tmp_path / "home_lamps.py"
    path.write_text(HOME)
    return tools_of_module(path)


def test_a_module_gives_a_tool_for_each_public_function(home: dict[str, RunnableTool]) -> None:
    assert list(home) == ["find_lamp", "set_scene"]
    find, scene = home.values()
    assert (find.changes, find.timeout_s) == (False, 3)
    assert scene.changes
    assert scene.tool.parameters == (
        Parameter("lamps", "list[str]"),
        Parameter("scene", "str", choices=("film", "dinner")),
        Parameter("percent", "int"),
    )
    assert scene.tool.description == (
        "Sets lamps to a scene.",
        "Percent is 100 unless I ask for less.",
        "scene is one of film, dinner.",
    )
    assert scene.defaults == {"percent": 100}
    assert find("hall") == "lamp-hall"  # the module's own code can call it


def run_plan(tools: dict[str, RunnableTool], text: str) -> Execution:
    async def plan() -> Pieces:
        yield text

    return asyncio.run(execute(plan(), tools))


def test_a_plan_calls_them_with_what_their_types_ask_for(home: dict[str, RunnableTool]) -> None:
    plan = '1. find_lamp("hall")\n2. set_scene("$1", "film", 40)\n3. join()'
    assert run_plan(home, plan).calls[1].observation == "['lamp-hall'] film 40"


def test_a_tools_file_may_be_named_as_any_module(tmp_path: Path) -> None:
    path = tmp_path / "email.py"
    path.write_text("def send(text: str) -> None: ...\n")
    assert tools_of_module(path)["send"].gives == "None"
    assert sys.modules.get("email") is not sys.modules[tools_of_module(path)["send"].run.__module__]
    assert importlib.import_module("email.mime.text")


def test_type_hints_that_are_not_there_are_a_fault_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "hints.py"
    path.write_text("def send(text: 'Gone') -> str: ...\n")
    with pytest.raises(DataError, match="tool send"):
        tools_of_module(path)


def test_a_text_that_is_none_of_the_choices_never_reaches_the_tool(
    home: dict[str, RunnableTool],
) -> None:
    ran: list[object] = []
    home["set_scene"] = replace(home["set_scene"], run=lambda *given: ran.append(given))
    plan = (
        '1. find_lamp("hall")\n2. set_scene(["$1"], "dance", 40)\n3. set_scene(["x"], "$1", 40)\n'
        "4. join()"
    )
    execution = run_plan(home, plan)
    assert ran == [] and [call.status for call in execution.calls] == ["done", "failed", "failed"]
    for call in execution.calls[1:]:
        assert "one of film, dinner" in call.observation
        assert "try again" in call.observation
    wrong = asyncio.run(RuleJoiner().judge("q", [execution], last=False)).answer
    assert wrong.action == "Replan"


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        ("str", 5, "5"),
        ("str", ["a", "ü"], '["a", "ü"]'),
        ("int", "60", 60),
        ("int", 7, 7),
        ("bool", "True", True),
        ("bool", False, False),
        ("list[str]", "a", ["a"]),
        ("list[str]", ["a", ["b", "c"]], ["a", "b", "c"]),
        ("list[str]", [], []),
    ],
)
def test_values_become_what_a_parameter_asks_for(kind: str, value: object, wanted: object) -> None:
    got = converted(Parameter("p", kind), value)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    ("kind", "value"), [("int", "sixty"), ("int", True), ("bool", "yes?"), ("int", None)]
)
def test_what_cannot_be_converted_is_an_error_for_the_joiner(kind: str, value: object) -> None:
    with pytest.raises(ToolError, match="p must be"):
        converted(Parameter("p", kind), value)
    assert converted(Parameter("p", kind, nullable=True), None) is None


def test_types_that_no_plan_can_write_are_refused() -> None:
    def odd(size: float) -> None: ...

    def bare(size) -> None: ...  # type: ignore[no-untyped-def]

    def named(*, size: int) -> None: ...

    for function in (odd, bare, named):
        with pytest.raises(DataError, match="size"):
            tool_of_function(function)

    def fine(a: int | None, b: Literal["x"] | None = None) -> None: ...

    assert [p.nullable for p in tool_of_function(fine).tool.parameters] == [True, True]
    assert tool(changes=False)(fine).changes is False


@pytest.mark.parametrize(
    "text", ["x = 1", "def broken(", "raise SystemError('no')", "raise SystemExit(7)"]
)
def test_a_module_without_tools_says_why(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.py"
    path.write_text(text)
    with pytest.raises(DataError, match=r"cannot be loaded|defines no"):
        tools_of_module(path)
    with pytest.raises(DataError, match="no such file"):
        tools_of_module(tmp_path / "absent.py")


def test_what_a_file_with_tools_prints_is_kept_out_of_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "loud.py"
    path.write_text("print('loading')\n\ndef ring(bell: str) -> str:\n    return bell\n")
    assert list(tools_of_module(path)) == ["ring"]
    assert capsys.readouterr() == ("", "loading\n")


SERVER = [sys.executable, str(Path(__file__).with_name("lamp_server.py"))]


def test_the_tools_of_a_real_mcp_server_can_be_planned_with() -> None:
    pytest.importorskip("mcp", reason="needs the package mcp")

    async def drive() -> tuple[dict[str, RunnableTool], Execution]:
        async with mcp_tools(SERVER) as tools:
            plan = (
                '1. find_lamp("kitchen")\n2. find_lamp("attic")\n'
                '3. dim(["$1"], 40, "2.5", True)\n4. dim(["$1"], "much", "1", False)\n5. join()'
            )

            async def pieces() -> Pieces:
                yield plan

            return tools, await execute(pieces(), tools)

    tools, execution = asyncio.run(drive())
    find, dim = tools.values()
    assert not find.changes and dim.changes
    assert find.tool.description == ("Gives the id of the lamp in a room.",)
    assert [p.type for p in dim.tool.parameters] == ["list[str]", "int", "str", "bool"]
    kitchen, attic, dimmed, odd = execution.calls
    assert kitchen.observation == "lamp-1"
    assert attic.status == "failed" and "there is no lamp in the attic" in attic.observation
    assert dimmed.observation == "lamp-1 at 40 within 2.5 s slowly"
    assert odd.status == "failed"


def test_a_command_that_is_no_mcp_server_says_so() -> None:
    pytest.importorskip("mcp", reason="needs the package mcp")

    async def drive(words: list[str]) -> None:
        async with mcp_tools(words):
            pass

    for words in ([sys.executable, "-c", "pass"], ["no-such-program-here"]):
        with pytest.raises(ConfigError, match="does not answer"):
            asyncio.run(drive(words))
