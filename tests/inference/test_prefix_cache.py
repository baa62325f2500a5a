"""Decoding over shared prefixes: the plans of one prompt at a time, with each prefix run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_runs import Written, complete

from tinyagent_fast.inference import torch_engine
from tinyagent_fast.inference.grouping import PromptGroup, group_prompts
from tinyagent_fast.inference.prefix_cache import RowBatch
from tinyagent_fast.inference.torch_engine import TorchEngine
from tinyagent_fast.models.families import FAMILIES
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.shared_prefix.attention import TILED, plain_rows_attention
from tinyagent_fast.shared_prefix.forward import DecoderForward, unsupported
from tinyagent_fast.shared_prefix.prefix import compute_prefix

STOP = "e"
"""A letter that a random model writes soon, so that rows end at different times."""


def make_model(
    heads: int, key_heads: int, seed: int = 0, model_type: str = "llama", **changes: Any
) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 768,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PromptTokenizer:
    return PromptTokenizer(load_tokenizer(tiny_base))


@pytest.fixture(scope="module")
def models() -> dict[tuple[int, int], Any]:
    """Return models whose heads have their own, shared and one single head of keys."""
    return {heads: make_model(*heads).double() for heads in ((4, 4), (4, 2), (3, 1))}


def run(
    model: Any,
    tokenizer: PromptTokenizer,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    max_new_tokens: int = 10,
    **options: Any,
) -> list[Written]:
    return complete(
        model, tokenizer, prompts, batch=batch, max_new_tokens=max_new_tokens, stop=STOP, **options
    )


def why_padded(model: Any) -> str | None:
    return unsupported(model, "decoding")


def one_at_a_time(
    model: Any, tokenizer: PromptTokenizer, prompts: Sequence[list[int]], **options: Any
) -> list[Written]:
    return run(model, tokenizer, prompts, batch=1, shared_prefix=False, **options)


tokens = st.integers(3, 767)
"""Ordinary tokens: the first three are special."""


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Draw prompts of a few families; prompts of a family begin alike, some are equal."""
    prompts: list[list[int]] = []
    for prefix in draw(st.lists(st.lists(tokens, min_size=1, max_size=90), min_size=1, max_size=3)):
        endings = st.lists(st.lists(tokens, max_size=9), min_size=1, max_size=4)
        prompts += [prefix + ending for ending in draw(endings)]
    return draw(st.permutations(prompts))


@settings(max_examples=25, deadline=None)
@given(
    prompts=families(),
    batch=st.integers(1, 5),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    lookup_tokens=st.integers(0, 4),
    batch_cost_tokens=st.sampled_from([0, 20, 1000]),
)
def test_any_prompts_give_what_each_gives_alone_token_for_token(
    prompts: list[list[int]],
    batch: int,
    heads: tuple[int, int],
    lookup_tokens: int,
    batch_cost_tokens: int,
    models: dict[tuple[int, int], Any],
    tokenizer: PromptTokenizer,
) -> None:
    model = models[heads]

    def grouped(prompts: Sequence[list[int]], **_: Any) -> list[PromptGroup]:
        """Share also short prefixes, and all that can be or only what spares a batch."""
        return group_prompts(
            prompts, batch=batch, batch_cost_tokens=batch_cost_tokens, least_tokens=1
        )

    expected = one_at_a_time(model, tokenizer, prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "group_prompts", grouped)
        found = run(model, tokenizer, prompts, batch=batch, lookup_tokens=lookup_tokens)
    assert found == expected


def family_of(count: int, prefix_tokens: int = 80, seed: int = 1) -> list[list[int]]:
    import random

    rng = random.Random(seed)
    prefix = [rng.randrange(3, 768) for _ in range(prefix_tokens)]
    return [
        prefix + [rng.randrange(3, 768) for _ in range(rng.randint(1, 30))] for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_family_decoded_together_gives_what_each_prompt_gives_alone(
    dtype: str, tokenizer: PromptTokenizer
) -> None:
    import torch

    model = make_model(4, 2, seed=3).to(getattr(torch, dtype))
    prompts = family_of(12)
    expected = one_at_a_time(model, tokenizer, prompts, max_new_tokens=9)
    assert run(model, tokenizer, prompts, batch=5, max_new_tokens=9) == expected
    assert len({c.new_tokens for c in expected}) > 3
    assert {c.stop_reason for c in expected} == {"stop", "length"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_decodes_together_what_each_prompt_gives_alone(
    model_type: str, tokenizer: PromptTokenizer
) -> None:
    import torch

    model = make_model(4, 2, seed=3, model_type=model_type, head_dim=16).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    assert why_padded(model) == (FAMILIES[model_type].whole_rows or None)
    prompts = family_of(6)
    expected = one_at_a_time(model, tokenizer, prompts, max_new_tokens=9)
    assert run(model, tokenizer, prompts, batch=3, max_new_tokens=9) == expected
    assert len({c.text for c in expected}) > 1


def test_a_prefix_at_wrong_positions_would_change_the_completions(
    tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the comparisons above can fail."""
    model = make_model(4, 2, seed=3)
    prompts = family_of(6)
    expected = one_at_a_time(model, tokenizer, prompts)
    original = DecoderForward.hidden_states

    def shifted(self: Any, ids_T: Any, positions_T: Any, *arguments: Any, **named: Any) -> Any:
        return original(self, ids_T, (positions_T - 1).clamp(min=0), *arguments, **named)

    monkeypatch.setattr(DecoderForward, "hidden_states", shifted)
    assert run(model, tokenizer, prompts, batch=6) != expected


def test_equal_logits_are_broken_as_generate_breaks_them(tokenizer: PromptTokenizer) -> None:
    import torch

    model = make_model(4, 2, seed=5)
    prompts = family_of(5)
    with torch.no_grad():
        # Every token has a twin with the same weights, a few numbers behind it.
        model.lm_head.weight[384:] = model.lm_head.weight[:384]
    assert run(model, tokenizer, prompts, batch=5) == one_at_a_time(model, tokenizer, prompts)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert run(model, tokenizer, prompts, batch=5) == one_at_a_time(model, tokenizer, prompts)


@contextmanager
def tokens_run(model: Any) -> Iterator[list[int]]:
    """Count the tokens of each run through the layers."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].numel())
    )
    try:
        yield seen
    finally:
        hook.remove()


def test_a_prefix_is_run_once_however_many_batches_need_it(tokenizer: PromptTokenizer) -> None:
    model = make_model(4, 2)
    prompts = family_of(9)
    assert len({row[80] for row in prompts}) == 9
    with tokens_run(model) as seen:
        run(model, tokenizer, prompts, batch=3, max_new_tokens=1)
    assert seen[0] == 80
    assert len(seen) == 1 + 3
    assert sum(seen) == 80 + sum(len(row) - 80 for row in prompts)


def test_rows_that_are_done_are_run_no_further(tokenizer: PromptTokenizer) -> None:
    model = make_model(4, 2, seed=3)
    prompts = family_of(12)
    with tokens_run(model) as seen:
        found = run(model, tokenizer, prompts, batch=12, max_new_tokens=25)
    steps = seen[2:]
    # The last token of an answer is never run, and that of the prompt gives the first.
    assert sum(steps) == sum(c.new_tokens - 1 for c in found)
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 3


@pytest.mark.parametrize("device", ["cpu", "another"])
@pytest.mark.parametrize("prefix_tokens", [0, 7])
@pytest.mark.parametrize("most", [1, 12, 1000])
def test_every_token_of_a_step_gets_what_the_model_itself_says_behind_it(
    device: str, prefix_tokens: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows and steps, guesses thrown away, a row taken out; on the ways of all devices."""
    import torch

    from tinyagent_fast.inference import prefix_cache

    monkeypatch.setattr(prefix_cache, "_PREFILL_TOKENS", {"cpu": most})
    if device != "cpu":
        monkeypatch.setattr(prefix_cache, "kernel_for", lambda _: TILED)
        monkeypatch.setattr(prefix_cache, "rows_attention", plain_rows_attention)
    model = make_model(4, 2, seed=2).double()
    prefix, *rows = ([5] * n for n in (prefix_tokens, 9, 4, 1, 6))
    rows = [[10 * at + n for n in range(len(row))] for at, row in enumerate(rows, start=1)]

    def expected(row: list[int]) -> list[int]:
        logits = model(torch.tensor([prefix + row])).logits[0, len(prefix) :]
        return logits.argmax(-1).tolist()

    with torch.no_grad():
        forward = DecoderForward(model)
        first = compute_prefix(forward, prefix[:3])
        batch = RowBatch(
            forward, compute_prefix(forward, prefix[3:], behind=first), rows, room_tokens=9
        )
        assert batch.next_ids == [expected(row)[-1] for row in rows]
        for given, kept in (([3, 1, 2, 4], [2, 1, 1, 4]), ([1, 1, 1], [1, 1, 1]), ([2, 4, 1], 1)):
            new = [[100 * (at + 1) + n for n in range(count)] for at, count in enumerate(given)]
            together = [row + more for row, more in zip(rows, new, strict=True)]
            found = batch.step(new)
            assert found == [
                expected(row)[-count:] for row, count in zip(together, given, strict=True)
            ]
            if kept == 1:
                break
            for at, count in enumerate(kept):
                batch.keep(at, count)
                rows[at] = rows[at] + new[at][:count]
            if len(rows) == 4:
                batch.drop(1)
                rows[1] = rows.pop()


def test_sixteen_bits_read_what_the_model_itself_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tinyagent_fast.inference import prefix_cache

    def note(_: Any, hidden: Any) -> list[int]:
        states.append(hidden)
        return [0] * len(hidden)

    monkeypatch.setattr(prefix_cache.RowBatch, "_most_likely", note)
    model = make_model(4, 2, seed=2).to(torch.bfloat16)
    prompts = family_of(4)
    exact = make_model(4, 2, seed=2).double()
    states: list[Any] = []
    with torch.no_grad():
        forward = DecoderForward(model)
        prefix = compute_prefix(forward, prompts[0][:80])
        RowBatch(forward, prefix, [p[80:] for p in prompts], room_tokens=1)
        for row, state in zip(prompts, states[0], strict=True):
            true, own = (
                m.model(torch.tensor([row])).last_hidden_state[0, -1].double()
                for m in (exact, model)
            )
            assert (state.double() - true).norm() < 2 * (own - true).norm() + 0.01 * true.norm()


def test_an_adapter_is_used_as_generate_uses_it(tokenizer: PromptTokenizer) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    prompts = family_of(6)
    bare = run(make_model(4, 2), tokenizer, prompts, batch=6)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=4, target_modules=projections, task_type="CAUSAL_LM")
    model = get_peft_model(make_model(4, 2), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    assert why_padded(model) is None
    found = run(model, tokenizer, prompts, batch=6)
    assert found == one_at_a_time(model, tokenizer, prompts)
    assert found != bare
    with model.disable_adapter():
        assert run(model, tokenizer, prompts, batch=6) == bare


def test_weights_in_four_bits_give_what_each_prompt_gives_alone(
    tiny_base: Path, tokenizer: PromptTokenizer
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float32, quantization_config=settings, device_map={"": "cpu"}
    ).eval()
    assert why_padded(model) is None
    prompts = [[token % len(tokenizer.hf) for token in row] for row in family_of(5)]
    found = run(model, tokenizer, prompts, batch=5)
    assert found == one_at_a_time(model, tokenizer, prompts)


def replaced_forward() -> Any:
    model = make_model(4, 2)
    model.model.layers[1].self_attn.forward = model.model.layers[1].self_attn.forward
    return model


def other_architecture() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def prompt_tuning() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    settings = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    return get_peft_model(make_model(4, 2), settings)


def penalised() -> Any:
    model = make_model(4, 2)
    model.generation_config.repetition_penalty = 1.2
    return model


def own_generate() -> Any:
    model = make_model(4, 2)
    model.generate = lambda *_, **__: None
    return model


def dynamic_positions() -> Any:
    positions = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return make_model(4, 2, rope_parameters=positions)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (replaced_forward, "another library replaced its forward pass"),
        (other_architecture, "those of MistralForCausalLM"),
        (prompt_tuning, "PROMPT_TUNING"),
        (penalised, "sets repetition_penalty"),
        (own_generate, "replaced its way to generate"),
        (dynamic_positions, "depends on the length"),
        (SimpleNamespace, "those of SimpleNamespace"),
    ],
)
def test_a_model_that_is_no_plain_llama_keeps_its_own_generate_and_the_reason_is_said(
    make: Callable[[], Any], reason: str
) -> None:
    model = make()
    assert reason in (why_padded(model) or "")
    engine = TorchEngine(SimpleNamespace(model=model, backend="transformers"))  # type: ignore[arg-type]
    assert engine.notes() == [f"decoding: left padding: {why_padded(model)}"]


def test_linear_positions_and_a_repetition_penalty_of_one_are_no_obstacle(
    tokenizer: PromptTokenizer,
) -> None:
    positions = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = make_model(4, 2, rope_parameters=positions)
    model.generation_config.repetition_penalty = 1.0
    assert why_padded(model) is None
    prompts = family_of(4)
    assert run(model, tokenizer, prompts, batch=4) == one_at_a_time(model, tokenizer, prompts)


def computed_tokens(
    prompts: Sequence[Sequence[int]],
    groups: Sequence[PromptGroup],
    batch: int,
    batch_cost_tokens: float,
) -> float:
    return sum(
        group.prefix_tokens
        + sum(len(prompts[index]) - group.prefix_tokens for index in group.indices)
        + batch_cost_tokens * -(-len(group.indices) // batch)
        for group in groups
    )


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=14),
    batch=st.integers(1, 5),
    cost=st.sampled_from([0.0, 3.0, 100.0]),
    least=st.integers(1, 4),
)
def test_groups_hold_every_prompt_once_over_a_prefix_that_all_of_them_begin_with(
    prompts: list[list[int]], batch: int, cost: float, least: int
) -> None:
    groups = group_prompts(prompts, batch=batch, batch_cost_tokens=cost, least_tokens=least)
    assert sorted(i for group in groups for i in group.indices) == list(range(len(prompts)))
    for group in groups:
        rows = [prompts[index] for index in group.indices]
        assert len({tuple(row[: group.prefix_tokens]) for row in rows}) == 1
        assert all(len(row) > group.prefix_tokens for row in rows)
        assert group.prefix_tokens == 0 or (len(rows) > 1 and group.prefix_tokens >= least)
        assert [len(row) for row in rows] == sorted(map(len, rows), reverse=True)
    longest = [len(prompts[group.indices[0]]) for group in groups]
    assert longest == sorted(longest, reverse=True)
    chosen = computed_tokens(prompts, groups, batch, cost)
    alone = [PromptGroup((index,), 0) for index in range(len(prompts))]
    unshared = [PromptGroup(tuple(range(len(prompts))), 0)] if prompts else []
    assert chosen <= computed_tokens(prompts, alone, batch, cost)
    assert chosen <= computed_tokens(prompts, unshared, batch, cost)


def test_two_families_make_two_groups_if_each_fills_its_batches() -> None:
    one, other = family_of(8, seed=1), family_of(8, seed=2)
    groups = group_prompts([*one, *other], batch=4, batch_cost_tokens=500.0)
    assert {frozenset(g.indices) for g in groups} == {frozenset(range(8)), frozenset(range(8, 16))}
    assert [group.prefix_tokens for group in groups] == [80, 80]


def test_a_family_too_small_for_a_batch_of_its_own_joins_the_others() -> None:
    one, other = family_of(3, seed=1), family_of(1, seed=2)
    apart = group_prompts([*one, *other], batch=4, batch_cost_tokens=1.0)
    assert len(apart) == 2
    (together,) = group_prompts([*one, *other], batch=4, batch_cost_tokens=1000.0)
    assert together.prefix_tokens == 0


def test_equal_prompts_share_all_but_their_last_token() -> None:
    row = list(range(70))
    (group,) = group_prompts([row, row, row], batch=2, batch_cost_tokens=10.0)
    assert group == PromptGroup((0, 1, 2), 69)


def test_real_training_prompts_share_their_instructions(real_data: Path) -> None:
    import json

    from tinyagent_fast.data.schema import Entry, entry_from_json
    from tinyagent_fast.prompts.loading import tokenizer_from_sentencepiece
    from tinyagent_fast.prompts.templates import render

    raw = json.loads((real_data / "training_data.json").read_text(encoding="utf-8"))
    entries = [entry_from_json(key, value) for key, value in list(raw.items())[:48]]
    examples = [e for entry in entries if isinstance(entry, Entry) for e in entry.examples]
    hf = tokenizer_from_sentencepiece(real_data / "llama_tokenizer.model")
    hf.pad_token = hf.unk_token
    texts = [render(e, "alpaca").prompt for e in examples if e.kind == "plan"]
    prompts = PromptTokenizer(hf).encode_prompts(texts)
    groups = group_prompts(prompts, batch=16, batch_cost_tokens=3600)
    assert len(groups) == 1
    assert groups[0].prefix_tokens > 1500
    assert computed_tokens(prompts, groups, 16, 0) < 0.6 * sum(map(len, prompts))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_what_each_prompt_gives_alone(dtype: str, tokenizer: PromptTokenizer) -> None:
    """In 16 bits two ways to compute may part where two tokens are about as likely."""
    import torch

    model = make_model(4, 2, hidden_size=256).to("cuda", getattr(torch, dtype))
    assert why_padded(model) is None
    prompts = family_of(16)
    expected = one_at_a_time(model, tokenizer, prompts)
    found = run(model, tokenizer, prompts, batch=8, lookup_tokens=2)
    equal = sum(one == other for one, other in zip(found, expected, strict=True))
    assert equal == 16 if dtype == "float32" else equal >= 10
