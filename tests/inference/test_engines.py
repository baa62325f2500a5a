"""Engines: the same plans from torch and from llama.cpp, and prompts that differ are told."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import EvalConfig
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ModelError
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.running import evaluate_examples
from tinyagent_fast.inference.decoding import Completion, complete, generating
from tinyagent_fast.inference.engines import (
    Engine,
    LlamaCppEngine,
    TransformersEngine,
    encode_prompts,
)
from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, LlamaServer, llama_server
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.tokenizers import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

SETTINGS = EvalConfig(batch=3, max_new_tokens=8, parity_prompts=2)
ASKED: dict[str, Any] = {"max_new_tokens": 8, "stop": END_OF_PLAN}


def make_examples(count: int, query: str = "open note") -> list[Example]:
    return [
        Example(
            key=f"k{at}/0",
            entry_key=f"k{at}",
            kind="plan",
            query=f"{query} {at}",
            system="tools" if at % 2 else " other tools:\n1. open_note",
            user=f"Question: {query}" + " please" * at,
            output='1. open_note("n", "")\n2. join()',
        )
        for at in range(count)
    ]


def by_index(engine: Engine, examples: Sequence[Example], batch: int) -> dict[int, Completion]:
    found: dict[int, Completion] = {}
    for pairs in engine.complete(examples, batch=batch, **ASKED):
        for index, completion in pairs:
            assert index not in found, "answered twice"
            found[index] = completion
    return found


@pytest.fixture(scope="module")
def loaded(tiny_merged: Path) -> LoadedModel:
    import torch
    from transformers import AutoModelForCausalLM

    return LoadedModel(
        model=AutoModelForCausalLM.from_pretrained(tiny_merged, dtype=torch.float32).eval(),
        tokenizer=PromptTokenizer(load_tokenizer(tiny_merged)),
        backend="transformers",
        device="cpu",
        compute_dtype="float32",
    )


@pytest.fixture(scope="module")
def server(tiny_merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """Serve the same model as `loaded`, with the template that it is trained on in the file."""
    pytest.importorskip("xllamacpp", reason="these tests run llama.cpp: pip install xllamacpp")
    from tinyagent_fast.export.chat_template import chat_template
    from tinyagent_fast.export.conversion import convert_to_gguf

    path = tmp_path_factory.mktemp("engine") / "tiny-f32.gguf"
    template = chat_template("alpaca", None, bos=False)
    convert_to_gguf(tiny_merged, path, quant="f32", name="tiny", chat_template=template, extra={})
    settings = LlamaCppSettings(
        model=path, slots=4, context_tokens_per_slot=512, threads=1, cache_type="f32"
    )
    with llama_server(settings) as running:
        yield running


@pytest.fixture
def engine(server: LlamaServer, loaded: LoadedModel) -> LlamaCppEngine:
    return LlamaCppEngine(server, loaded.tokenizer)


def test_both_engines_write_the_same_plans(engine: LlamaCppEngine, loaded: LoadedModel) -> None:
    examples = make_examples(6)
    torch_engine = TransformersEngine(loaded)
    wanted = by_index(torch_engine, examples, 3)
    assert by_index(engine, examples, 4) == wanted
    assert len({completion.text for completion in wanted.values()}) > 1
    assert {engine.name, torch_engine.name} == {"llama.cpp", "transformers"}


def test_the_torch_engine_is_complete_on_the_prompts_of_training(loaded: LoadedModel) -> None:
    examples = make_examples(4)
    prompts = encode_prompts(loaded.tokenizer, examples)
    with generating(loaded.model):
        pairs = [
            pair
            for batch in complete(loaded.model, loaded.tokenizer, prompts, batch=2, **ASKED)
            for pair in batch
        ]
    assert by_index(TransformersEngine(loaded), examples, 2) == dict(pairs)


def test_the_torch_model_is_left_in_its_mode_when_a_sweep_is_closed_early(
    loaded: LoadedModel,
) -> None:
    import torch

    loaded.model.train()
    batches = TransformersEngine(loaded).complete(make_examples(4), batch=1, **ASKED)
    next(batches)
    assert not loaded.model.training
    batches.close()
    assert loaded.model.training
    assert torch.is_grad_enabled()
    loaded.model.eval()


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_every_example_is_answered_once_whatever_the_batch(
    batch: int, engine: LlamaCppEngine
) -> None:
    found = by_index(engine, make_examples(7), batch)
    assert sorted(found) == list(range(7))
    assert found == by_index(engine, make_examples(7), 1)


def test_a_prompt_too_long_for_its_slot_ends_the_sweep_with_an_error(
    engine: LlamaCppEngine,
) -> None:
    examples = make_examples(3)
    examples[1] = replace(examples[1], user="many words " * 600)
    with pytest.raises(ModelError, match="exceeds the available context size"):
        by_index(engine, examples, 2)


def test_a_sweep_closed_early_sends_no_more_requests(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    chat, lock = engine.server.chat, threading.Lock()

    def counting(*arguments: Any, **keywords: Any) -> Any:
        with lock:
            sent.append(1)
        return chat(*arguments, **keywords)

    monkeypatch.setattr(engine.server, "chat", counting)
    batches = engine.complete(make_examples(40), batch=2, **ASKED)
    next(batches)
    batches.close()
    assert len(sent) < 20
    assert len(by_index(engine, make_examples(2), 2)) == 2


def test_prompts_with_the_ids_of_training_are_said_to_have_them(engine: LlamaCppEngine) -> None:
    assert engine.notes(make_examples(3)) == ["all 3 prompts have the token ids of training"]


def test_a_query_that_spells_a_special_token_is_counted_and_named(engine: LlamaCppEngine) -> None:
    examples = make_examples(4)
    examples[2] = replace(examples[2], user="Question: what does </s> mean?")
    (note,) = engine.notes(examples)
    assert note.startswith("1 of 4 prompts have other token ids than in training, such as k2/0")


def test_a_file_with_another_template_is_found_out(
    engine: LlamaCppEngine, tiny_gguf: dict[str, Path]
) -> None:
    settings = replace(engine.server.settings, model=tiny_gguf["f32"])
    with llama_server(settings) as other:
        (note,) = LlamaCppEngine(other, engine.tokenizer).notes(make_examples(3))
    assert note.startswith("3 of 3 prompts have other token ids")


def test_without_the_runs_tokenizer_nothing_is_claimed(engine: LlamaCppEngine) -> None:
    assert LlamaCppEngine(engine.server).notes(make_examples(2)) == []


def test_slots_that_agree_are_used_and_never_more_than_there_are(engine: LlamaCppEngine) -> None:
    report = engine.compare_batches(make_examples(6), batch=16, sample=5, **ASKED)
    assert (report.asked_batch, report.safe_batch, report.prompts) == (4, 4, 5)
    assert report.tried == ((4, 0),)
    skipped = engine.compare_batches(make_examples(6), batch=16, sample=0, **ASKED)
    assert (skipped.prompts, skipped.safe_batch) == (0, 4)


@pytest.mark.parametrize(("good", "tried"), [(2, ((4, 4), (2, 0))), (1, ((4, 4), (2, 4)))])
def test_fewer_slots_are_used_when_more_change_the_plans(
    good: int,
    tried: tuple[tuple[int, int], ...],
    engine: LlamaCppEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers(examples: Sequence[Example], *, batch: int, **_: Any) -> Iterator[Any]:
        text = "good" if batch <= good else "bad"
        yield [(index, Completion(text, "stop", 1)) for index in range(len(examples))]

    monkeypatch.setattr(engine, "complete", answers)
    report = engine.compare_batches(make_examples(9), batch=4, sample=3, **ASKED)
    assert (report.safe_batch, report.tried) == (good, tried)
    assert not report.agrees


def test_completions_depend_on_the_files_content_and_not_on_its_name(
    engine: LlamaCppEngine, tmp_path: Path
) -> None:
    def identity_of(path: Path) -> dict[str, Any]:
        server = engine.server
        other = LlamaServer(server.url, replace(server.settings, model=path))
        return dict(LlamaCppEngine(other).identity())

    original = engine.server.settings.model
    copy = tmp_path / "renamed.gguf"
    shutil.copyfile(original, copy)
    assert identity_of(copy) == identity_of(original)
    with copy.open("ab") as stream:
        stream.write(b"\0")
    assert identity_of(copy) != identity_of(original)


def test_an_evaluation_of_a_file_is_resumed_scored_and_says_what_it_saw(
    engine: LlamaCppEngine, tmp_path: Path
) -> None:
    examples, lines = make_examples(5), list[str]()
    evaluate_examples(engine, examples[:2], SETTINGS, tmp_path, made_with={})
    result = evaluate_examples(engine, examples, SETTINGS, tmp_path, made_with={}, say=lines.append)
    assert (result.reused, result.metrics.n) == (2, 5)
    assert [p.key for p in result.predictions] == [e.key for e in examples]
    assert "all 3 prompts have the token ids of training" in lines
    assert any(line.startswith("batch 3 = batch 1 on 3") for line in lines)
    written = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert written["generation"]["notes"] == ["all 3 prompts have the token ids of training"]
    made_with = json.loads((tmp_path / "made_with.json").read_text(encoding="utf-8"))
    assert made_with["engine"] == "llama.cpp"
    assert len(PredictionFile(tmp_path).read()) == 5
