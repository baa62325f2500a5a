"""The comparison of batches: agreement is said, a difference is counted and lowers the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.inference import parity
from tinyagent_fast.inference.decoding import Completion, generating
from tinyagent_fast.inference.parity import ParityReport, compare_batches
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.tokenizers import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer(tiny_base))


@pytest.fixture
def model(tiny_base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def make_prompts(tokenizer: PromptTokenizer, count: int) -> list[list[int]]:
    return [tokenizer.encode_prompt("note " * (1 + n) + str(n)) for n in range(count)]


def compare(
    model: Any, tokenizer: PromptTokenizer, count: int, batch: int, sample: int = 8
) -> ParityReport:
    with generating(model):
        return compare_batches(
            model,
            tokenizer,
            make_prompts(tokenizer, count),
            batch=batch,
            max_new_tokens=6,
            stop=END_OF_PLAN,
            sample=sample,
        )


def spoil_from(model: Any, rows: int) -> None:
    """Let the model say something else as soon as a batch has so many rows."""
    original = model.generate

    def generate(**arguments: Any) -> Any:
        output = original(**arguments)
        if len(output) >= rows:
            output[:, arguments["input_ids"].shape[1] :] = 40
        return output

    model.generate = generate


def test_a_model_that_gives_the_same_plans_may_use_the_batch_asked_for(
    model: Any, tokenizer: PromptTokenizer
) -> None:
    report = compare(model, tokenizer, count=9, batch=6)
    assert report == ParityReport(8, 6, 6, ((6, 0),))
    assert report.agrees
    assert report.sentence() == "batch 6 = batch 1 on 8 prompts"


def test_other_plans_in_a_batch_are_counted_and_the_next_smaller_batch_is_tried(
    model: Any, tokenizer: PromptTokenizer
) -> None:
    spoil_from(model, rows=4)
    report = compare(model, tokenizer, count=8, batch=8)
    assert not report.agrees
    assert report.tried == ((8, 8), (4, 8), (2, 0))
    assert report.safe_batch == 2
    assert report.sentence() == (
        "plans differ from batch 1 (8 of 8 at batch 8, 8 of 8 at batch 4, 0 of 8 at batch 2); "
        "falling back to batch 2"
    )


def test_a_model_that_differs_in_every_batch_falls_back_to_one_prompt_at_a_time(
    model: Any, tokenizer: PromptTokenizer
) -> None:
    spoil_from(model, rows=2)
    report = compare(model, tokenizer, count=8, batch=8)
    assert report.safe_batch == 1
    assert [size for size, _ in report.tried] == [8, 4, 2]


def test_a_batch_larger_than_the_sample_is_filled_by_repeating_prompts(
    model: Any, tokenizer: PromptTokenizer
) -> None:
    spoil_from(model, rows=32)
    report = compare(model, tokenizer, count=20, batch=64)
    assert [size for size, _ in report.tried] == [64, 32, 16]
    assert report.safe_batch == 16


@pytest.mark.parametrize(
    ("count", "batch", "sample"), [(5, 4, 0), (5, 1, 8), (0, 4, 8)], ids=["off", "one", "none"]
)
def test_nothing_is_generated_where_there_is_nothing_to_compare(
    count: int,
    batch: int,
    sample: int,
    model: Any,
    tokenizer: PromptTokenizer,
) -> None:
    model.generate = lambda **_: pytest.fail("generated")
    report = compare(model, tokenizer, count=count, batch=batch, sample=sample)
    assert report.safe_batch == batch
    assert report.sentence() == f"batch {batch}: not compared with batch 1"


def completing(texts: Callable[[int], str]) -> Callable[..., Any]:
    def complete(_model: Any, _tokenizer: Any, prompts: Any, *, batch: int, **_: Any) -> Any:
        yield [(index, Completion(texts(batch), "stop", 3)) for index in range(len(prompts))]

    return complete


def test_plans_are_compared_and_not_their_spelling(
    model: Any, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spellings = {1: '1. open_note("a", "")\n2. join()', 4: "1. open_note('a', '')\n\n2. join()\n"}
    monkeypatch.setattr(parity, "complete", completing(spellings.__getitem__))
    assert compare(model, tokenizer, count=4, batch=4).agrees


def test_texts_that_are_no_plans_are_compared_as_they_are(
    model: Any, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "complete", completing(lambda batch: "no plan" + "!" * (batch > 1)))
    assert compare(model, tokenizer, count=4, batch=4).tried == ((4, 4), (2, 4))


def test_the_sample_spreads_over_all_lengths(
    model: Any, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def complete(_model: Any, _tokenizer: Any, prompts: Any, **_: Any) -> Any:
        seen.append([len(p) for p in prompts])
        yield [(index, Completion("", "eos", 0)) for index in range(len(prompts))]

    monkeypatch.setattr(parity, "complete", complete)
    compare(model, tokenizer, count=40, batch=4, sample=5)
    lengths = sorted(len(p) for p in make_prompts(tokenizer, 40))
    assert len(seen[0]) == 5
    assert seen[0][0] == lengths[0]
    assert seen[0][-1] == lengths[-1]
    assert seen[0] == sorted(set(seen[0]))


def test_a_report_can_be_written_as_json(model: Any, tokenizer: PromptTokenizer) -> None:
    report = compare(model, tokenizer, count=3, batch=2)
    assert json.loads(json.dumps(report.to_json())) == {
        "prompts": 3,
        "asked_batch": 2,
        "safe_batch": 2,
        "tried": [[2, 0]],
    }
