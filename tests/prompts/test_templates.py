"""The renderer: one place that builds prompts, and completions that end in their stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.prompts.templates import (
    STOP_STRINGS,
    PromptFormat,
    RenderedExample,
    render,
    render_prompt,
    template_hash,
)

TEXTS = st.text(max_size=40)


def make_example(kind: str = "plan", output: str = "1. join()", **fields: Any) -> Example:
    values: dict[str, Any] = {"query": "q", "system": "the system", "user": "Question: q"}
    return Example(
        key="k/0",
        entry_key="k",
        kind=kind,  # type: ignore[arg-type]
        output=output,
        **{**values, **fields},
    )


def chat(messages: Sequence[Mapping[str, str]]) -> str:
    return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_alpaca_puts_the_system_text_first_and_the_user_text_as_input() -> None:
    assert render_prompt("S", "U", "alpaca") == (
        "\n### Instruction:\nS\n\n### Input:\nU\n\n### Response:\n"
    )


def test_alpaca_without_a_system_text_has_no_input_section() -> None:
    assert render_prompt(None, "U", "alpaca") == "\n### Instruction:\nU\n\n### Response:\n"


def test_flat_puts_both_texts_behind_one_another_and_adds_nothing() -> None:
    assert render_prompt("S", "U", "flat") == "SU"
    assert render_prompt(None, "U", "flat") == "U"


def test_chat_hands_the_messages_to_the_tokenizers_template() -> None:
    assert render_prompt("S", "U", "chat", chat) == "<system>S<user>U<assistant>"
    assert render_prompt(None, "U", "chat", chat) == "<user>U<assistant>"


def test_chat_without_a_chat_template_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="chat template"):
        render_prompt("S", "U", "chat")


@given(TEXTS, TEXTS, st.sampled_from(["alpaca", "flat", "chat"]))
def test_every_prompt_holds_both_texts_unchanged_and_in_order(
    system: str, user: str, prompt_format: PromptFormat
) -> None:
    text = render_prompt(system, user, prompt_format, chat)
    assert user in text[text.index(system) + len(system) :]


@pytest.mark.parametrize("kind", ["plan", "replan", "join"])
def test_a_completion_is_the_raw_output_with_the_stop_string_of_its_kind(kind: str) -> None:
    rendered = render(make_example(kind, "1. join()"), "alpaca")
    assert rendered.completion == "1. join()" + STOP_STRINGS[kind]


def test_plans_and_joins_end_in_different_stop_strings() -> None:
    assert STOP_STRINGS["plan"] == STOP_STRINGS["replan"] == "<END_OF_PLAN>"
    assert STOP_STRINGS["join"] == "<END_OF_RESPONSE>"


def test_a_stop_string_that_the_data_has_already_is_not_doubled() -> None:
    rendered = render(make_example(output="1. join()<END_OF_PLAN>"), "alpaca")
    assert rendered.completion == "1. join()<END_OF_PLAN>"


@given(TEXTS, st.sampled_from(["plan", "replan", "join"]))
def test_a_completion_begins_with_the_output_and_ends_in_one_stop_string(
    output: str, kind: str
) -> None:
    completion = render(make_example(kind, output), "flat").completion
    assert completion.startswith(output)
    assert completion == output + STOP_STRINGS[kind]


def test_the_prompt_of_a_training_row_is_the_prompt_of_generation() -> None:
    example = make_example()
    assert render(example, "alpaca") == RenderedExample(
        render_prompt(example.system, example.user, "alpaca"), "1. join()<END_OF_PLAN>"
    )


def test_the_template_hash_tells_formats_apart_and_stays_the_same() -> None:
    def other_chat(messages: Sequence[Mapping[str, str]]) -> str:
        return chat(messages) + " "

    hashes = [template_hash("alpaca"), template_hash("flat")]
    hashes += [template_hash("chat", chat), template_hash("chat", other_chat)]
    assert len(set(hashes)) == 4
    assert template_hash("chat", chat) == hashes[2]
    assert all(len(h) == 16 for h in hashes)


def test_the_template_hash_notices_a_change_in_prompts_without_a_system_text() -> None:
    def without_system(messages: Sequence[Mapping[str, str]]) -> str:
        return chat(messages) + ("!" if len(messages) == 1 else "")

    assert template_hash("chat", without_system) != template_hash("chat", chat)
