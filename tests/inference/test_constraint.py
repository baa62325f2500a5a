"""Plans under a grammar: whatever the model, plans of the listed tools and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch_runs import load_plainly

from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.inference.constraint import Constraints
from tinyagent_fast.inference.engine import Completion, Limits, Prompt
from tinyagent_fast.inference.torch_engine import TorchEngine
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.plans.drawing import draw_plan
from tinyagent_fast.plans.gbnf import plan_grammar
from tinyagent_fast.plans.grammar import END_OF_PLAN, parse_plan
from tinyagent_fast.plans.tools import TINYAGENT, Parameter, Tool, tools_by_name
from tinyagent_fast.prompts.builder import encode_prompts, held_to_tools
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer

NUMBERS = tools_by_name(
    [Tool("wait", (Parameter("minutes", "int"), Parameter("quiet", "bool"))), Tool("ping", ())]
)
TOOL_SETS: Mapping[str, Mapping[str, Tool]] = {
    "all": TINYAGENT,
    "texts": {name: TINYAGENT[name] for name in ("get_phone_number", "send_sms")},
    "emails": {name: TINYAGENT[name] for name in ("get_email_address", "forward_email")},
    "numbers": NUMBERS,
}
WAYS = {
    "left padding": {"shared_prefix": False},
    "shared prefix": {},
    "lookup": {"lookup_tokens": 4},
}
LIMIT = 300
LIMITS = Limits(stop=END_OF_PLAN, max_new_tokens=LIMIT)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def untrained(request: Any, tiny_base: Path, spm_folder: Path, tmp_path_factory: Any) -> Any:
    """Return a random model whose strings end now and then, with each kind of tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tiny_base
    if request.param == "sentencepiece":
        tokenizer = load_tokenizer(spm_folder)
        torch.manual_seed(1)
        shape = LlamaConfig(
            # Longer than the vocabulary, as rows of real models are.
            vocab_size=len(tokenizer) + 12,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.2,
        )
        folder = tmp_path_factory.mktemp("spm-model")
        LlamaForCausalLM(shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    loaded = load_plainly(folder)
    closing = [
        loaded.tokenizer.encode_continuation(text)[0] for text in ('"', "$", ")", "]", "1", "join")
    ]

    def favour(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., closing] += 4.0
        return logits

    loaded.model.lm_head.register_forward_hook(favour)
    return loaded


def prompts() -> list[tuple[Prompt, Mapping[str, Tool]]]:
    asked = []
    for at in range(6):
        for tools in TOOL_SETS.values():
            prompt = Prompt(
                system="Plan with some tools. " * 12, user=f"Question: {at} " * (at + 1)
            )
            asked.append((replace(prompt, grammar=plan_grammar(tools)), tools))
    return asked


def answers(loaded: LoadedModel, asked: list[Prompt], batch: int, **way: Any) -> list[Completion]:
    engine = TorchEngine(loaded, **way)
    found = dict(engine.generate(asked, replace(LIMITS, batch=batch)))
    return [found[index] for index in range(len(asked))]


def test_every_plan_of_an_untrained_model_is_right_on_every_way_and_the_same(
    untrained: LoadedModel,
) -> None:
    asked = prompts()
    only = [prompt for prompt, _ in asked]
    done = answers(untrained, only, 5)
    whole = 0
    for (_, tools), completion in zip(asked, done, strict=True):
        if completion.stop_reason != "stop":  # said as such: it is broken off by the limit
            assert completion.stop_reason == "length"
            assert completion.new_tokens == LIMIT
            continue
        whole += 1
        parse_plan(completion.text)
        assert draw_plan(completion.text, tools).all_problems == ()
    assert whole  # else nothing was tried
    texts = [completion.text for completion in done]
    for way in WAYS.values():
        assert [one.text for one in answers(untrained, only, 3, **way)] == texts
    one_by_one = TorchEngine(untrained, lookup_tokens=3)
    for prompt, text in zip(only[:8], texts, strict=False):
        ((_, alone),) = one_by_one.generate([prompt], LIMITS)
        assert alone.text == text


def test_each_token_is_the_most_likely_that_the_whole_mask_allows(untrained: LoadedModel) -> None:
    """Written apart from the engine: no cache, and the mask of the vocabulary at every step."""
    import numpy as np
    import torch

    prompt, _ = prompts()[1]
    assert prompt.grammar is not None
    ids = encode_prompts(untrained.tokenizer, [prompt])[0]
    start = len(ids)
    matcher = Constraints(untrained.tokenizer).begin(prompt.grammar)._matcher
    while not matcher.is_stopped() and len(ids) < start + 60:
        with torch.no_grad():
            logits = untrained.model(torch.tensor([ids])).logits[0, -1].numpy().copy()
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        logits[: len(allowed)][~allowed] = -np.inf
        logits[len(allowed) :] = -np.inf
        token = int(logits.argmax())
        assert matcher.consume_token(token)
        ids.append(token)
    (done,) = answers(untrained, [prompt], 1)
    text = untrained.tokenizer.decode_continuation(ids[:start], ids[start:])
    assert done.text.startswith(text.partition(END_OF_PLAN)[0])
    assert len(text) > 20


def test_one_batch_can_hold_some_prompts_and_leave_others_free(untrained: LoadedModel) -> None:
    held = [prompt for prompt, _ in prompts()[:4]]
    free = [replace(prompt, grammar=None) for prompt in held]
    mixed = answers(untrained, [held[0], free[0], held[3], free[3]], 4, lookup_tokens=2)
    assert [one.text for one in mixed[::2]] == [
        one.text for one in answers(untrained, [held[0], held[3]], 2)
    ]
    assert [one.text for one in mixed[1::2]] == [
        one.text for one in answers(untrained, [free[0], free[3]], 2)
    ]


def test_what_the_model_wanted_anyway_is_left_as_it_is(untrained: LoadedModel) -> None:
    grammar = plan_grammar(TINYAGENT)
    wanted = '1. create_note("Trip", "Koffer packen:\\n• Füße", "")\n2. join()<END_OF_PLAN>'
    constraint = Constraints(untrained.tokenizer).begin(grammar)
    for token in untrained.tokenizer.encode_continuation(wanted):
        assert not constraint.ended
        assert constraint.choose(token, lambda _: pytest.fail("the mask was asked")) == token
    assert constraint.ended
    eos = untrained.tokenizer.eos_id
    assert constraint.choose(eos, lambda mask: int(mask.argmax())) == eos


BEGUN = '1. get_phone_number("Ann \\\\ \\"Füße\\"\\n$ 5")\n2. get_phone_number("[Bo] | $1")\n'


def begun_prompt() -> Prompt:
    steps = parse_plan(f"{BEGUN}3. join()").steps[:2]
    grammar = plan_grammar(TINYAGENT, begun=steps, following=["open_note"])
    return Prompt(system=None, user="go", grammar=grammar)


def test_plans_begin_as_they_must_and_go_on_with_the_tool_that_is_left(
    untrained: LoadedModel,
) -> None:
    (done,) = answers(untrained, [begun_prompt()], 1)
    assert done.text.startswith(f"{BEGUN}3. open_note(")


def test_so_they_do_in_llama_cpp(tiny_gguf: dict[str, Path]) -> None:
    pytest.importorskip("xllamacpp", reason="the engine needs the package xllamacpp")
    from tinyagent_fast.inference.llama_cpp import LlamaCppEngine, LlamaCppSettings, LlamaServer

    settings = LlamaCppSettings(
        model=tiny_gguf["f16"], slots=1, context_tokens_per_slot=4096, threads=1
    )
    with closing(LlamaCppEngine(LlamaServer(settings))) as engine:
        ((_, done),) = engine.generate([begun_prompt()], LIMITS)
    assert done.text.startswith(f"{BEGUN}3. open_note(")


def test_llama_cpp_writes_plans_of_each_prompts_own_tools(tiny_gguf: dict[str, Path]) -> None:
    pytest.importorskip("xllamacpp", reason="the engine needs the package xllamacpp")
    from tinyagent_fast.inference.llama_cpp import LlamaCppEngine, LlamaCppSettings, LlamaServer

    settings = LlamaCppSettings(
        model=tiny_gguf["f16"], slots=2, context_tokens_per_slot=4096, threads=1
    )
    asked = prompts()
    with LlamaServer(settings) as server:
        engine = LlamaCppEngine(server)
        limits = replace(LIMITS, max_new_tokens=900, batch=2)
        found = dict(engine.generate([prompt for prompt, _ in asked], limits))
    whole = 0
    for index, (_, tools) in enumerate(asked):
        text = found[index].text
        called = text.partition("(")[0].removeprefix("Thought: ").removeprefix("1. ")
        assert called == "join" or called in tools or text.startswith("Thought: ")
        if found[index].stop_reason == "stop":
            whole += 1
            assert draw_plan(text, tools).all_problems == ()
        else:
            assert found[index].stop_reason == "length"
    assert whole >= 4


@pytest.mark.parametrize("wrong", ["unknown", "taken for Llama's"])
def test_a_tokenizer_that_the_library_cannot_read_is_refused(tiny_base: Path, wrong: str) -> None:
    from tokenizers import decoders

    from tinyagent_fast.errors import ModelError

    tokenizer = PromptTokenizer(load_tokenizer(tiny_base))
    parts = [decoders.ByteFallback(), decoders.Fuse(), decoders.ByteLevel()]
    decoder = decoders.Fuse() if wrong == "unknown" else decoders.Sequence(parts)
    tokenizer.hf.backend_tokenizer.decoder = decoder
    with pytest.raises(ModelError, match="grammar off"):
        Constraints(tokenizer)


LISTED = """\
Make a plan from these 3 actions:
1. get_phone_number(name: str) -> str
 - Finds a number.

2. send_sms(recipients: list[str], message: str) -> str
 - Sends.

3. join():
 - Ends.

 - To send an email look up the address with get_email_address first
"""


def test_tools_of_a_catalogue_whose_defaults_are_lists_have_a_grammar() -> None:
    tools = {tool.name: tool for tool in load_catalogue().tools}
    assert any(isinstance(p.default, list) for tool in tools.values() for p in tool.parameters)
    assert held_to_tools(Prompt(system=None, user="x"), tools).grammar == plan_grammar(tools)


def test_the_grammar_is_of_the_tools_that_the_prompt_lists_not_of_those_it_mentions() -> None:
    held = held_to_tools(Prompt(system=LISTED, user="x"))
    assert held.grammar == plan_grammar(TOOL_SETS["texts"])
    named = held_to_tools(Prompt(system="Use send_sms or get_phone_number.", user="x"))
    assert named.grammar == plan_grammar(TOOL_SETS["texts"])
    for system in (None, "Plan well."):
        assert held_to_tools(Prompt(system=system, user="x")).grammar == plan_grammar(TINYAGENT)


def test_a_listed_tool_whose_arguments_are_not_known_is_refused() -> None:
    prompt = Prompt(system=LISTED.replace("send_sms", "send_pigeon"), user="x")
    with pytest.raises(ConfigError, match="send_pigeon"):
        held_to_tools(prompt)
