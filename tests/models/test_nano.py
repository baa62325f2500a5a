"""The small models that need no download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyagent_fast.data.schema import Example
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.models import bases
from tinyagent_fast.models.nano import (
    RANDOM_SHAPE,
    PretrainSpec,
    pretrain,
    random_llama,
    train_bpe_tokenizer,
)
from tinyagent_fast.presets import smoke
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

SHAPE = replace(RANDOM_SHAPE, intermediate=64, layers=1, heads=2, kv_heads=1, head_dim=32)
SPEC = PretrainSpec(entries=120, lists=40, steps=30, batch=8)


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, bases.RenderedExample]]:
    return bases._nano_texts(SPEC, [])


def test_a_quoted_name_has_the_same_tokens_in_request_and_plan(
    texts: list[tuple[str, bases.RenderedExample]],
) -> None:
    hf = train_bpe_tokenizer([t.prompt + t.completion for _, t in texts], 1024)
    tokenizer = PromptTokenizer(hf)
    asked = tokenizer.encode_text('open the note "Winter Draft" now')
    called = tokenizer.encode_text('1. open_note("Winter Draft", "")')
    name = tokenizer.encode_text("Winter Draft")
    for ids in (asked, called):
        assert any(ids[i : i + len(name)] == name for i in range(len(ids)))


def test_pretraining_lowers_the_loss_and_reports_progress(
    texts: list[tuple[str, bases.RenderedExample]],
) -> None:
    hf = train_bpe_tokenizer([t.prompt + t.completion for _, t in texts], 512)
    tokenizer = PromptTokenizer(hf)
    seen: list[tuple[int, int]] = []
    rows, pad_id = tokenizer.encode_rows(texts), tokenizer.pad_id
    at_first = pretrain(random_llama(SHAPE, hf, seed=0), rows, pad_id, replace(SPEC, steps=1))
    model = random_llama(SHAPE, hf, seed=0)
    at_last = pretrain(model, rows, pad_id, SPEC, lambda *progress: seen.append(progress))
    assert seen == [(10, 30), (20, 30), (30, 30)]
    assert at_last < 0.85 * at_first


def test_pretraining_is_deterministic(
    texts: list[tuple[str, bases.RenderedExample]],
) -> None:
    hf = train_bpe_tokenizer([t.prompt + t.completion for _, t in texts], 512)
    tokenizer = PromptTokenizer(hf)
    rows = tokenizer.encode_rows(texts)
    weights = []
    for _ in range(2):
        model = random_llama(SHAPE, hf, seed=0)
        pretrain(model, rows, tokenizer.pad_id, replace(SPEC, steps=3))
        weights.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*weights)


def test_pretraining_texts_hold_no_held_out_query() -> None:
    first = bases._nano_texts(SPEC, [])
    queries = [t.prompt.split("Question: ")[1].split("\n")[0] for _, t in first]
    held_out = queries[:50]
    again = bases._nano_texts(SPEC, held_out)
    seen = {
        normalise_query(t.prompt.split("Question: ")[1].split("\n")[0])
        for key, t in again
        if not key.startswith("list/")
    }
    assert not seen & {normalise_query(query) for query in held_out}


def test_the_random_base_is_built_once_and_loads_like_any_base(tmp_path: Path) -> None:
    config = replace(smoke(), runs=tmp_path)
    examples = [
        Example(
            key=f"{n}/0",
            entry_key=str(n),
            kind="plan",
            query=f"call {n}",
            system="Plan with: get_phone_number",
            user=f"Question: call {n}",
            output=f'1. get_phone_number("{n}")\n2. join()',
        )
        for n in range(20)
    ]
    folder = bases.resolve_base(config, examples)
    changed = Path(folder, "config.json").stat().st_mtime_ns
    assert bases.resolve_base(config, examples) == folder
    assert Path(folder, "config.json").stat().st_mtime_ns == changed
    tokenizer = PromptTokenizer(load_tokenizer(Path(folder)))
    assert tokenizer.decode(tokenizer.encode_text("caf\u00e9 1. join()")) == "caf\u00e9 1. join()"
    assert bases.resolve_base(replace(config, model=replace(config.model, base="x/y")), []) == "x/y"
