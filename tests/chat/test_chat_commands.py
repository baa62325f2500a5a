"""The commands `chat` and `serve`, with a scripted planner behind them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_ins import ScriptedWriter, planner_with

from tinyagent_fast.chat.requests import FiledRequest, read_requests
from tinyagent_fast.cli import main
from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference import planner

ROOT = Path(__file__).resolve().parents[2]
PLAN = ['1. open_note("a", "")\n', '2. open_note("$1", "")\n', "3. join()"]

SERVE = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
# Background processes of a shell ignore Ctrl-C, and so do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
from stand_ins import ScriptedWriter, planner_with
from tinyagent_fast.cli import main
from tinyagent_fast.inference import planner

class Endless(ScriptedWriter):
    def generate(self, prompts, limits, on_token=None):
        while True:
            time.sleep(0.01)
            on_token(0, "1. ")
        yield

    def close(self):
        print("closed", flush=True)

planner.load = lambda *_, **__: planner_with(Endless([]))
sys.exit(main(["serve", "--port", "0"]))
"""


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ScriptedWriter:
    """Return what stands in for the model of every planner that is opened."""
    scripted = ScriptedWriter(PLAN)

    monkeypatch.setattr(planner, "load", lambda *_, **__: planner_with(scripted))
    return scripted


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that types lines into the prompt and then ends the input."""

    def type_lines(*lines: str | BaseException) -> None:
        left = iter([*lines, EOFError()])

        def take(_: str) -> str:
            line = next(left)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", take)

    return type_lines


def test_once_answers_one_request_and_ends(
    writer: ScriptedWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--once", "open it"]) == 0
    said = capsys.readouterr().out
    assert "".join(PLAN) in said
    assert "$1 -> 2" in said
    assert writer.asked == [("tools", "Q: open it")]


def test_once_as_json_is_one_object_for_scripts(
    writer: ScriptedWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--once", "open it", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["plan"] == "".join(PLAN)
    assert answer["view"]["edges"] == [[0, 1]]
    assert answer["stop_reason"] == "stop"
    assert answer["request"] == "open it"


def test_a_file_of_requests_is_answered_in_order_and_can_be_scored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class LastFirst(ScriptedWriter):
        """Done in another order than asked, as engines are."""

        def generate(self, prompts: Any, *how: Any) -> Any:
            return reversed(list(super().generate(prompts, *how)))

    writer = LastFirst({"Q: one": PLAN, "Q: two \u2028": ["1. join()"], "Q: three": PLAN})
    monkeypatch.setattr(planner, "load", lambda *_, **__: planner_with(writer))
    path = tmp_path / "requests.json"
    entries = ["one", {"request": "two \u2028"}, {"request": "three", "label": "".join(PLAN)}]
    path.write_text(json.dumps(entries), encoding="utf-8-sig")  # as some editors do
    assert main(["chat", "--requests", str(path), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [line["request"] for line in lines] == ["one", "two \u2028", "three"]
    assert sum(line["share_s"] for line in lines) == 0.75, "0.25 s each"
    assert [line["plan"] for line in lines] == ["".join(PLAN), "1. join()", "".join(PLAN)]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps(lines[2]) + "\n", encoding="utf-8")
    assert main(["score", "--pairs", str(answers), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["success"] == 1.0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("3", "no list"),
        ("{}", "entry 1"),
        ("[", "JSON"),
        ("[]", "empty"),
        ('["open it", 3]', "entry 2"),
        ('["open it", "  "]', "entry 2"),
        ('[{"label": "1. join()"}]', "entry 1"),
        ('[{"request": "x", "label": 1}]', "label"),
        ('[{"request": "x", "request": "y"}]', "twice"),
        ('["\\ud800"]', "Unicode"),
    ],
)
def test_a_bad_file_of_requests_is_refused_before_anything_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    said: str,
) -> None:
    monkeypatch.setattr(planner, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    path = tmp_path / "requests.json"
    path.write_text(content, encoding="utf-8")
    assert main(["chat", "--requests", str(path), "--json"]) == 2
    assert said in capsys.readouterr().err


def test_requests_may_stand_one_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"request": "open it"}\n{"request": "close it", "label": "1. join()"}\n')
    assert read_requests(path) == [FiledRequest("open it"), FiledRequest("close it", "1. join()")]


def test_requests_are_answered_until_the_input_ends(
    writer: ScriptedWriter, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed("one", "  ", "two")
    assert main(["chat"]) == 0
    assert [user for _, user in writer.asked] == ["Q: one", "Q: two"]
    assert "Ctrl-D ends" in capsys.readouterr().out


def test_ctrl_c_at_the_prompt_says_how_to_leave(
    writer: ScriptedWriter, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed(KeyboardInterrupt(), "one")
    assert main(["chat"]) == 0
    assert [user for _, user in writer.asked] == ["Q: one"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "broken off"), (ModelError("a", "no room", "shorten it"), "shorten it")],
)
def test_a_plan_that_ends_badly_ends_no_conversation(
    writer: ScriptedWriter,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: Any,
    said: str,
) -> None:
    writer.error = error
    typed("one", "two")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out.count(said) == 2
    assert len(writer.asked) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json"], "--once"),
        (["--once", " "], "empty"),
        (["--run", "absent"], "absent"),
        (["--requests", "absent.json"], "--json"),
        (["--requests", "absent.json", "--json"], "absent.json"),
        (["--requests", "absent.json", "--once", "open it"], "leave one out"),
    ],
)
def test_mistakes_are_messages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chat", *flags]) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_ends_serve_in_the_middle_of_a_plan_and_closes_what_it_opened() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(ROOT / "tests")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        url = next(line.split()[0] for line in lines if line.startswith("http://"))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=20) as response:
            assert b"<title>Planner</title>" in response.read()
        body, headers = b'{"request": "go"}', {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}plan", body, headers)
        with opener.open(request, timeout=20) as response:
            while response.readline() != b"event: piece\n":
                pass
            process.send_signal(signal.SIGINT)
            assert b"the server is closing" in response.read()
        assert process.wait(timeout=20) == 0
        assert "closed" in process.stdout.read()
    finally:
        process.kill()
        process.stdout.close()


def test_serve_warns_of_an_address_that_others_can_reach(
    writer: ScriptedWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyagent_fast.chat.web import PlannerServer

    monkeypatch.setattr(PlannerServer, "serve", lambda _: None)
    assert main(["serve", "--port", "0"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["serve", "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "without password" in capsys.readouterr().out
