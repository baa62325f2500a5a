"""The vLLM engine hands over the ids of training and reads stop reasons; vLLM is stood in for."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.engine import Engine, Limits, Prompt
from tinyagent_fast.inference.vllm import VllmEngine
from tinyagent_fast.plans.gbnf import plan_grammar, without_surrogates
from tinyagent_fast.plans.tools import TINYAGENT
from tinyagent_fast.prompts.builder import encode_prompts
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

STOP = "<END_OF_PLAN>"
LIMITS = Limits(stop=STOP, max_new_tokens=7)


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(system="tools", user=f"Question: open {at}") for at in range(count)]


class StandIn(ModuleType):
    """Answers with the number of prompt tokens, and ends in each of the three ways in turn."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.settings: dict[str, Any] = {}
        self.sampling: dict[str, Any] = {}
        self.calls: list[int] = []
        self.grammars: list[Any] = []

        module = self

        class LLM:
            def __init__(self, **settings: Any) -> None:
                module.settings = settings
                dtype = SimpleNamespace(dtype="torch.bfloat16")
                self.llm_engine = SimpleNamespace(model_config=dtype)

            def generate(self, requests: Any, sampling: Any, use_tqdm: bool) -> Any:
                module.calls.append(len(requests))
                assert len(sampling) == len(requests)
                module.grammars += [one["structured_outputs"] for one in sampling]
                ends = [("stop", STOP), ("stop", 2), ("length", None)]
                return [
                    SimpleNamespace(
                        num_cached_tokens=None,
                        outputs=[
                            SimpleNamespace(
                                text=str(len(request["prompt_token_ids"])),
                                finish_reason=ends[at % 3][0],
                                stop_reason=ends[at % 3][1],
                                token_ids=[1, 2],
                            )
                        ],
                    )
                    for at, request in enumerate(requests)
                ]

        def sampling_params(**settings: Any) -> Any:
            module.sampling = settings
            return settings

        params = ModuleType("vllm.sampling_params")
        params.StructuredOutputsParams = dict  # type: ignore[attr-defined]
        self.sampling_params = params

        self.LLM, self.SamplingParams = LLM, sampling_params


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module.sampling_params)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0")
    return module


@pytest.fixture
def tokenizer(tiny_base: Path) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer(tiny_base))


def test_prompts_go_in_as_the_ids_of_training_and_plans_come_out_greedy(
    vllm: StandIn, tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    engine: Engine = VllmEngine(tmp_path, tokenizer, context_tokens=900)
    given = make_prompts(260)
    pieces: dict[int, str] = {}
    done = list(engine.generate(given, LIMITS, pieces.__setitem__))
    assert [index for index, _ in done] == list(range(260))
    ids = encode_prompts(tokenizer, given)
    assert [completion.text for _, completion in done] == [str(len(row)) for row in ids]
    assert [completion.prompt_tokens for _, completion in done] == [len(row) for row in ids]
    assert [completion.stop_reason for _, completion in done[:3]] == ["stop", "eos", "length"]
    assert pieces == {index: completion.text for index, completion in done}
    assert vllm.calls == [256, 4]
    assert vllm.settings["enable_prefix_caching"] is True
    assert vllm.settings["max_model_len"] == 900
    assert vllm.sampling["temperature"] == 0.0
    assert vllm.sampling["max_tokens"] == 7
    assert vllm.sampling["stop"] == [STOP]


def test_each_prompt_is_held_to_its_own_grammar(
    vllm: StandIn, tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    engine = VllmEngine(tmp_path, tokenizer, context_tokens=900)
    free, held = make_prompts(2)
    held = replace(held, grammar=plan_grammar(TINYAGENT))
    assert len(list(engine.generate([free, held], LIMITS))) == 2
    assert vllm.grammars[0] is None
    # vLLM's library knows characters only.
    assert vllm.grammars[1] == {"grammar": without_surrogates(plan_grammar(TINYAGENT))}
    assert "uD800" not in vllm.grammars[1]["grammar"]


def test_it_says_what_it_is(vllm: StandIn, tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    engine = VllmEngine(tmp_path, tokenizer, context_tokens=900)
    assert engine.identity() == {"engine": "vllm", "vllm": "0.0"}
    assert engine.compute_dtype == "bfloat16"
    assert "batches as it sees fit" in engine.notes(make_prompts(1))[0]
    engine.close()
    engine.close()


def test_without_vllm_the_message_says_what_to_do(
    tokenizer: PromptTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match="pip install"):
        VllmEngine(tmp_path, tokenizer, context_tokens=900)


def test_the_context_is_the_models_and_a_prompt_that_fills_it_is_refused(
    vllm: StandIn, tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 60}', encoding="utf-8")
    engine = VllmEngine(tmp_path, tokenizer, context_tokens=8192)
    assert vllm.settings["max_model_len"] == 60
    long = [Prompt(system="tools", user="open " * 60)]
    with pytest.raises(ModelError, match="a context of 60 tokens"):
        list(engine.generate(long, LIMITS))
    assert vllm.calls == []
