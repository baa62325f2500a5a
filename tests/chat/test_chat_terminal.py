"""Plans in the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from stand_ins import ScriptedWriter, planner_with

from tinyagent_fast.chat.terminal import converse, show_stream
from tinyagent_fast.display import Display
from tinyagent_fast.plans.drawing import draw_plan

PLAN = """1. get_phone_number("Sid")
2. get_zoom_meeting_link("Review", "2026-11-24 10:00:00", 60, [])
3. send_sms(["$1"], "See you: $2")
4. join()"""


def drawn(text: str, width: int = 100) -> str:
    return draw_plan(text).to_text(width)


@pytest.mark.parametrize("width", [30, 60, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(len, drawn(PLAN, width).splitlines())) <= width


def test_markup_in_a_plan_is_text() -> None:
    assert '"[bold]x[/] [/nothing]"' in drawn(
        '1. open_note("[bold]x[/] [/nothing]", "")\n2. join()'
    )


def test_a_very_long_argument_is_shortened() -> None:
    text = drawn(f'1. open_note("{"x" * 5000}", "")\n2. join()')
    assert len(text.splitlines()) < 15
    assert "\u2026" in text


def test_a_stream_is_shown_while_it_is_written_and_drawn_at_its_end(quiet: Any) -> None:
    stream = planner_with(ScriptedWriter(PLAN.splitlines(keepends=True))).stream("go")
    show_stream(quiet, stream)
    said = quiet.file.getvalue()
    assert said.startswith(PLAN)
    assert said.index("4. join()") < said.index("1 get_phone_number")
    assert "4 tokens in" in said


def test_a_plan_that_is_broken_off_leaves_the_model_free(quiet: Any) -> None:
    writer = ScriptedWriter(["1. open"])
    writer.error = KeyboardInterrupt()
    planner = planner_with(writer)
    with pytest.raises(KeyboardInterrupt):
        show_stream(quiet, planner.stream("go"))
    writer.error = None
    assert planner.plan("next").text


def test_a_failing_console_leaves_the_model_free(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = planner_with(ScriptedWriter(PLAN.splitlines(keepends=True)))
    console = Console(file=io.StringIO())
    monkeypatch.setattr(console, "out", lambda *_a, **_k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full") as caught:
        show_stream(console, planner.stream("go"))
    assert caught.value  # its traceback still refers to the frame that had the pieces
    assert planner.plan("next").text


def test_a_header_names_every_fact(quiet: Any) -> None:
    Display(quiet).header("title", {"model": "a\x1b[31m", "engine": "b", "run": "[bold]"})
    said = quiet.file.getvalue()
    assert "title" in said and "[bold]" in said
    assert "engine  b" in said
    assert "\x1b" not in said


@pytest.mark.parametrize("word", ["quit", "EXIT ", "/quit"])
def test_a_word_that_ends_the_chat_is_no_request_and_help_is_none_either(
    word: str, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["help", "/help", "text Sid", word, "never read"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    writer = ScriptedWriter(PLAN.splitlines(keepends=True))
    converse(quiet, planner_with(writer))
    assert [user for _, user in writer.asked] == ["Q: text Sid"]
    assert quiet.file.getvalue().count("what can be typed") == 2
    assert next(typed) == "never read"


def test_a_mistyped_command_is_no_request_and_two_slashes_begin_one(
    quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["/hepl", "/open the door", "/", "/exit now", "//etc/hosts: open it", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    writer = ScriptedWriter(PLAN.splitlines(keepends=True))
    converse(quiet, planner_with(writer))
    assert [user for _, user in writer.asked] == ["Q: /etc/hosts: open it"]
    said = " ".join(quiet.file.getvalue().split())
    assert "no command /hepl; did you mean '/help'?; the commands are /help, /quit, /exit" in said
    assert "no command /open; the commands are" in said and "with two" in said
    assert "no command /; the commands" in said and "no command /exit with more words" in said
