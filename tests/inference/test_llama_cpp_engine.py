"""llama.cpp writes the plans of torch, and prompts that differ are told."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch_runs import load_plainly

from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.engine import Engine, Limits, Prompt
from tinyagent_fast.inference.llama_cpp import LlamaCppEngine, LlamaCppSettings, LlamaServer
from tinyagent_fast.inference.parity import compare_batches
from tinyagent_fast.inference.torch_engine import TorchEngine
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.plans.grammar import END_OF_PLAN

LIMITS = Limits(stop=END_OF_PLAN, max_new_tokens=8)


def make_prompts(count: int) -> list[Prompt]:
    systems = (" other tools:\n1. open_note", "tools")
    return [
        Prompt(system=systems[at % 2], user="Question: open note" + " please" * at)
        for at in range(count)
    ]


def by_index(engine: Engine, prompts: Sequence[Prompt], batch: int) -> dict[int, Any]:
    """Give what was written, and why it ended, by the prompts' indices."""
    found: dict[int, Any] = {}
    for index, done in engine.generate(prompts, replace(LIMITS, batch=batch)):
        assert index not in found, "answered twice"
        found[index] = (done.text, done.stop_reason, done.new_tokens, done.prompt_tokens)
    return found


@pytest.fixture(scope="module")
def loaded(tiny_merged: Path) -> LoadedModel:
    return load_plainly(tiny_merged)


@pytest.fixture(scope="module")
def server(tiny_merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """Serve the same model as `loaded`, with the template that it is trained on in the file."""
    pytest.importorskip("xllamacpp", reason="these tests run llama.cpp: pip install xllamacpp")
    from tinyagent_fast.export.chat_template import chat_template
    from tinyagent_fast.export.conversion import convert_to_gguf

    path = tmp_path_factory.mktemp("engine") / "tiny-f32.gguf"
    texts = {"tokenizer.chat_template": chat_template("alpaca", None, bos=False)}
    convert_to_gguf(tiny_merged, path, quant="f32", name="tiny", texts=texts)
    settings = LlamaCppSettings(
        model=path, slots=4, context_tokens_per_slot=512, threads=1, cache_type="f32"
    )
    with LlamaServer(settings) as running:
        yield running


@pytest.fixture
def engine(server: LlamaServer, loaded: LoadedModel) -> LlamaCppEngine:
    return LlamaCppEngine(server, loaded.tokenizer)


def test_both_engines_write_the_same_plans(engine: LlamaCppEngine, loaded: LoadedModel) -> None:
    prompts = make_prompts(6)
    wanted = by_index(TorchEngine(loaded), prompts, 3)
    assert by_index(engine, prompts, 4) == wanted
    assert len({text for text, *_ in wanted.values()}) > 1
    assert engine.compute_dtype == "float32"


def test_what_is_watched_is_what_is_written_unwatched(engine: LlamaCppEngine) -> None:
    prompts, pieces = make_prompts(4), dict.fromkeys(range(4), "")

    def add(index: int, piece: str) -> None:
        pieces[index] += piece

    limits = replace(LIMITS, batch=2)
    watched = {i: c.text for i, c in engine.generate(prompts, limits, add)}
    assert watched == pieces
    for index, (text, *_) in by_index(engine, prompts, 2).items():
        # What may be half a character at the limit is shown by one way only.
        rest = text.removeprefix(watched[index])
        assert text.startswith(watched[index])
        assert rest[:1] in ("", "\ufffd") and len(rest) < 4


def test_what_two_prompts_share_is_computed_once(engine: LlamaCppEngine) -> None:
    system = "Plan with: open_note, send_sms" + ", create_note" * 30
    prompts = [Prompt(system=system, user=user) for user in ("open it", "send it")]
    done = [completion for _, completion in engine.generate(prompts, LIMITS)]
    assert done[1].cached_tokens > 100


def test_whatever_a_watcher_raises_ends_the_generation(engine: LlamaCppEngine) -> None:
    class Stop(Exception):
        pass

    def leave(_: int, __: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        list(engine.generate(make_prompts(1), LIMITS, leave))
    assert len(by_index(engine, make_prompts(2), 2)) == 2


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_every_example_is_answered_once_whatever_the_batch(
    batch: int, engine: LlamaCppEngine
) -> None:
    found = by_index(engine, make_prompts(7), batch)
    assert sorted(found) == list(range(7))
    assert found == by_index(engine, make_prompts(7), 1)


def test_a_prompt_too_long_for_its_slot_ends_the_sweep_with_an_error(
    engine: LlamaCppEngine,
) -> None:
    prompts = make_prompts(3)
    prompts[1] = replace(prompts[1], user="many words " * 600)
    with pytest.raises(ModelError, match="exceeds the available context size"):
        by_index(engine, prompts, 2)


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
    completions = engine.generate(make_prompts(40), replace(LIMITS, batch=2))
    next(completions)
    completions.close()  # type: ignore[attr-defined]
    assert len(sent) < 20
    assert len(by_index(engine, make_prompts(2), 2)) == 2


def test_prompts_with_the_ids_of_training_are_said_to_have_them(engine: LlamaCppEngine) -> None:
    assert engine.notes(make_prompts(3)) == ["all 3 prompts have the token ids of training"]


def test_a_query_that_spells_a_special_token_is_counted_and_named(engine: LlamaCppEngine) -> None:
    prompts = make_prompts(4)
    prompts[2] = replace(prompts[2], user="Question: what does </s> mean?")
    (note,) = engine.notes(prompts)
    assert note.startswith("1 of 4 prompts have other token ids than in training, such as")
    assert "what does </s> mean?" in note


def test_a_file_with_another_template_is_found_out(
    engine: LlamaCppEngine, tiny_gguf: dict[str, Path]
) -> None:
    settings = replace(engine.server.settings, model=tiny_gguf["f32"])
    with LlamaServer(settings) as other:
        (note,) = LlamaCppEngine(other, engine.tokenizer).notes(make_prompts(3))
    assert note.startswith("3 of 3 prompts have other token ids")


def test_without_the_runs_tokenizer_nothing_is_claimed(engine: LlamaCppEngine) -> None:
    assert LlamaCppEngine(engine.server).notes(make_prompts(2)) == []


def test_slots_that_agree_are_used(engine: LlamaCppEngine) -> None:
    report = compare_batches(engine, make_prompts(6), replace(LIMITS, batch=4), sample=5)
    assert (report.prompts, report.tried, report.safe_batch) == (5, ((4, 0),), 4)


def test_completions_depend_on_the_files_content_and_not_on_its_name(
    engine: LlamaCppEngine, tmp_path: Path
) -> None:
    def identity_of(path: Path) -> dict[str, Any]:
        with LlamaServer(replace(engine.server.settings, model=path, slots=1)) as other:
            return dict(LlamaCppEngine(other).identity())

    original = engine.server.settings.model
    copy = tmp_path / "renamed.gguf"
    shutil.copyfile(original, copy)
    assert identity_of(copy) == identity_of(original)
    with copy.open("ab") as stream:
        stream.write(b"\0")
    assert identity_of(copy) != identity_of(original)
