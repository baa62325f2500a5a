"""A doubtful plan is asked for once more, behind the calls that are not in doubt."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from rich.console import Console
from stand_ins import ScriptedWriter

from tinyagent_fast.chat.terminal import show_stream
from tinyagent_fast.inference.engine import Completion, Limits, OnToken, Prompt
from tinyagent_fast.inference.planner import Planner, PlanStream
from tinyagent_fast.inference.second_look import generate_plans
from tinyagent_fast.plans.gbnf import plan_grammar
from tinyagent_fast.plans.tools import TINYAGENT, Parameter, Tool
from tinyagent_fast.prompts.builder import BuiltPrompt, ChosenText, PromptBuilder, held_to_tools

SURE = '1. get_phone_number("Ada")\n2. send_sms(["$1"], "hi")\n3. join()'
FORGOTTEN = '1. open_note("x", "")\n2. send_sms(["$1"], "hi")\n3. join()'
MENDED = '1. open_note("x", "")\n2. get_phone_number("Ada")\n3. send_sms(["$2"], "$1")\n4. join()'
LISTED = "1. get_phone_number(name: str) -> str\n2. open_note(name: str, folder: str) -> str\n\
3. send_sms(recipients: list[str], message: str) -> str\n"
FREE = Prompt(system=f"Tools:\n{LISTED}", user="text Ada")
HELD = held_to_tools(FREE)


class Twice(ScriptedWriter):
    """Writes one text for each prompt, and the next one for what it is asked again."""

    def __init__(self, *answers: str) -> None:
        super().__init__([])
        self.texts = list(answers)
        self.rounds: list[list[Prompt]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        self.rounds.append(list(prompts))
        for index in range(len(prompts)):
            text = self.texts.pop(0)
            if on_token is not None:
                for line in text.splitlines(keepends=True):
                    on_token(index, line)
            done = len(text) < limits.max_new_tokens
            yield (
                index,
                Completion(
                    text=text,
                    stop_reason="stop" if done else "length",
                    new_tokens=10,
                    prompt_tokens=5,
                    seconds=1.0,
                ),
            )


def written(
    engine: Twice, prompts: Sequence[Prompt], on_token: OnToken | None = None, limit: int = 300
) -> dict[int, Completion]:
    limits = Limits(stop="<END>", max_new_tokens=limit)
    return dict(generate_plans(engine, prompts, limits, on_token, tools=None))


def test_only_doubtful_plans_are_asked_for_again_with_what_may_come_instead() -> None:
    engine = Twice(SURE, FORGOTTEN, SURE, MENDED)
    done = written(engine, [HELD, HELD, HELD])
    assert [done[index].text for index in range(3)] == [SURE, MENDED, SURE]
    assert [done[index].new_tokens for index in range(3)] == [10, 20, 10]
    assert [done[index].seconds for index in range(3)] == [1.0, 2.0, 1.0]
    first, (second,) = engine.rounds
    assert first == [HELD, HELD, HELD]
    assert replace(second, grammar=HELD.grammar) == HELD
    assert second.grammar is not None
    assert r"1. open_note(\"x\", \"\")\n" in second.grammar
    assert "forward_email" not in second.grammar


@pytest.mark.parametrize(
    "second",
    [
        FORGOTTEN,
        '1. send_sms(["Ada"], "x")\n2. send_sms(["',
        '1. open_note("x", "")\n2. get_phone_number("Ada")\n3. join()',
        '1. open_note("x", "")\n2. open_note("y", "")\n3. join()',
        '1. get_phone_number("Ada")\n2. send_sms(["$1"], "hi")\n3. join()',
    ],
)
def test_a_second_plan_that_is_no_better_does_not_replace_the_first(second: str) -> None:
    done = written(Twice(FORGOTTEN, second), [HELD])[0]
    assert (done.text, done.new_tokens) == (FORGOTTEN, 20)


@pytest.mark.parametrize("texts", [1, 2])
def test_of_a_second_plan_only_needless_look_ups_may_be_missing(texts: int) -> None:
    sent = 'send_sms(["911"], "hi")'
    calls = ['get_phone_number("911")', *[sent] * texts, "join()"]
    first, fewer, enough = (
        "\n".join(f"{n}. {call}" for n, call in enumerate(chosen, start=1))
        for chosen in (calls, [*calls[2:-1], "join()"], calls[1:])
    )
    assert written(Twice(first, fewer), [HELD])[0].text == first
    assert written(Twice(first, enough), [HELD])[0].text == enough


def test_what_is_looked_up_twice_is_looked_up_once() -> None:
    twice = (
        '1. get_phone_number("Ada")\n2. open_note("x", "")\n3. get_phone_number("Ada")\n'
        '4. send_sms(["$3"], "see $2 and ${2}")\n5. get_phone_number("Ada")\n6. join()'
    )
    once = (
        '1. get_phone_number("Ada")\n2. open_note("x", "")\n'
        '3. send_sms(["$1"], "see $2 and $2")\n4. join()'
    )
    assert written(Twice(twice), [HELD])[0].text == once
    assert written(Twice(twice), [FREE])[0].text == twice
    # Nobody gets a text twice.
    both = '1. get_phone_number("Ada")\n2. send_sms(["$1", "$1"], "hi")\n3. join()'
    assert written(Twice(both), [HELD])[0].text == SURE
    # Of a second plan too.
    assert written(Twice(FORGOTTEN, twice), [HELD])[0].text == once


def test_a_look_up_is_one_also_where_nothing_that_takes_its_result_is_listed() -> None:
    call = 'get_phone_number("Ada")'
    alone = held_to_tools(
        Prompt(system=f"Tools:\n{LISTED.splitlines()[0]}\n", user="Ada's number?")
    )
    done = written(Twice(f"1. {call}\n2. {call}\n3. join()"), [alone])
    assert done[0].text == f"1. {call}\n2. join()"


def test_free_texts_plans_that_were_broken_off_and_what_is_no_plan_are_left_alone() -> None:
    for prompt, text in ((FREE, FORGOTTEN), (HELD, FORGOTTEN[:40]), (HELD, "no plan")):
        engine = Twice(text)
        assert written(engine, [prompt])[0].text == text
        assert len(engine.rounds) == 1
    plain = {"note": Tool("note", ()), "send": Tool("send", (Parameter("to", "list[str]"),))}
    prompt = Prompt(system="note, send", user="go", grammar=plan_grammar(plain))
    text = '1. note()\n2. send(["$1"])\n3. join()'
    limits = Limits(stop="<END>", max_new_tokens=300)
    ((_, done),) = generate_plans(Twice(text), [prompt], limits, tools=plain)
    assert done.text == text, "nothing is known of kinds"


def test_a_stream_shows_the_first_plan_as_it_is_written_and_gives_the_second() -> None:
    prompts = PromptBuilder(system=ChosenText(FREE.system, "a test"), tools=TINYAGENT, grammar=True)
    with Planner(Twice(FORGOTTEN, MENDED), replace(prompts, tools=None)) as planner:
        stream = planner.stream("text Ada")
        pieces = list(stream)
        assert "".join(pieces) == FORGOTTEN
        assert pieces[3:] == [""] * 4, "a sign of life for each piece of the second"
        assert stream.text == MENDED
        assert stream.result is not None
        assert stream.result.completion.new_tokens == 20
    with Planner(Twice(FORGOTTEN, MENDED), prompts) as planner:
        whole = PlanStream(planner, "x", BuiltPrompt(HELD, "an agent"), second_look=False)
        assert "".join(whole) == whole.text == FORGOTTEN


@pytest.mark.parametrize(
    ("answers", "grammar", "faulty"),
    [
        ([FORGOTTEN, FORGOTTEN], True, [2]),
        ([FORGOTTEN, MENDED], True, []),
        ([SURE], True, []),
        ([FORGOTTEN], False, []),
    ],
)
def test_what_stays_in_doubt_is_a_problem_of_its_call(
    answers: list[str], grammar: bool, faulty: list[int]
) -> None:
    prompts = PromptBuilder(system=ChosenText(FREE.system, "a test"), grammar=grammar)
    with Planner(Twice(*answers), prompts) as planner:
        stream = planner.stream("text Ada")
        list(stream)
        planned = stream.result
    assert planned is not None
    assert stream.drawing == planned.drawing, "what the terminal and the page show"
    assert [step.number for step in planned.drawing.steps if step.problems] == faulty
    assert list(planned.problems) == planned.to_json()["problems"]
    assert len(planned.problems) == len(faulty)
    for told in planned.problems:
        assert "phone number" in told
        assert "$1 is note text" in told
    assert ("faulty" in planned.drawing.to_svg()) == bool(faulty)


def test_a_name_that_the_request_has_not_is_a_problem_of_its_call() -> None:
    prompts = PromptBuilder(system=ChosenText(FREE.system, "a test"), grammar=True)
    with Planner(Twice(SURE), prompts) as planner:
        planned = planner.plan("text Bo")
    assert [step.number for step in planned.drawing.steps if step.problems] == [1]
    assert planned.problems[0].endswith("'Ada' is not in the request")


def test_two_doubts_about_one_call_are_both_told() -> None:
    prompts = PromptBuilder(system=ChosenText(FREE.system, "a test"), grammar=True)
    plan = SURE.replace("Ada", "+1 555 777 1234")
    with Planner(Twice(plan, plan), prompts) as planner:
        told = planner.plan("text Bo").problems
    assert len(told) == 2
    assert any("what it looks up" in one for one in told)
    assert any("is not in the request" in one for one in told)


def test_the_terminal_shows_both_and_a_plan_that_stays_once() -> None:
    prompts = PromptBuilder(system=ChosenText(FREE.system, "a test"), grammar=True)
    for answers, times in (([FORGOTTEN, MENDED], 2), ([FORGOTTEN, FORGOTTEN], 1), ([SURE], 1)):
        console = Console(file=io.StringIO(), width=100)
        with Planner(Twice(*answers), prompts) as planner:
            show_stream(console, planner.stream("text Ada"))
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert answers[0] in said
        assert answers[-1] in said
        assert said.count("join()\n") == times
