"""The small models that need no download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyagent_fast.data.schema import Example
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.display import Update
from tinyagent_fast.models import bases
from tinyagent_fast.models.nano import (
    NANO_SHAPE,
    RANDOM_SHAPE,
    PretrainSpec,
    begin_with_copying,
    pretrain,
    random_llama,
    train_bpe_tokenizer,
)
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.presets import nano, smoke
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

SHAPE = replace(RANDOM_SHAPE, intermediate=64, layers=1, heads=2, kv_heads=1, head_dim=32)
COLOURS = ("crimson", "turquoise")
KITES = """
values: {colour: [crimson, turquoise]}
tools:
  - name: wind_kite
    parameters: [{name: colour, type: str, value: colour}]
    phrases: ["wind the {colour} kite"]
"""
SPEC = PretrainSpec(entries=120, lists=40, steps=30, batch=8, learning_rate=3e-3)


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, bases.RenderedExample]]:
    return bases._nano_texts(SPEC, [], None)


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


def test_a_new_base_expects_what_it_has_read_once_before_any_training(
    texts: list[tuple[str, bases.RenderedExample]],
) -> None:
    hf = train_bpe_tokenizer([t.prompt + t.completion for _, t in texts], NANO_SHAPE.vocab)

    def typical_rank(model: Any) -> float:
        """Read random tokens twice; give the rank that the right next one has the second time."""
        once = torch.randperm(len(hf), generator=torch.Generator().manual_seed(1))[:40]
        with torch.no_grad():
            logits_TV = model(torch.cat([once, once])[None]).logits[0, 40:-1]
        return float((logits_TV > logits_TV.gather(1, once[1:, None])).sum(1).median())

    model = random_llama(NANO_SHAPE, hf, seed=0)
    assert typical_rank(model) > len(hf) / 4
    begin_with_copying(model, seed=0)
    assert typical_rank(model) < len(hf) / 10


def test_a_number_is_made_of_digits(texts: list[tuple[str, bases.RenderedExample]]) -> None:
    hf = train_bpe_tokenizer([t.prompt + t.completion for _, t in texts], 1024)
    tokenizer = PromptTokenizer(hf)
    assert [tokenizer.decode([i]) for i in tokenizer.encode_text("1984")] == list("1984")


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
    first = bases._nano_texts(SPEC, [], None)
    queries = [t.prompt.split("Question: ")[1].split("\n")[0] for _, t in first]
    held_out = queries[:50]
    again = bases._nano_texts(SPEC, held_out, None)
    seen = {
        normalise_query(t.prompt.split("Question: ")[1].split("\n")[0])
        for key, t in again
        if not key.startswith("list/")
    }
    assert not seen & {normalise_query(query) for query in held_out}


def test_the_base_knows_the_words_of_the_catalogue_that_a_run_names(tmp_path: Path) -> None:
    (tmp_path / "kites.yaml").write_text(KITES, encoding="utf-8")
    own = replace(nano(), data=replace(nano().data, catalogue=tmp_path / "kites.yaml"))
    texts = bases._nano_texts(SPEC, ["Wind the crimson kite"], own.data.catalogue)
    asked = [text for key, text in texts if not key.startswith("list/")]
    called = {t.completion.removesuffix(END_OF_PLAN) for t in asked}
    assert called == {f'1. wind_kite("{k}")\n2. join()' for k in COLOURS}
    assert not any("Wind the crimson kite\n" in t.prompt for t in asked)
    tokens = PromptTokenizer(bases.base_tokenizer(own, [])).encode_text(' wind_kite("turquoise")')
    others = PromptTokenizer(bases.base_tokenizer(nano(), [])).encode_text(
        ' wind_kite("turquoise")'
    )
    assert len(tokens) < 8 < len(others)


def test_the_nano_base_is_trained_once_and_its_steps_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []

    @contextmanager
    def stage(label: str, _unit: str) -> Iterator[Update]:
        yield lambda done, total: told.append((label, done, total))

    monkeypatch.setattr(bases, "PretrainSpec", lambda: SPEC)
    config = replace(nano(), runs=tmp_path, train=replace(nano().train, threads=1))
    folder = bases.resolve_base(config, [], stage=stage)
    assert told == [("training the nano base", step, 30) for step in (10, 20, 30)]
    assert bases.resolve_base(config, [], stage=stage) == folder
    assert len(told) == 3


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
