"""A prompt that is watched: the text of a batch, in pieces, and what was computed once is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch_runs import load_plainly

from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.engine import Completion, Limits, Prompt
from tinyagent_fast.inference.torch_engine import TorchEngine, certain_length
from tinyagent_fast.models.loading import LoadedModel

STOP = "<END_OF_PLAN>"
SYSTEM = "Plan with: open_note, send_sms" + ", create_note" * 30
USERS = ["Question: open the note", "Question: open another", "Something else", "Question: open t"]
TOKENS = 12


@pytest.fixture(scope="module")
def loaded(tiny_base: Path) -> LoadedModel:
    return load_plainly(tiny_base)


def ask(
    engine: TorchEngine, user: str, stop: str = STOP, system: str = SYSTEM
) -> tuple[list[str], Completion]:
    pieces: list[str] = []
    prompts = [Prompt(system=system, user=user)]
    ((index, completion),) = engine.generate(
        prompts, Limits(stop=stop, max_new_tokens=TOKENS), lambda _, text: pieces.append(text)
    )
    assert index == 0
    assert "".join(pieces) == completion.text
    return pieces, completion


def plain(loaded: LoadedModel, user: str, stop: str = STOP) -> Completion:
    """Let the model's own `generate` answer."""
    return ask(TorchEngine(loaded, shared_prefix=False), user, stop)[1]


def written(completion: Completion) -> tuple[str, str, int]:
    return completion.text, completion.stop_reason, completion.new_tokens


@pytest.mark.parametrize("lookup_tokens", [0, 3])
def test_every_answer_is_the_models_own_whatever_was_asked_before(
    lookup_tokens: int, loaded: LoadedModel
) -> None:
    engine = TorchEngine(loaded, lookup_tokens=lookup_tokens)
    for user in [*USERS, USERS[0], USERS[0]]:
        assert written(ask(engine, user)[1]) == written(plain(loaded, user))


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_text_comes_in_pieces_and_not_at_the_end(
    shared_prefix: bool, loaded: LoadedModel
) -> None:
    pieces, _ = ask(TorchEngine(loaded, shared_prefix=shared_prefix), USERS[0])
    assert len([piece for piece in pieces if piece]) > TOKENS // 2


def test_prompts_that_are_written_together_are_shown_apart(loaded: LoadedModel) -> None:
    prompts = [Prompt(system=SYSTEM, user=user) for user in USERS]
    shown = [""] * len(prompts)

    def show(index: int, text: str) -> None:
        shown[index] += text

    limits = Limits(stop=STOP, max_new_tokens=TOKENS, batch=3)
    found = dict(TorchEngine(loaded).generate(prompts, limits, show))
    assert shown == [found[index].text for index in range(len(prompts))]
    assert [written(found[i]) for i in range(4)] == [written(plain(loaded, u)) for u in USERS]


def test_what_two_prompts_share_is_computed_once(loaded: LoadedModel) -> None:
    engine = TorchEngine(loaded)
    seen: list[int] = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].numel())
    )
    with hook:
        first, second, again = (ask(engine, USERS[at])[1] for at in (0, 1, 1))
    assert first.cached_tokens == 0
    assert second.cached_tokens > 100
    assert again.cached_tokens == again.prompt_tokens - 1
    every = (first, second, again)
    assert sum(seen) == sum(c.prompt_tokens - c.cached_tokens + c.new_tokens - 1 for c in every)


@pytest.mark.parametrize("taken", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_answer_that_was_broken_off_spoils_no_later_one(
    loaded: LoadedModel, taken: int, error: type[BaseException]
) -> None:
    engine = TorchEngine(loaded)
    pieces: list[str] = []

    def show(_: int, text: str) -> None:
        pieces.append(text)
        if len(pieces) == taken:
            raise error

    prompts = [Prompt(system=SYSTEM, user=USERS[0])]
    with pytest.raises(error):
        list(engine.generate(prompts, Limits(stop=STOP, max_new_tokens=TOKENS), show))
    assert len(pieces) == taken
    _, completion = ask(engine, USERS[1])
    assert completion.cached_tokens > 100
    assert written(completion) == written(plain(loaded, USERS[1]))


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_failure_within_a_step_spoils_no_later_answer(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The second layer of some forward pass fails, so that only the first has new keys."""
    engine = TorchEngine(loaded)
    ask(engine, USERS[0])
    layer = loaded.model.model.layers[1].input_layernorm
    passes = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > failing:
            raise KeyboardInterrupt

    with layer.register_forward_pre_hook(fail), pytest.raises(KeyboardInterrupt):
        ask(engine, USERS[1])
    assert written(ask(engine, USERS[1])[1]) == written(plain(loaded, USERS[1]))


def test_a_closed_engine_keeps_nothing(loaded: LoadedModel) -> None:
    engine = TorchEngine(loaded)
    ask(engine, USERS[0])
    engine.close()
    engine.close()
    assert ask(engine, USERS[0])[1].cached_tokens == 0


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_shown(
    shared_prefix: bool, loaded: LoadedModel
) -> None:
    whole = plain(loaded, USERS[0]).text
    stop = whole[len(whole) // 2 :][:7]
    _, completion = ask(TorchEngine(loaded, shared_prefix=shared_prefix), USERS[0], stop)
    assert completion.text == whole.split(stop)[0]
    assert completion.stop_reason == "stop"


def test_a_long_prompt_gives_a_sign_of_life_between_its_chunks(loaded: LoadedModel) -> None:
    pieces, completion = ask(TorchEngine(loaded), USERS[0], system=SYSTEM * 6)
    between = (completion.prompt_tokens - 1) // 256
    assert between >= 2
    assert pieces[:between] == [""] * between
    assert all(pieces[between:])


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_prompt_that_the_model_has_no_room_for_is_refused(
    shared_prefix: bool, loaded: LoadedModel
) -> None:
    with pytest.raises(ModelError, match="4096"):
        ask(TorchEngine(loaded, shared_prefix=shared_prefix), USERS[0], system=SYSTEM * 60)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_an_answer_ends_with_the_models_context(
    shared_prefix: bool, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plain(loaded, USERS[0])
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", whole.prompt_tokens + 5)
    _, completion = ask(TorchEngine(loaded, shared_prefix=shared_prefix), USERS[0])
    assert (completion.stop_reason, completion.new_tokens) == ("length", 5)
    assert whole.text.startswith(completion.text)


def test_the_model_is_in_its_own_mode_whenever_the_caller_has_control(loaded: LoadedModel) -> None:
    import torch

    prompts = [Prompt(system=SYSTEM, user=user) for user in USERS]
    loaded.model.train()
    try:
        for _ in TorchEngine(loaded).generate(prompts, Limits(stop=STOP, max_new_tokens=2)):
            assert loaded.model.training
            assert torch.is_grad_enabled()
    finally:
        loaded.model.eval()


@given(st.text("ab<EN\ufffd", max_size=12))
def test_only_text_that_no_further_token_can_change_is_shown(text: str) -> None:
    certain = certain_length(text, "<EN>")
    hidden = text[certain:]
    assert hidden.rstrip("\ufffd") in ("", "<", "<E", "<EN")
    assert hidden or not text.endswith("\ufffd")
