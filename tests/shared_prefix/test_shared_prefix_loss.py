"""The loss of a packed packed is the loss of its padded full rows, and so are all gradients."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyagent_fast.models.families import FAMILIES
from tinyagent_fast.shared_prefix import forward, projections
from tinyagent_fast.shared_prefix.forward import shared_prefix_loss, unsupported
from tinyagent_fast.shared_prefix.packing import pack
from tinyagent_fast.training.trainer import collate

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
Rows = list[dict[str, list[int]]]


def llama(*, kv_heads: int = 2, layers: int = 3, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": layers, "num_key_value_heads": kv_heads}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def of_family(model_type: str, **changes: Any) -> Any:
    """Make a small model of a family; what it has as zeros and ones at first is random here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, "head_dim": 16, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def with_adapter(model: Any, **changes: Any) -> Any:
    """Add an adapter that is not zero at the start, so that all of its gradients count."""
    from peft import LoraConfig, get_peft_model

    lora = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **changes}
    model = get_peft_model(model, LoraConfig(**lora))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.fixture(scope="module")
def adapted() -> Any:
    return with_adapter(llama())


def row(ids: list[int], supervised: int) -> dict[str, list[int]]:
    cut = len(ids) - supervised
    return {"input_ids": ids, "labels": [*[-100] * cut, *ids[cut:]]}


def some_rows(prefix: int = 40, suffixes: tuple[int, ...] = (9, 14, 5, 23)) -> Rows:
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(VOCABULARY, (count,), generator=generator).tolist()
        return drawn

    stem = tokens(prefix)
    return [row(stem + tokens(suffix), min(4, suffix)) for suffix in suffixes]


@st.composite
def batches(draw: st.DrawFn) -> Rows:
    """Rows that share all, some or nothing, of which one may be a prefix of another."""
    token = st.integers(0, VOCABULARY - 1)
    stem = draw(st.lists(token, min_size=40, max_size=60))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        kept = draw(st.sampled_from([0, 7, len(stem) - 3, len(stem)]))
        ids = stem[:kept] + draw(st.lists(token, min_size=0 if kept else 3, max_size=20))
        rows.append(row(ids, draw(st.integers(1, 3))))
    if draw(st.booleans()):
        rows.append(dict(rows[0]))
    return rows


def gradients(model: Any, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), found


def padded_loss(model: Any, rows: Rows) -> Tensor:
    """Compute the mean loss of a supervised token from full rows, without rounding to fp32."""
    batch = collate(rows, pad_id=0)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits[labels != -100].to(torch.promote_types(logits.dtype, torch.float32)),
        labels[labels != -100],
    )


def assert_same(
    model: Any,
    rows: Rows,
    *,
    loss: float,
    gradient: float,
    checkpointing: bool = False,
    smallest_shared_tokens: int | None = 4,
) -> None:
    packed = pack(rows, smallest_shared_tokens=smallest_shared_tokens)
    wanted, wanted_gradients = gradients(model, lambda: padded_loss(model, rows))
    found, found_gradients = gradients(
        model, lambda: shared_prefix_loss(model, packed, checkpointing=checkpointing)
    )
    assert abs(found - wanted) <= loss * wanted
    assert found_gradients.keys() == wanted_gradients.keys()
    assert found_gradients
    largest = max(float(g.norm()) for g in wanted_gradients.values())
    for name, want in wanted_gradients.items():
        error = float((found_gradients[name] - want).norm())
        # A gradient that cancels to nothing, as of queries whose keys are all alike, is noise.
        assert error <= gradient * (float(want.norm()) + 0.01 * largest), name


@given(rows=batches(), smallest=st.sampled_from([None, 4]), checkpointing=st.booleans())
@settings(deadline=None, max_examples=40)
def test_loss_and_gradients_equal_those_of_padded_rows(
    adapted: Any, rows: Rows, smallest: int | None, checkpointing: bool
) -> None:
    assert_same(
        adapted,
        rows,
        loss=1e-6,
        gradient=1e-4,
        checkpointing=checkpointing,
        smallest_shared_tokens=smallest,
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_in_fp64_they_agree_to_what_norms_in_fp32_leave(kv_heads: int) -> None:
    model = with_adapter(llama(kv_heads=kv_heads)).double()
    assert_same(model, some_rows(), loss=2e-7, gradient=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_trained_exactly_or_in_whole_rows(model_type: str) -> None:
    model = with_adapter(of_family(model_type)).double()
    reason = FAMILIES[model_type].whole_rows
    assert unsupported(model, "training") == (reason or None)
    if not reason:
        assert_same(model, some_rows(), loss=2e-7, gradient=1e-6)
        assert_same(model, some_rows(), loss=2e-7, gradient=1e-6, checkpointing=True)


def test_a_model_with_layers_that_see_a_window_is_trained_in_whole_rows() -> None:
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    assert "sliding window" in str(unsupported(of_family("qwen2", **windows), "training"))


@pytest.mark.parametrize("layers", [1, 2])
def test_models_of_few_layers_are_no_special_case(layers: int) -> None:
    assert_same(with_adapter(llama(layers=layers)), some_rows(), loss=1e-6, gradient=1e-4)


def test_it_is_the_models_own_loss(adapted: Any) -> None:
    rows = some_rows()
    wanted = adapted(**collate(rows, pad_id=0), use_cache=False).loss
    torch.testing.assert_close(shared_prefix_loss(adapted, pack(rows)), wanted)


def test_one_long_row_alone_is_trained_without_its_dead_work(adapted: Any) -> None:
    assert_same(adapted, some_rows(suffixes=(30,)), loss=1e-6, gradient=1e-4)


def test_a_whole_prompt_can_be_the_prefix(adapted: Any) -> None:
    stem = some_rows(40, (1,))[0]["input_ids"]
    rows = [row([*stem, n, n + 1, 2], 3) for n in range(4)]
    assert pack(rows).prefix_tokens == len(stem) - 1
    assert_same(adapted, rows, loss=1e-6, gradient=1e-4)


def test_rows_with_several_answers_count_all_of_them(adapted: Any) -> None:
    rows = some_rows()
    for one in rows:
        one["labels"][10:13] = one["input_ids"][10:13]
    assert_same(adapted, rows, loss=1e-6, gradient=1e-4)


def test_full_training_without_an_adapter_is_exact_too() -> None:
    assert_same(llama().train(), some_rows(), loss=1e-6, gradient=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj", "down_proj", "embed_tokens", "lm_head"]},
        {"use_dora": True},
        {"use_rslora": True, "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_every_kind_of_adapter_is_trained_as_peft_has_it(changes: dict[str, Any]) -> None:
    model = with_adapter(llama(tie_word_embeddings=False), **changes)
    assert_same(model, some_rows(), loss=1e-6, gradient=1e-4)


def test_biases_and_scaled_rotary_embeddings_are_the_models_own() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    model = llama(attention_bias=True, mlp_bias=True, rope_parameters=rope)
    assert unsupported(model, "training") is None
    assert_same(with_adapter(model), some_rows(), loss=1e-6, gradient=1e-4)


def test_the_sum_is_divided_by_the_items_of_the_step(adapted: Any) -> None:
    packed = pack(some_rows())
    mean = shared_prefix_loss(adapted, packed)
    for items in (48, 48.0, torch.tensor(48)):
        loss = shared_prefix_loss(adapted, packed, items)
        torch.testing.assert_close(loss * 48, mean * packed.supervised_tokens)


def test_many_targets_go_through_the_head_in_chunks(
    adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_HEAD_CHUNK_TOKENS", 3)
    assert_same(adapted, some_rows(), loss=1e-6, gradient=1e-4)


def test_the_head_sees_supervised_positions_only(adapted: Any) -> None:
    rows = some_rows()
    packed = pack(rows)
    seen: list[int] = []
    head = adapted.get_base_model().lm_head
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out[..., 0].numel()))
    shared_prefix_loss(adapted, packed)
    hook.remove()
    assert seen == [packed.supervised_tokens] == [16]


def tokens_through(model: Any, loss: Callable[[], Tensor]) -> dict[str, int]:
    """Count the tokens that go into each layer's norms."""
    counts: dict[str, int] = {}
    hooks = []
    for at, layer in enumerate(model.get_base_model().model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):

            def count(module: Any, args: Any, out: Tensor, key: str = f"{at}.{name}") -> None:
                counts[key] = out[..., 0].numel()

            hooks.append(getattr(layer, name).register_forward_hook(count))
    loss()
    for hook in hooks:
        hook.remove()
    return counts


def test_shared_tokens_are_computed_once_and_the_last_mlp_where_needed(adapted: Any) -> None:
    rows = some_rows()
    packed = pack(rows)
    counts = tokens_through(adapted, lambda: shared_prefix_loss(adapted, packed))
    assert counts.pop("2.post_attention_layernorm") == 16
    assert set(counts.values()) == {packed.computed_tokens}
    assert packed.computed_tokens == 39 + (9 + 14 + 5 + 23)


def activations_gib(loss: Callable[[], Tensor]) -> float:
    """Measure what is kept for the backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    assert value.requires_grad
    return sum(kept.values()) / 2**30


def test_checkpointing_keeps_less_and_changes_nothing(adapted: Any) -> None:
    packed = pack(some_rows())
    plain = activations_gib(lambda: shared_prefix_loss(adapted, packed))
    saving = activations_gib(lambda: shared_prefix_loss(adapted, packed, checkpointing=True))
    assert saving < 0.6 * plain
    exact = [
        gradients(adapted, lambda on=on: shared_prefix_loss(adapted, packed, checkpointing=on))
        for on in (False, True)
    ]
    assert torch.equal(exact[0][0], exact[1][0])
    assert all(torch.equal(exact[0][1][name], exact[1][1][name]) for name in exact[0][1])


def test_bf16_bases_agree_within_their_rounding() -> None:
    model = with_adapter(llama().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_same(model, some_rows(), loss=0.02, gradient=0.15)


def test_autocast_computes_in_half_precision() -> None:
    model = with_adapter(llama().to(torch.bfloat16))
    packed = pack(some_rows())
    with torch.autocast("cpu", torch.bfloat16):
        found, in_half = gradients(model, lambda: shared_prefix_loss(model, packed))
        wanted, plain = gradients(model, lambda: padded_loss(model, some_rows()))
    assert found.dtype is torch.float32
    assert abs(found - wanted) < 0.02 * wanted
    for name, want in plain.items():
        assert (in_half[name] - want).norm() < 0.15 * want.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_bit_bases_stay_in_four_bits_and_are_exact(
    four_bits: Any, checkpointing: bool
) -> None:
    assert unsupported(four_bits, "training") is None
    assert_same(four_bits, some_rows(), loss=1e-5, gradient=1e-3, checkpointing=checkpointing)
    kinds = {type(module).__name__ for module in four_bits.modules()}
    assert "Linear4bit" in kinds


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_the_adapter_is_still_peft_s(dropout: float) -> None:
    model = with_adapter(llama(), lora_dropout=dropout)
    packed = pack(some_rows())
    losses = {shared_prefix_loss(model, packed).item() for _ in range(3)}
    assert len(losses) == (3 if dropout else 1)


def test_a_replaced_forward_of_a_layer_is_called(adapted: Any) -> None:
    """As quantisation-aware training replaces it."""
    layer = adapted.get_base_model().model.layers[1].self_attn.o_proj
    packed = pack(some_rows())
    before = shared_prefix_loss(adapted, packed)
    original = layer.forward
    layer.forward = lambda x: original(x) * 2
    changed = shared_prefix_loss(adapted, packed)
    del layer.forward
    assert not torch.isclose(before, changed)
    assert torch.equal(before, shared_prefix_loss(adapted, packed))


def test_adapters_that_are_switched_off_or_merged_count_as_peft_counts_them() -> None:
    model = with_adapter(llama())
    rows = some_rows()
    packed = pack(rows)
    adapted_loss = shared_prefix_loss(model, packed)
    with model.disable_adapter():
        off = shared_prefix_loss(model, packed)
        torch.testing.assert_close(off, padded_loss(model, rows))
    assert not torch.isclose(off, adapted_loss)
    model.merge_adapter()
    torch.testing.assert_close(shared_prefix_loss(model, packed), adapted_loss)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_plain_adapters_take_the_way_without_intermediate_tensors(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    original = projections._plain_adapter

    def note(*arguments: Any) -> Any:
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(projections, "_plain_adapter", note)
    shared_prefix_loss(with_adapter(of_family(model_type)), pack(some_rows()))
    assert len(found) == 3 * 7
    assert None not in found


def test_models_that_it_would_compute_wrongly_are_named_with_the_reason(adapted: Any) -> None:
    from peft import IA3Config, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    assert unsupported(llama(), "training") is None
    assert unsupported(adapted, "training") is None
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    other = MistralForCausalLM(MistralConfig(**small, **heads))
    assert "MistralForCausalLM" in str(unsupported(other, "training"))
    dropping = llama(attention_dropout=0.1)
    assert "attention_dropout is 0.1" in str(unsupported(dropping, "training"))
    assert unsupported(dropping, "decoding") is None
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic" in str(unsupported(llama(rope_parameters=dynamic), "training"))
    scaled = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    assert "IA3, not LoRA" in str(unsupported(get_peft_model(llama(), scaled), "training"))
    spread = llama()
    spread.model.layers[1].to("meta")
    assert "2 devices" in str(unsupported(spread, "training"))
    tokens = {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}
    activated = with_adapter(llama(), **tokens)
    assert "activated LoRA" in str(unsupported(activated, "training"))


def test_every_piece_of_a_layer_is_called_through_its_row(
    adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So layers with kernels of their own need a row and nothing else."""
    calls: Counter[str] = Counter()

    def counted(name: str, piece: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return piece(*arguments)

        return call

    packed = pack(some_rows())
    loss = shared_prefix_loss(adapted, packed)
    row = {name: counted(name, piece) for name, piece in vars(forward.TRANSFORMERS).items()}
    monkeypatch.setattr(forward, "PIECES", {"transformers": forward.LayerPieces(**row)})
    assert torch.equal(loss, shared_prefix_loss(adapted, packed))
    # The last of three layers has queries for some tokens only, so it projects them apart.
    assert calls == {
        "embedding": 1, "norm": 7, "query_key_value": 2, "projection": 3, "output": 3, "mlp": 3,
        "rotary": 1, "rotated": 2,
    }  # fmt: skip
