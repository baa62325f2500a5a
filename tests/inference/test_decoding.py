"""Batched generation: equal to one at a time, stopped by text or EOS, and without side effects."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch_runs import Written, complete, loaded_with

from tinyagent_fast.inference import torch_engine
from tinyagent_fast.inference.engine import Limits
from tinyagent_fast.inference.torch_engine import TorchEngine, generating, left_padded
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.shared_prefix.prefix import NO_PREFIX, Prefix

Script = Callable[[Sequence[list[int]]], None]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer(tiny_base))


class ScriptedRows:
    """Stands for a batch of rows: row i says scripts[i], then fillers; other tokens lead astray."""

    scripts: Sequence[list[int]]
    filler: int

    def __init__(self, _llama: Any, _prefix: Any, suffixes: Any, *, room_tokens: int) -> None:
        assert all(suffixes)
        assert room_tokens > 0
        self.rows = list(self.scripts)
        assert len(self.rows) == len(suffixes)
        self.said = [1] * len(self.rows)
        self.next_ids = [self.at(row, 0) for row in range(len(self.rows))]

    def at(self, row: int, position: int) -> int:
        ids = self.rows[row]
        return ids[position] if position < len(ids) else self.filler

    def step(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        assert len(tokens) == len(self.rows)
        found: list[list[int]] = []
        for row, fed in enumerate(tokens):
            first = self.said[row]
            true = [self.at(row, first - 1 + ahead) for ahead in range(len(fed))]
            assert fed[0] == true[0]
            right = [list(fed[: n + 1]) == true[: n + 1] for n in range(len(fed))]
            found.append([self.at(row, first + n) if ok else 9 for n, ok in enumerate(right)])
        return found

    def best_of(self, row: int, at: int, allowed_V: Any) -> int:
        raise AssertionError("no text is held to a grammar here")

    def keep(self, row: int, count: int) -> None:
        self.said[row] += count

    def as_prefix(self, row: int) -> Prefix:
        assert not row
        return NO_PREFIX

    def drop(self, row: int) -> None:
        self.rows[row], self.said[row] = self.rows[-1], self.said[-1]
        self.rows.pop()
        self.said.pop()


@pytest.fixture(params=["left padding", "shared prefix", "lookup"])
def script(request: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Let the model say given tokens, on each of the ways to run it: row i says scripts[i]."""
    original = model.forward
    state: dict[str, Any] = {}

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = original(*arguments, **keywords)
        output.logits[:] = 0.0
        for row, ids in enumerate(state["scripts"]):
            at = state["step"]
            output.logits[row, -1, ids[at] if at < len(ids) else state["filler"]] = 100.0
        state["step"] += 1
        return output

    def start(scripts: Sequence[list[int]], filler: int = 5) -> None:
        state.update(scripts=scripts, step=0, filler=filler)
        monkeypatch.setattr(ScriptedRows, "scripts", scripts, raising=False)
        monkeypatch.setattr(ScriptedRows, "filler", filler, raising=False)

    if request.param == "left padding":
        monkeypatch.setitem(vars(model), "forward", forward)
    else:
        monkeypatch.setattr(torch_engine, "RowBatch", ScriptedRows)
    options = {"left padding": {"shared_prefix": False}, "lookup": {"lookup_tokens": 3}}
    together = partial(complete, **options.get(request.param, {}))
    monkeypatch.setattr(sys.modules[__name__], "complete", together)
    yield start


def test_a_plain_llama_shares_prefixes_and_others_are_padded_for_a_reason_that_is_said(
    model: Any, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(loaded_with(model, tokenizer))
    assert engine.notes() == ["decoding: shared prefix"]
    monkeypatch.setitem(vars(model), "forward", model.forward)
    assert "left padding: another library replaced its forward pass" in engine.notes()[0]


def run(
    model: Any,
    tokenizer: PromptTokenizer,
    prompts: Sequence[list[int]],
    batch: int = 64,
    max_new_tokens: int = 40,
    **options: Any,
) -> list[Written]:
    options |= {"batch": batch, "max_new_tokens": max_new_tokens, "stop": END_OF_PLAN}
    return complete(model, tokenizer, prompts, **options)


def ragged_prompts(tokenizer: PromptTokenizer, count: int) -> list[list[int]]:
    rng = random.Random(4)
    words = ["create", "note", "email", "Sid", "reply", "\n", "1.", "zoom"]
    return [
        tokenizer.encode_prompts([" ".join(rng.choices(words, k=rng.randint(1, 40)))])[0]
        for _ in range(count)
    ]


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("batch", [2, 5, 12])
def test_a_batch_of_ragged_prompts_gives_what_each_prompt_gives_alone(
    batch: int, shared_prefix: bool, model: Any, tokenizer: PromptTokenizer
) -> None:
    prompts = ragged_prompts(tokenizer, 12)
    assert len({len(p) for p in prompts}) > 6
    alone = {"batch": 1, "max_new_tokens": 12, "shared_prefix": False}
    single = run(model, tokenizer, prompts, **alone)
    together = {"batch": batch, "max_new_tokens": 12, "shared_prefix": shared_prefix}
    assert run(model, tokenizer, prompts, **together) == single
    assert len({c.text for c in single}) > 6


def test_padding_that_were_looked_at_would_change_the_completions(
    model: Any, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the comparison above can fail."""
    import torch

    prompts = ragged_prompts(tokenizer, 12)
    single = run(model, tokenizer, prompts, batch=1, max_new_tokens=12, shared_prefix=False)

    def without_mask(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = left_padded(*arguments)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(torch_engine, "left_padded", without_mask)
    found = run(model, tokenizer, prompts, batch=12, max_new_tokens=12, shared_prefix=False)
    assert found != single


def test_padding_is_on_the_left_and_masked() -> None:
    ids, mask = left_padded([[7, 8, 9], [5]], 0, "cpu")
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_longest_prompts_come_first_so_that_a_full_memory_shows_at_once(
    shared_prefix: bool, model: Any, tokenizer: PromptTokenizer
) -> None:
    prompts = ragged_prompts(tokenizer, 7)
    engine = TorchEngine(loaded_with(model, tokenizer), shared_prefix=shared_prefix)
    limits = Limits(stop=END_OF_PLAN, max_new_tokens=1, batch=3)
    found = list(engine.complete_tokens(prompts, limits))
    lengths = [len(prompts[index]) for index, _ in found]
    assert lengths == sorted(lengths, reverse=True)


def segmented(
    tokenizer: PromptTokenizer, text: str, rng: random.Random, longest: bool = False
) -> list[int]:
    """Cut a text into tokens of the vocabulary in one of the many possible ways."""
    pieces: dict[str, int] = {}
    for index in range(3, len(tokenizer.hf)):
        pieces.setdefault(tokenizer.decode_continuation([], [index]), index)
    ids: list[int] = []
    while text:
        fitting = [n for n in range(1, min(len(text), 12) + 1) if text[:n] in pieces]
        length = 1 if not fitting else fitting[-1] if longest else rng.choice(fitting)
        # A character without a token of its own is written as its bytes.
        ids += [pieces[text[:length]]] if fitting else tokenizer.encode_continuation(text[0])
        text = text[length:]
    return ids


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_generation_stops_on_the_stop_text_however_it_is_cut_into_tokens(
    kind: str,
    model: Any,
    tokenizer: PromptTokenizer,
    spm_folder: Path,
    script: Script,
) -> None:
    if kind == "sentencepiece":
        tokenizer = PromptTokenizer(load_tokenizer(spm_folder))
    rng = random.Random(7)
    plan = '1. create_note("caf\u00e9", "$x")\n2. join()'
    # Text right before and behind the stop text may share a token with it.
    behind = ["", "\n", "\n###\nQuestion", ">>", "<END_OF_PLAN>"]
    scripts = [
        segmented(tokenizer, plan + END_OF_PLAN + rng.choice(behind), rng) for _ in range(40)
    ]
    scripts.append(tokenizer.encode_continuation(plan + END_OF_PLAN + "\n"))
    scripts.append([i for c in plan + END_OF_PLAN for i in tokenizer.encode_continuation(c)])
    script(scripts)
    prompt = tokenizer.encode_prompts(["### Response:\n"])[0]
    completions = run(model, tokenizer, [prompt] * len(scripts), max_new_tokens=120)
    for ids, completion in zip(scripts, completions, strict=True):
        texts = [tokenizer.decode_continuation(prompt, ids[:n]) for n in range(len(ids) + 1)]
        needed = next(n for n, text in enumerate(texts) if END_OF_PLAN in text)
        assert completion == Written(plan, "stop", needed)


def test_a_token_that_holds_the_end_of_the_plan_and_the_stop_texts_beginning_is_no_obstacle(
    model: Any, tokenizer: PromptTokenizer, script: Script
) -> None:
    vocab = tokenizer.hf.get_vocab()
    assert "()<" in vocab
    ids = segmented(tokenizer, "1. join()<END_OF_PLAN>", random.Random(0), longest=True)
    assert vocab["()<"] in ids
    script([ids])
    assert run(model, tokenizer, [tokenizer.encode_prompts(["p"])[0]]) == [
        Written("1. join()", "stop", len(ids))
    ]


def test_generation_stops_on_eos_and_eos_is_not_counted(
    model: Any, tokenizer: PromptTokenizer, script: Script
) -> None:
    ids = tokenizer.encode_continuation("1. join()")
    script([[*ids, tokenizer.eos_id], [tokenizer.eos_id]])
    prompts = [tokenizer.encode_prompts(["a b c d"])[0], tokenizer.encode_prompts(["p"])[0]]
    assert run(model, tokenizer, prompts) == [
        Written("1. join()", "eos", len(ids)),
        Written("", "eos", 0),
    ]


def test_generation_stops_on_every_token_that_ends_a_text(
    model: Any, tokenizer: PromptTokenizer, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other,) = tokenizer.encode_continuation("q")
    monkeypatch.setattr(tokenizer, "end_ids", tokenizer.end_ids | {other})
    ids = tokenizer.encode_continuation("1. join()")
    script([[*ids, other], [*ids, tokenizer.eos_id]])
    prompts = [tokenizer.encode_prompts(["a b c d"])[0], tokenizer.encode_prompts(["p"])[0]]
    assert run(model, tokenizer, prompts) == [Written("1. join()", "eos", len(ids))] * 2


def test_a_completion_that_is_cut_says_so_and_counts_its_tokens(
    model: Any, tokenizer: PromptTokenizer, script: Script
) -> None:
    ids = tokenizer.encode_continuation("1. create_note(")
    script([ids * 20])
    (completion,) = run(model, tokenizer, [tokenizer.encode_prompts(["p"])[0]], max_new_tokens=9)
    expected = tokenizer.decode_continuation([], (ids * 20)[:9])
    assert completion == Written(expected, "length", 9)


def test_stop_on_the_very_last_token_is_a_stop_and_not_a_cut(
    model: Any, tokenizer: PromptTokenizer, script: Script
) -> None:
    ids = tokenizer.encode_continuation("1. join()" + END_OF_PLAN)
    script([ids])
    (completion,) = run(
        model, tokenizer, [tokenizer.encode_prompts(["p"])[0]], max_new_tokens=len(ids)
    )
    assert completion == Written("1. join()", "stop", len(ids))


def test_each_row_of_a_batch_ends_for_its_own_reason(
    model: Any, tokenizer: PromptTokenizer, script: Script
) -> None:
    plan = tokenizer.encode_continuation("1. join()" + END_OF_PLAN)
    text = tokenizer.encode_continuation("2. join()")
    long = tokenizer.encode_continuation("x y ") * 40
    script([plan, [*text, tokenizer.eos_id], long])
    prompts = [tokenizer.encode_prompts(["p" * n])[0] for n in (9, 5, 1)]
    found = run(model, tokenizer, prompts, max_new_tokens=30)
    assert [c.stop_reason for c in found] == ["stop", "eos", "length"]
    assert [c.new_tokens for c in found] == [len(plan), len(text), 30]


def test_stop_texts_inside_the_prompt_do_not_stop(
    model: Any, tokenizer: PromptTokenizer, script: Script
) -> None:
    ids = tokenizer.encode_continuation("1. join()")
    script([[*ids, tokenizer.eos_id]])
    prompt = tokenizer.encode_prompts(["example\n1. join()<END_OF_PLAN>"])[0]
    assert run(model, tokenizer, [prompt]) == [Written("1. join()", "eos", len(ids))]


def test_what_comes_after_eos_is_no_text_even_if_it_spells_the_stop_text(
    model: Any, tokenizer: PromptTokenizer, script: Script
) -> None:
    plan = tokenizer.encode_continuation("1. join()")
    stop = tokenizer.encode_continuation(END_OF_PLAN)
    script([[*plan, tokenizer.eos_id, *stop], tokenizer.encode_continuation("a b c d e f g h")])
    prompts = [tokenizer.encode_prompts(["p q r"])[0], tokenizer.encode_prompts(["p"])[0]]
    assert run(model, tokenizer, prompts)[0] == Written("1. join()", "eos", len(plan))


def test_no_prompts_give_no_completions(model: Any, tokenizer: PromptTokenizer) -> None:
    assert run(model, tokenizer, []) == []


class Failure(Exception):
    """Raised inside `generating`."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_generating_puts_mode_cache_flag_and_random_state_back(
    training: bool, use_cache: bool, fails: bool, model: Any, tokenizer: PromptTokenizer
) -> None:
    import torch

    model.train(training)
    model.config.use_cache = use_cache
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try:
        with generating(loaded_with(model, tokenizer)):
            assert not model.training
            assert model.config.use_cache
            assert not torch.is_grad_enabled()
            torch.rand(100)
            if fails:
                raise Failure
    except Failure:
        pass
    assert model.training is training
    assert model.config.use_cache is use_cache
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)
    model.eval()


def test_generating_changes_no_weight_and_leaves_no_gradient(
    model: Any, tokenizer: PromptTokenizer
) -> None:
    import torch

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, tokenizer, ragged_prompts(tokenizer, 3), max_new_tokens=4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
