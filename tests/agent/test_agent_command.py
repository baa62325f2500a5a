"""The command `agent`: the sandbox, own tools, what is asked before it is done, the trace."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import ScriptedWriter, planner_with

from tinyagent_fast.agent.session import AgentSpec, open_agent
from tinyagent_fast.cli import main
from tinyagent_fast.config import Config
from tinyagent_fast.inference import planner
from tinyagent_fast.runs import Run, create_run

PLAN = '1. get_phone_number("Anna")\n2. send_sms(["$1"], "hello \x1b[31m")\n3. join()'
HOME = '''
from pathlib import Path
from tinyagent_fast.agent.tools import tool

@tool(changes=False)
def find_lamp(room: str) -> str:
    """Gives the id of the lamp in a room."""
    return f"lamp-{room}"

def dim(lamp: str, percent: int) -> str:
    """Dims a lamp."""
    Path("dimmed").write_text(f"{lamp} {percent}")
    return "dimmed"
'''
HOME_PLAN = '1. find_lamp("hall")\n2. dim("$1", 40)\n3. join()'


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], ScriptedWriter]:
    """Return a function that lets every planner write one plan, in a folder with a run."""
    monkeypatch.chdir(tmp_path)
    run = create_run(Config(name="r"))
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").touch()

    def let(plan: str) -> ScriptedWriter:
        writer = ScriptedWriter(plan.splitlines(keepends=True))
        monkeypatch.setattr(planner, "load", lambda *_, **__: planner_with(writer, run))
        return writer

    return let


def test_a_request_is_carried_out_in_the_sandbox(
    says: Callable[[str], ScriptedWriter], capsys: pytest.CaptureFixture[str]
) -> None:
    says(PLAN)
    assert main(["agent", "text Anna", "--sandbox", "desktop.sqlite"]) == 0
    said = capsys.readouterr().out
    assert "nothing real is touched" in said and "The message was sent." in said
    assert "\x1b[31m" not in said
    with sqlite3.connect("desktop.sqlite") as database:
        ((recipients, text),) = database.execute("select * from messages").fetchall()
    assert recipients.startswith('["555-') and text == "hello \x1b[31m"
    (line,) = Path("runs/r/agent/traces.jsonl").read_text().splitlines()
    trace = json.loads(line)
    assert trace["request"] == "text Anna" and not trace["failed"]
    assert [call["status"] for call in trace["rounds"][0]["calls"]] == ["done", "done"]


def test_a_trace_that_cannot_be_opened_is_refused_before_anything_is_carried_out(
    says: Callable[[str], ScriptedWriter], capsys: pytest.CaptureFixture[str]
) -> None:
    says(PLAN)
    for place in ("/proc/x", "."):
        words = ["--sandbox", "desktop.sqlite", "--trace", place]
        assert main(["agent", "text Anna", *words]) == 2
        assert "name another file with --trace" in capsys.readouterr().err
        Path("desktop.sqlite").unlink(missing_ok=True)


def test_half_a_trace_is_taken_back(
    says: Callable[[str], ScriptedWriter], caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource", reason="needs limits of a process")
    says(PLAN)
    assert main(["agent", "text Anna"]) == 0
    whole = Path("runs/r/agent/traces.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 200, limits[1]))
        assert main(["agent", "text Anna"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the trace lacks this request" in caplog.text
    assert Path("runs/r/agent/traces.jsonl").read_bytes() == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_does_not_keep_back_what_was_carried_out(
    says: Callable[[str], ScriptedWriter],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    says(PLAN)
    assert main(["agent", "text Anna", "--json", "--trace", "/dev/full"]) == 0
    assert json.loads(capsys.readouterr().out)["message"].endswith("The message was sent.")
    assert "the trace lacks this request" in caplog.text


def test_the_report_shows_what_was_carried_out(says: Callable[[str], ScriptedWriter]) -> None:
    says(PLAN)
    assert main(["agent", "text Anna"]) == 0
    assert main(["report", "r"]) == 0
    for name in ("report.html", "report.md"):
        text = Path("runs/r", name).read_text()
        assert "Requests carried out" in text and "The message was sent." in text
    assert "\x1b" not in text


def test_json_is_the_trace_and_nothing_else(
    says: Callable[[str], ScriptedWriter], capsys: pytest.CaptureFixture[str]
) -> None:
    says(PLAN)
    assert main(["agent", "text Anna", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["message"].endswith("The message was sent.")


def test_what_is_not_done_gives_1(says: Callable[[str], ScriptedWriter]) -> None:
    says('1. send_sms(["1"], "x", "too much")\n2. join()')
    assert main(["agent", "text", "--max-replans", "0"]) == 1


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that types into the standard input, and then ends it."""
    with ExitStack() as stack:

        def type_text(text: str) -> None:
            there, here = os.pipe()
            with os.fdopen(here, "w") as stream:
                stream.write(text)
            monkeypatch.setattr(sys, "stdin", stack.enter_context(os.fdopen(there)))

        yield type_text


@pytest.mark.parametrize(
    ("flags", "answer", "done"),
    [
        ([], "y\n", True),
        ([], "YES\n", True),
        ([], "all\n", True),
        ([], "n\n", False),
        ([], "\n", False),
        ([], "", False),
        (["--yes"], "", True),
        (["--json"], "y\n", False),
    ],
)
def test_real_changes_are_shown_and_asked_for(
    flags: list[str],
    answer: str,
    done: bool,
    says: Callable[[str], ScriptedWriter],
    types: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    types(answer)
    says(HOME_PLAN)
    Path("home_tools.py").write_text(HOME)
    code = main(["agent", "dim the hall", "--tools", "home_tools.py", "--grammar", "off", *flags])
    assert code == (0 if done else 1)
    assert Path("dimmed").exists() == done
    said = capsys.readouterr().out
    if not flags:
        assert 'dim("lamp-hall", 40)' in said
        assert "find_lamp" not in said.partition("this would be done")[2].partition("\n")[0]


BOTH = pytest.mark.parametrize("command", [["agent", "dim the hall"], ["serve", "--port", "0"]])


@BOTH
def test_tools_that_no_plan_can_call_are_refused_before_a_model_is_loaded(
    command: list[str],
    says: Callable[[str], ScriptedWriter],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    says(PLAN)
    monkeypatch.setattr(planner, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    Path("home_tools.py").write_text(HOME + "print('the file is run')\n")
    flags = ["--run", "r", "--tools", "home_tools.py"]
    assert main([*command, *flags]) == 2
    said = capsys.readouterr()
    assert "find_lamp, dim" in said.err and "docs/own_tools.md" in said.err
    assert said.err.count("the file is run") == 1


@BOTH
@pytest.mark.parametrize("parameters", ["person: str", "name: str, again: str", "name: int", ""])
def test_tools_with_other_parameters_than_the_run_knows_are_refused_before_a_model_is_loaded(
    parameters: str,
    command: list[str],
    says: Callable[[str], ScriptedWriter],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    says(PLAN)
    monkeypatch.setattr(planner, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    own = f"def get_phone_number({parameters}) -> str:\n    return ''\n"
    Path("home_tools.py").write_text(HOME + own)
    for more in ([], ["--grammar", "off"]):
        assert main([*command, "--run", "r", "--tools", "home_tools.py", *more]) == 2
        said = capsys.readouterr().err
        assert f"get_phone_number({parameters})" in said and "get_phone_number(name: str)" in said


def phones(folder: Path, *names: str) -> AgentSpec:
    """Tools of which one knows only some names."""
    path = folder / f"{names[0]}_tools.py"
    path.write_text(
        f"from typing import Literal\n\ndef get_phone_number(name: Literal[{names}]) -> str:\n"
        "    return '1'\n"
    )
    return AgentSpec(tools=path)


def test_agents_of_one_planner_each_know_their_own_tools_choices(tmp_path: Path) -> None:
    held = planner_with(ScriptedWriter([]), None)
    held.prompts = before = replace(held.prompts, grammar=True)

    async def grammars() -> list[str]:
        async with (
            open_agent(held, phones(tmp_path, "Anna", "Ben")) as first,
            open_agent(held, phones(tmp_path, "Zoe", "Yann")) as second,
        ):
            built = [one.prompts.build("call Anna").prompt for one in (held, first, second)]
            return [str(prompt.grammar) for prompt in built]

    free, first, second = asyncio.run(grammars())
    assert "Ben" in first and "Ben" not in second + free
    assert "Zoe" in second and "Zoe" not in first + free
    assert held.prompts is before


def test_what_is_doubted_without_own_tools_is_doubted_with_them(tmp_path: Path) -> None:
    held = planner_with(ScriptedWriter(['1. get_phone_number("Zed")\n', "2. join()"]), None)
    held.prompts = replace(held.prompts, grammar=True)

    async def problems() -> tuple[str, ...]:
        async with open_agent(held, phones(tmp_path, "Zed", "Ben")) as agent:
            held.prompts = agent.prompts
            return held.plan("text Ann").problems

    alone = held.plan("text Ann").problems
    assert "'Zed' is not in the request" in " ".join(alone)
    assert asyncio.run(problems()) == alone


def test_a_dry_run_knows_own_tools_choices(
    says: Callable[[str], ScriptedWriter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says('1. get_phone_number("Zed")\n2. join()')
    path = phones(tmp_path, "Anna", "Ben").tools
    assert main(["agent", "text Zed", "--tools", str(path), "--dry-run", "--json"]) == 0
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any("one of Anna, Ben" in problem for problem in problems)


def test_one_tool_that_plans_may_call_is_enough_and_their_file_is_run_once(
    says: Callable[[str], ScriptedWriter],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writer = says(PLAN)

    def load(*_: Any, **__: Any) -> planner.Planner:
        held = planner_with(writer, Run(Path("runs/r")))
        held.prompts = replace(held.prompts, grammar=True)
        return held

    monkeypatch.setattr(planner, "load", load)
    own = HOME + "def get_phone_number(name: str): ...\nprint('the file is run')\n"
    Path("home_tools.py").write_text(own)
    assert main(["agent", "text Anna", "--run", "r", "--tools", "home_tools.py"]) == 1
    said = capsys.readouterr()
    assert "note: the model may call" in said.out and "send_sms" in said.out
    assert "does not know these tools" in said.out and "dim" in said.out
    assert said.err.count("the file is run") == 1


class InTurn(ScriptedWriter):
    """Writes one plan after another."""

    def generate(self, prompts: Any, *how: Any) -> Any:
        first, *rest = self.answers
        self.answers = [first]
        yield from super().generate(prompts, *how)
        self.answers = rest


def test_tools_of_an_mcp_server_are_planned_with_asked_for_and_planned_again(
    says: Callable[[str], ScriptedWriter],
    types: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mcp", reason="needs the package mcp")
    says("")
    plans = [f'1. find_lamp("{room}")\n2. dim(["$1"], 40, "2.5", True)\n3. join()' for room in
             ("attic", "hall")]  # fmt: skip
    writer = InTurn(plans)
    monkeypatch.setattr(planner, "load", lambda *_, **__: planner_with(writer, Run(Path("runs/r"))))
    types("y\n")
    server = shlex.join([sys.executable, str(Path(__file__).with_name("lamp_server.py"))])
    assert main(["agent", "dim the hall", "--mcp", server]) == 0
    said = capsys.readouterr().out
    assert said.count("do it?") == 1 and 'dim(["lamp-2"], 40, "2.5", True)' in said
    assert "lamp-2 at 40 within 2.5 s slowly" in said
    first, second = (user for _, user in writer.asked)
    assert second.startswith(first) and "there is no lamp in the attic, try again" in second
    (trace,) = map(json.loads, Path("runs/r/agent/traces.jsonl").read_text().splitlines())
    statuses = [[call["status"] for call in one["calls"]] for one in trace["rounds"]]
    assert statuses == [["failed", "skipped"], ["done", "done"]]


def test_yes_to_all_holds_for_one_plan(
    says: Callable[[str], ScriptedWriter],
    types: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    says("")
    Path("home_tools.py").write_text(
        HOME.replace("import tool", "import ToolError, tool").replace(
            "    Path(",
            "    if percent > 100:\n        raise ToolError('at most 100', retry=True)\n    Path(",
        )
    )
    plans = [
        HOME_PLAN.replace("3. join()", '3. dim("$1", 200)\n4. join()'),
        HOME_PLAN.replace("40", "100"),
    ]
    monkeypatch.setattr(
        planner,
        "load",
        lambda *_, **__: planner_with(InTurn(plans), Run(Path("runs/r"))),
    )
    types("all\n")
    words = ["agent", "dim the hall", "--tools", "home_tools.py", "--grammar", "off"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert said.count("do it?") == 2
    assert Path("dimmed").read_text() == "lamp-hall 40"


def test_a_dry_run_only_plans(
    says: Callable[[str], ScriptedWriter], capsys: pytest.CaptureFixture[str]
) -> None:
    says(HOME_PLAN)
    Path("home_tools.py").write_text(HOME)
    words = ["agent", "dim", "--tools", "home_tools.py", "--dry-run"]
    assert main(words) == 2  # no plan can call them
    assert main([*words, "--grammar", "off"]) == 0
    assert "find_lamp" in capsys.readouterr().out
    assert not Path("dimmed").exists() and not Path("runs/r/agent").exists()


@pytest.mark.parametrize(
    "words",
    [
        [" "],
        ["x", "--tools", "a.py", "--mcp", "b"],
        ["x", "--max-replans", "-1"],
        ["x", "--call-timeout-s", "0"],
        ["x", "--call-timeout-s", "nan"],
        ["x", "--sandbox", "there"],
        ["x", "--tools", "absent.py"],
        ["x", "--mcp", "no-such-program --flag"],
        ["x", "--mcp", "an 'open quote"],
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], says: Callable[[str], ScriptedWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    says(PLAN)
    monkeypatch.setattr(planner, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    Path("there").touch()
    assert main(["agent", *words]) == 2


def test_the_python_of_the_document_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    from tinyagent_fast.agent.tools import tools_of_module

    text = (Path(__file__).parents[2] / "docs" / "agent.md").read_text(encoding="utf-8")
    home, script = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    Path("home.py").write_text(home)
    assert {name: tool.changes for name, tool in tools_of_module(Path("home.py")).items()} == {
        "find_lamp": False,
        "dim": True,
    }
    exec(compile(script, "docs/agent.md", "exec"), {"__name__": "document"})
    assert "send_sms done The message was sent." in capsys.readouterr().out


INTERRUPTED = """
import signal, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
from stand_ins import ScriptedWriter, planner_with
from tinyagent_fast.cli import main
from tinyagent_fast.inference import planner

plan = sys.argv[2]
planner.load = lambda *_, **__: planner_with(ScriptedWriter([plan + "\\n", "2. join()"]))
planner.find_source = lambda *_, **__: SimpleNamespace(tools=lambda: None)
sys.exit(main(["agent", "go", "--tools", "tools.py", "--grammar", "off"]))
"""
TOOLS = """
import asyncio, time
from pathlib import Path
from tinyagent_fast.agent.tools import tool

def change() -> None:
    Path("changed").touch()

@tool(changes=False)
async def wait() -> None:
    try:
        print("begun", flush=True)
        await asyncio.sleep(60)
    finally:
        Path("tidied").touch()

@tool(changes=False)
async def block() -> None:
    print("begun", flush=True)
    time.sleep(60)

@tool(changes=False)
def sleep() -> None:
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("plan", "sign"),
    [
        ("1. change()", "do it?"),
        ("1. wait()", "begun"),
        ("1. sleep()", "begun"),
        ("1. block()", "begun"),
    ],
)
def test_ctrl_c_ends_it_at_once_at_the_question_and_in_a_call(
    plan: str, sign: str, tmp_path: Path
) -> None:
    (tmp_path / "tools.py").write_text(TOOLS)
    keyboard, terminal = pty.openpty()
    words = [sys.executable, "-c", INTERRUPTED, str(Path(__file__).parents[1]), plan]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        said = ""
        while sign not in said:
            said += os.read(keyboard, 1000).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()
        os.close(keyboard)
    assert not (tmp_path / "changed").exists()
    assert (tmp_path / "tidied").exists() == ("wait" in plan)
