"""The vLLM engine hands over the ids of training and reads stop reasons; vLLM is stood in for."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.engines import encode_prompts
from tinyagent_fast.inference.vllm_engine import VllmEngine
from tinyagent_fast.prompts.tokenizers import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

STOP = "<END_OF_PLAN>"


def examples(count: int) -> list[Example]:
    return [
        Example(
            key=f"k{at}/0",
            entry_key=f"k{at}",
            kind="plan",
            query=f"open {at}",
            system="tools",
            user=f"Question: open {at}",
            output="1. join()",
        )
        for at in range(count)
    ]


class StandIn(ModuleType):
    """Answers with the number of prompt tokens, and ends in each of the three ways in turn."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.settings: dict[str, Any] = {}
        self.sampling: dict[str, Any] = {}
        self.calls: list[int] = []

        module = self

        class LLM:
            def __init__(self, **settings: Any) -> None:
                module.settings = settings

            def generate(self, requests: Any, sampling: Any, use_tqdm: bool) -> Any:
                module.calls.append(len(requests))
                ends = [("stop", STOP), ("stop", 2), ("length", None)]
                return [
                    SimpleNamespace(
                        outputs=[
                            SimpleNamespace(
                                text=str(len(request["prompt_token_ids"])),
                                finish_reason=ends[at % 3][0],
                                stop_reason=ends[at % 3][1],
                                token_ids=[1, 2],
                            )
                        ]
                    )
                    for at, request in enumerate(requests)
                ]

        def sampling_params(**settings: Any) -> Any:
            module.sampling = settings

        self.LLM, self.SamplingParams = LLM, sampling_params


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0")
    return module


@pytest.fixture
def tokenizer(tiny_base: Path) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer(tiny_base))


def test_prompts_go_in_as_the_ids_of_training_and_plans_come_out_greedy(
    vllm: StandIn, tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    engine = VllmEngine(tmp_path, tokenizer, context_tokens=900)
    given = examples(40)
    pairs = [
        pair
        for pairs in engine.complete(given, batch=1, max_new_tokens=7, stop=STOP)
        for pair in pairs
    ]
    assert [index for index, _ in pairs] == list(range(40))
    ids = encode_prompts(tokenizer, given)
    assert [completion.text for _, completion in pairs] == [str(len(row)) for row in ids]
    assert [completion.stop_reason for _, completion in pairs[:3]] == ["stop", "eos", "length"]
    assert vllm.calls == [16, 16, 8]
    assert vllm.settings["enable_prefix_caching"] is True
    assert vllm.settings["max_model_len"] == 900
    assert vllm.sampling["temperature"] == 0.0
    assert vllm.sampling["max_tokens"] == 7
    assert vllm.sampling["stop"] == [STOP]


def test_nothing_is_said_to_be_compared(
    vllm: StandIn, tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    engine = VllmEngine(tmp_path, tokenizer, context_tokens=900)
    report = engine.compare_batches(examples(2), batch=8, max_new_tokens=4, stop=STOP, sample=2)
    assert "not compared" in report.sentence()
    assert engine.identity() == {"engine": "vllm", "vllm": "0.0"}


def test_without_vllm_the_message_says_what_to_do(
    tokenizer: PromptTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match="pip install"):
        VllmEngine(tmp_path, tokenizer, context_tokens=900)
