"""Answers in pieces: the same text as in evaluation, and what was computed once is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.chat.writers import (
    LlamaCppWriter,
    Pieces,
    TransformersWriter,
    Writer,
    Written,
    certain_length,
)
from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.decoding import complete, generating
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.prompts.templates import render_prompt
from tinyagent_fast.prompts.tokenizers import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

STOP = "<END_OF_PLAN>"
SYSTEM = "Plan with: open_note, send_sms" + ", create_note" * 30
USERS = ["Question: open the note", "Question: open another", "Something else", "Question: open t"]
TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tiny_base: Path) -> LoadedModel:
    import torch
    from transformers import AutoModelForCausalLM

    return LoadedModel(
        model=AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval(),
        tokenizer=PromptTokenizer(load_tokenizer(tiny_base)),
        backend="transformers",
        device="cpu",
        compute_dtype="float32",
    )


def in_evaluation(loaded: LoadedModel, user: str, stop: str = STOP) -> Any:
    prompt = loaded.tokenizer.encode_prompt(render_prompt(SYSTEM, user, "alpaca"))
    with generating(loaded.model):
        batches = complete(
            loaded.model, loaded.tokenizer, [prompt], batch=1, max_new_tokens=TOKENS, stop=stop
        )
        return next(batches)[0][1]


def take(pieces: Pieces) -> tuple[list[str], Written]:
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def writer_for(loaded: LoadedModel, stop: str = STOP) -> TransformersWriter:
    return TransformersWriter(loaded, stop=stop, max_new_tokens=TOKENS)


def test_every_answer_is_the_one_of_evaluation_whatever_was_asked_before(
    loaded: LoadedModel,
) -> None:
    writer = writer_for(loaded)
    for user in [*USERS, USERS[0], USERS[0]]:
        pieces, written = take(writer.write(SYSTEM, user))
        expected = in_evaluation(loaded, user)
        assert "".join(pieces) == expected.text
        assert (written.stop_reason, written.new_tokens) == (
            expected.stop_reason,
            expected.new_tokens,
        )


def test_the_text_comes_in_pieces_and_not_at_the_end(loaded: LoadedModel) -> None:
    pieces, _ = take(writer_for(loaded).write(SYSTEM, USERS[0]))
    assert len([piece for piece in pieces if piece]) > TOKENS // 2


def test_what_two_prompts_share_is_computed_once(loaded: LoadedModel) -> None:
    writer = writer_for(loaded)
    steps: list[int] = []
    original = writer._step
    writer._step = lambda ids: (steps.append(len(ids)), original(ids))[1]  # type: ignore[method-assign]
    _, first = take(writer.write(SYSTEM, USERS[0]))
    _, second = take(writer.write(SYSTEM, USERS[1]))
    assert first.kept_tokens == 0
    assert second.kept_tokens > 100
    read = [count for count in steps if count > 1]
    assert sum(read) == first.prompt_tokens + second.prompt_tokens - second.kept_tokens
    _, again = take(writer.write(SYSTEM, USERS[1]))
    assert again.kept_tokens == again.prompt_tokens - 1


@pytest.mark.parametrize("taken", [1, 3])
def test_an_answer_that_was_broken_off_spoils_no_later_one(loaded: LoadedModel, taken: int) -> None:
    writer = writer_for(loaded)
    pieces = writer.write(SYSTEM, USERS[0])
    for _ in range(taken):
        next(pieces)
    pieces.close()
    assert "".join(take(writer.write(SYSTEM, USERS[1]))[0]) == in_evaluation(loaded, USERS[1]).text


def test_after_a_failure_within_a_step_nothing_is_kept(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = writer_for(loaded)
    take(writer.write(SYSTEM, USERS[0]))
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_step", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            take(writer.write(SYSTEM, USERS[1]))
    pieces, written = take(writer.write(SYSTEM, USERS[1]))
    assert written.kept_tokens == 0
    assert "".join(pieces) == in_evaluation(loaded, USERS[1]).text


def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_shown(loaded: LoadedModel) -> None:
    whole = in_evaluation(loaded, USERS[0]).text
    stop = whole[len(whole) // 2 :][:7]
    pieces, written = take(writer_for(loaded, stop).write(SYSTEM, USERS[0]))
    assert "".join(pieces) == whole.split(stop)[0] == in_evaluation(loaded, USERS[0], stop).text
    assert written.stop_reason == "stop"


def test_a_long_prompt_gives_a_sign_of_life_between_its_chunks(loaded: LoadedModel) -> None:
    pieces, written = take(writer_for(loaded).write(SYSTEM * 6, USERS[0]))
    between = (written.prompt_tokens - 1) // 256
    assert between >= 2
    assert pieces[:between] == [""] * between
    assert all(pieces[between:])


def test_a_prompt_that_the_model_has_no_room_for_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ModelError, match="4096"):
        take(writer_for(loaded).write(SYSTEM * 60, USERS[0]))


@given(st.text("ab<EN\ufffd", max_size=12))
def test_only_text_that_no_further_token_can_change_is_shown(text: str) -> None:
    certain = certain_length(text, "<EN>")
    hidden = text[certain:]
    assert hidden.rstrip("\ufffd") in ("", "<", "<E", "<EN")
    assert hidden or not text.endswith("\ufffd")


@pytest.fixture(scope="module")
def gguf_writer(tiny_gguf: dict[str, Path]) -> Iterator[LlamaCppWriter]:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, llama_server

    settings = LlamaCppSettings(
        model=tiny_gguf["f32"], slots=1, context_tokens_per_slot=1024, threads=1, cache_type="f32"
    )
    with llama_server(settings) as server:
        yield LlamaCppWriter(server, stop=STOP, max_new_tokens=TOKENS)


def test_a_gguf_answers_in_pieces_what_it_answers_when_served(gguf_writer: LlamaCppWriter) -> None:
    for user in USERS:
        pieces, written = take(gguf_writer.write(SYSTEM, user))
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        served = gguf_writer.server.chat(messages, max_new_tokens=TOKENS, stop=STOP)
        # Half a character at the limit is shown by one endpoint only.
        assert "".join(pieces) == served.completion.text.rstrip("\ufffd")
        assert written.stop_reason == served.completion.stop_reason
        assert written.new_tokens == served.completion.new_tokens
        assert written.prompt_tokens == served.prompt_tokens


def test_a_gguf_keeps_what_two_prompts_share(gguf_writer: LlamaCppWriter) -> None:
    take(gguf_writer.write(SYSTEM, USERS[0]))
    assert take(gguf_writer.write(SYSTEM, USERS[1]))[1].kept_tokens > 100


def test_a_gguf_answer_can_be_broken_off(gguf_writer: LlamaCppWriter) -> None:
    pieces = gguf_writer.write(SYSTEM, USERS[0])
    next(pieces)
    pieces.close()
    assert take(gguf_writer.write(SYSTEM, USERS[1]))[1].new_tokens == TOKENS


def test_a_gguf_refuses_a_prompt_beyond_its_context(gguf_writer: LlamaCppWriter) -> None:
    with pytest.raises(ModelError, match="context"):
        take(gguf_writer.write(SYSTEM * 20, USERS[0]))


def test_both_writers_are_what_a_planner_needs(
    loaded: LoadedModel, gguf_writer: LlamaCppWriter
) -> None:
    writers: list[Writer] = [writer_for(loaded), gguf_writer]
    assert all(callable(writer.write) for writer in writers)
