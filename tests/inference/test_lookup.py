"""Prompt lookup: guesses come from the text, and change no completion, only the steps it takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_runs import Written, complete

from tinyagent_fast.inference.grouping import common_tokens
from tinyagent_fast.inference.lookup import PromptLookup
from tinyagent_fast.inference.prefix_cache import RowBatch
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

few_tokens = st.lists(st.integers(0, 3), max_size=30)


def test_the_guess_is_what_followed_the_last_tokens_before() -> None:
    assert PromptLookup([1, 2, 3, 4, 5, 9, 1, 2, 3]).draft(2) == [4, 5]


def test_the_latest_of_several_occurrences_counts() -> None:
    assert PromptLookup([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]).draft(1) == [8]


def test_a_longer_match_counts_more_than_a_later_one() -> None:
    assert PromptLookup([1, 2, 3, 7, 9, 3, 8, 1, 2, 3]).draft(1) == [7]
    assert PromptLookup([1, 2, 3, 7, 9, 3, 8, 4, 5, 3]).draft(1) == [8]


def test_what_was_written_is_looked_up_too() -> None:
    lookup = PromptLookup([1, 2])
    assert lookup.draft(3) == []
    lookup.extend([6, 7, 8, 6])
    assert lookup.draft(3) == [7, 8, 6]


def test_a_repeated_token_is_guessed_on_as_far_as_it_is_known() -> None:
    assert PromptLookup([4, 4, 4]).draft(3) == [4]
    assert PromptLookup([]).draft(3) == []
    assert PromptLookup([1, 1]).draft(0) == []


@given(text=few_tokens, more=few_tokens, most=st.integers(0, 6))
def test_a_guess_stands_in_the_text_behind_the_longest_of_the_last_n_grams_found_there(
    text: list[int], more: list[int], most: int
) -> None:
    lookup = PromptLookup(text)
    lookup.extend(more)
    whole = text + more
    expected: list[int] = []
    for size in (3, 2, 1):
        starts = [at for at in range(len(whole) - size) if whole[at : at + size] == whole[-size:]]
        if starts:
            expected = whole[starts[-1] + size :][:most]
            break
    assert lookup.draft(most) == expected


def test_guesses_count_up_to_the_first_wrong_one() -> None:
    assert common_tokens([], [7]) == 0
    assert common_tokens([7, 8, 9], [7, 8, 9, 1]) == 3
    assert common_tokens([7, 8, 9], [7, 5, 9, 1]) == 1
    assert common_tokens([7], [6, 7]) == 0


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer(tiny_base))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def copier(tiny_base: Path) -> Any:
    """Return a model that writes the same tokens over and over: each depends on the last alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
        model.model.embed_tokens.weight.copy_(embeddings)
        # Token n is followed by n + 1, and the tenth of each ten by the first.
        ids = torch.arange(len(embeddings))
        before = torch.where(ids % 10 == 0, (ids + 9).clamp(max=len(ids) - 1), ids - 1)
        model.lm_head.weight.copy_(embeddings[before])
    return model


def run(
    model: Any, tokenizer: PromptTokenizer, prompts: Sequence[list[int]], **options: Any
) -> tuple[list[Written], list[int]]:
    """Complete prompts and give the tokens that each step was fed."""
    fed: list[int] = []
    original = RowBatch.step

    def step(self: RowBatch, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        fed.append(sum(map(len, tokens)))
        return original(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowBatch, "step", step)
        return complete(model, tokenizer, prompts, stop="\x00never", **options), fed


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    lookup_tokens=st.integers(1, 6),
    batch=st.integers(1, 4),
    max_new_tokens=st.integers(1, 12),
)
def test_completions_are_the_same_whatever_is_guessed(
    seed: int,
    lookup_tokens: int,
    batch: int,
    max_new_tokens: int,
    model: Any,
    tokenizer: PromptTokenizer,
) -> None:
    rng = random.Random(seed)
    prompts = [[1, *(rng.randrange(3, 12) for _ in range(rng.randint(1, 40)))] for _ in range(4)]
    options = {"max_new_tokens": max_new_tokens, "batch": batch}
    alone, _ = run(model, tokenizer, prompts, **options, shared_prefix=False)
    assert run(model, tokenizer, prompts, **options, lookup_tokens=lookup_tokens)[0] == alone


def test_a_text_that_repeats_itself_takes_fewer_steps(
    copier: Any, tokenizer: PromptTokenizer
) -> None:
    prompts = [[1, 30], [1, 52], [1, 77, 78]]
    plain, steps = run(copier, tokenizer, prompts, batch=3, max_new_tokens=40)
    assert steps == [3] * 39
    guessed, fewer = run(copier, tokenizer, prompts, batch=3, max_new_tokens=40, lookup_tokens=4)
    assert guessed == plain
    # The first round of ten tokens is new; after it, five tokens come at each step.
    assert len(fewer) <= 11 + 7
    assert max(fewer) == 3 * 5


def test_no_guess_goes_beyond_the_last_token_that_may_be_written(
    copier: Any, tokenizer: PromptTokenizer
) -> None:
    prompt = [1, *range(30, 40), *range(30, 36)]
    for most in range(1, 7):
        (completion,), fed = run(
            copier, tokenizer, [prompt], batch=1, max_new_tokens=most, lookup_tokens=8
        )
        assert completion.new_tokens == most
        assert all(count <= most - 1 for count in fed)


def test_without_lookup_each_step_is_fed_one_token_a_row(
    copier: Any, tokenizer: PromptTokenizer
) -> None:
    _, fed = run(copier, tokenizer, [[1, 30], [1, 40]], batch=2, max_new_tokens=5)
    assert fed == [2] * 4
