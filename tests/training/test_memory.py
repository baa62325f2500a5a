"""Predicted memory and work: as published, as autograd keeps it, and never less for more."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.config import Config, LoraConfig, ModelConfig, TrainConfig
from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.families import FAMILIES, LLAMA, ModelShape
from tinyagent_fast.models.published import TINYLLAMA_32K as TINYLLAMA
from tinyagent_fast.presets import preset_config
from tinyagent_fast.training.memory import (
    GIB,
    MemoryEstimate,
    MemoryEstimator,
    RowLengths,
    preset_batch,
    with_batch,
)

LLAMA_8B = replace(
    TINYLLAMA, hidden=4096, intermediate=14336, layers=32, kv_heads=8, head_dim=128, vocab=128256
)
PUBLISHED = RowLengths(
    rows=39_030,
    mean_tokens=3490,
    longest_tokens=4608,
    supervised_tokens=88,
    shared_tokens=1865,
)
CHECKPOINTINGS = ("false", "true", "unsloth")
FULL_LOGITS = 18
"""Bytes of a logit where all are made at once, in the figures of plain transformers."""


def predicted(shape: ModelShape = TINYLLAMA, **changes: Any) -> MemoryEstimate:
    """Estimate for a micro-batch of one published row, with changes."""
    row_tokens = changes.pop("row_tokens", 4608)
    checkpointing = changes.pop("checkpointing", "unsloth")
    batch, computed = changes.pop("batch", 1), changes.pop("computed_tokens", None)
    sharing = "off" if computed is None else "auto"
    others = {key: changes.pop(key) for key in ("usable_gib",) if key in changes}
    backend = changes.pop("backend", "unsloth")
    config = Config(
        model=ModelConfig(weights=changes.pop("weights", "nf4")),
        train=TrainConfig(
            optimizer=changes.pop("optimizer", "adamw_8bit"),
            shared_prefix=changes.pop("shared_prefix", sharing),
        ),
        lora=LoraConfig(**{"rank": 16, **changes}),
    )
    lengths = RowLengths(
        rows=1, mean_tokens=row_tokens, longest_tokens=row_tokens, supervised_tokens=88
    )
    estimator = MemoryEstimator(
        config=config, shape=shape, lengths=lengths, backend=backend, **others
    )
    return estimator.estimate(batch, checkpointing, computed_tokens=computed)


def bytes_per_token(part: str, shape: ModelShape = TINYLLAMA, **changes: Any) -> float:
    """Give the slope of a part of the prediction."""
    some, more = (
        getattr(predicted(shape, row_tokens=n, **changes), part) for n in (10**5, 2 * 10**5)
    )
    return float(more - some) * GIB / 10**5


@pytest.mark.parametrize(
    ("checkpointing", "published"), [("unsloth", 105e3), ("true", 178e3), ("false", 1102e3)]
)
def test_unsloths_memory_of_a_token_is_the_published_one(
    checkpointing: str, published: float
) -> None:
    got = bytes_per_token("activations_gib", checkpointing=checkpointing)
    assert got == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize(("card_gb", "tokens"), [(24, 78_475), (80, 342_733)])
def test_the_longest_context_that_unsloth_published_of_8b_fills_its_card(
    card_gb: int, tokens: int
) -> None:
    got = predicted(LLAMA_8B, row_tokens=tokens, rank=32).total_gib * GIB / 1e9
    assert got == pytest.approx(card_gb, rel=0.2)


def test_plain_transformers_without_checkpointing_needs_what_was_published() -> None:
    changes = {"backend": "transformers", "checkpointing": "false", "dropout": 0.1}
    logits = FULL_LOGITS * TINYLLAMA.vocab
    got = bytes_per_token("activations_gib", **changes) + logits
    assert got == pytest.approx(3900e3, rel=0.2)


@pytest.mark.parametrize(("shape", "published"), [(TINYLLAMA, 667e3), (LLAMA_8B, 2.47e6)])
def test_plain_transformers_with_checkpointing_needs_what_was_published(
    shape: ModelShape, published: float
) -> None:
    """Logits of all tokens, as then, outweigh the backward pass of a layer."""
    changes = {"backend": "transformers", "checkpointing": "true"}
    got = bytes_per_token("kept_gib", shape, **changes) + FULL_LOGITS * shape.vocab
    assert got == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize(
    ("backend", "weights", "published"),
    [("unsloth", "nf4", 0.83), ("transformers", "nf4", 1.07), ("unsloth", "bf16", 2.17)],
)
def test_weights_adapter_and_optimizer_take_the_published_memory(
    backend: str, weights: str, published: float
) -> None:
    got = predicted(backend=backend, weights=weights)
    assert got.weights_gib + got.adapter_and_optimizer_gib == pytest.approx(published, rel=0.02)


def test_most_rows_without_checkpointing_on_an_l4_are_about_18_000_tokens() -> None:
    at_the_edge = predicted(checkpointing="false", row_tokens=18_000, usable_gib=21.5)
    assert at_the_edge.total_gib == pytest.approx(21.5, rel=0.1)


@pytest.mark.parametrize(
    ("checkpointing", "row_tokens", "giga_per_token"),
    [("true", 3500, 7.59), ("false", 3500, 5.31), ("true", 32_768, 19.5), ("false", 1500, 4.69)],
)
def test_the_work_of_a_token_is_the_published_one(
    checkpointing: Any, row_tokens: int, giga_per_token: float
) -> None:
    lengths = RowLengths(
        rows=1, mean_tokens=row_tokens, longest_tokens=row_tokens, supervised_tokens=88
    )
    config = Config(lora=LoraConfig(rank=16), train=TrainConfig(shared_prefix="off"))
    flops = estimator_of(config, lengths=lengths).flops_per_epoch(checkpointing)
    assert flops / row_tokens / 1e9 == pytest.approx(giga_per_token, rel=0.03)


@pytest.mark.parametrize(("row_tokens", "giga_per_token"), [(3500, 4.89), (1500, 4.27)])
def test_without_dead_work_a_token_takes_the_published_work(
    row_tokens: int, giga_per_token: float
) -> None:
    """Nothing is shared here; the head and the last layer are computed only where loss is."""
    lengths = RowLengths(
        rows=1, mean_tokens=row_tokens, longest_tokens=row_tokens, supervised_tokens=88
    )
    config = Config(lora=LoraConfig(rank=16), train=TrainConfig(batch=1))
    flops = estimator_of(config, lengths=lengths).flops_per_epoch("false")
    assert flops / row_tokens / 1e9 == pytest.approx(giga_per_token, rel=0.03)


@pytest.mark.parametrize(("checkpointing", "hours"), [("false", 10.6), ("true", 15.1)])
def test_three_epochs_on_an_l4_take_at_least_the_published_hours(
    checkpointing: Any, hours: float
) -> None:
    config = Config(lora=LoraConfig(rank=16), train=TrainConfig(shared_prefix="off"))
    flops = 3 * estimator_of(config).flops_per_epoch(checkpointing)
    assert flops / (57e12 * 3600) == pytest.approx(hours, rel=0.02)


COUNTED = replace(TINYLLAMA, layers=6)


@pytest.mark.parametrize("shared_prefix", ["off", "auto"])
@pytest.mark.parametrize(
    ("weights", "targets", "checkpointing", "batch", "dropout"),
    [
        ("bf16", "all-linear", "false", 4, 0.0),
        ("nf4", "all-linear", "false", 2, 0.0),
        ("bf16", "attention", "false", 2, 0.0),
        ("fp32", "all-linear", "false", 2, 0.0),
        ("bf16", "all-linear", "true", 4, 0.0),
        ("nf4", "all-linear", "true", 2, 0.0),
        ("bf16", "all-linear", "false", 2, 0.1),
    ],
)
def test_a_dry_run_counts_what_is_estimated(
    shared_prefix: Any, weights: Any, targets: Any, checkpointing: Any, batch: int, dropout: float
) -> None:
    """Of a 1.1B model's layers, on tensors without content; weights and optimizer apart."""
    from tinyagent_fast.training.dry_run import dry_run

    config = Config(
        model=ModelConfig(weights=weights),
        lora=LoraConfig(targets=targets, dropout=dropout),
        train=TrainConfig(shared_prefix=shared_prefix),
    )
    lengths = replace(PUBLISHED, longest_tokens=3490, shared_tokens=1865)
    estimator = replace(estimator_of(config, math.inf, "transformers", lengths), shape=COUNTED)
    counted = dry_run(estimator, batch, checkpointing)
    got = estimator.estimate(batch, checkpointing)
    assert got.activations_gib + got.logits_gib == pytest.approx(counted.peak_gib, rel=0.1)
    assert counted.padded_tokens == batch * 3490
    if shared_prefix == "off":
        assert counted.computed_tokens == counted.padded_tokens
    else:  # what stands behind the last supervised token is left out
        assert counted.computed_tokens == pytest.approx(estimator.computed_tokens(batch), abs=batch)


UNSLOTH_CASES: list[tuple[Any, Any, Any, int, float, int]] = [
    ("nf4", "all-linear", "false", 4, 0.0, 6),
    ("bf16", "all-linear", "false", 2, 0.0, 6),
    ("nf4", "all-linear", "true", 2, 0.0, 6),
    ("nf4", "all-linear", "false", 2, 0.1, 6),
    ("nf4", "attention", "false", 2, 0.0, 6),
    ("nf4", "attention", "true", 2, 0.0, 6),
    ("nf4", "all-linear", "false", 8, 0.0, 22),
]
"""Weights, targets, checkpointing, rows, dropout and layers."""


def unsloth_estimator(case: tuple[Any, Any, Any, int, float, int]) -> MemoryEstimator:
    weights, targets, _, _, dropout, layers = case
    config = Config(
        model=ModelConfig(weights=weights),
        lora=LoraConfig(targets=targets, dropout=dropout),
        train=TrainConfig(batch=8, accumulation=2),
    )
    lengths = replace(PUBLISHED, longest_tokens=3490)
    shape = replace(TINYLLAMA, layers=layers)
    return replace(estimator_of(config, math.inf, "unsloth", lengths), shape=shape)


@pytest.fixture(scope="module")
def counted_by_unsloth() -> dict[Any, Any]:
    """Give dry runs through Unsloth's own functions, by case; one process counts them all."""
    from tinyagent_fast.training.unsloth_dry_run import can_count, dry_runs_by_unsloth

    if not can_count():
        pytest.skip("unsloth or triton is not installed (make setup-unsloth)")
    cases = [(unsloth_estimator(case), case[3], case[2]) for case in UNSLOTH_CASES]
    return dict(zip(UNSLOTH_CASES, dry_runs_by_unsloth(cases), strict=True))


@pytest.mark.parametrize("case", UNSLOTH_CASES)
def test_a_dry_run_through_unsloth_s_functions_counts_what_is_estimated(
    case: Any, counted_by_unsloth: dict[Any, Any]
) -> None:
    estimator, (_, _, checkpointing, batch, _, _) = unsloth_estimator(case), case
    got = estimator.estimate(batch, checkpointing)
    counted = counted_by_unsloth[case]
    assert got.activations_gib + got.logits_gib == pytest.approx(counted.peak_gib, rel=0.1)
    assert counted.computed_tokens == pytest.approx(estimator.computed_tokens(batch), abs=batch)


def counted_flops(step: Any) -> float:
    """Count the floating-point operations of matrix products and attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten

    def product(_: Any, a: Any, b: Any, *rest: Any, **named: Any) -> float:
        return 2.0 * a[0] * a[1] * b[1]

    def pairs(query: Any, key: Any, rest: Sequence[Any]) -> float:
        """Count them times numbers a head; `rest` may have dropout and whether it is causal."""
        keys = (key[2] + 1) / 2 if True in rest else key[2]
        return float(query[1] * query[2] * query[3] * keys)

    def attention(query: Any, key: Any, _: Any, *rest: Any, **named: Any) -> float:
        return 2 * 2 * pairs(query, key, rest)

    def backward(_: Any, query: Any, key: Any, *rest: Any, **named: Any) -> float:
        return 5 * 2 * pairs(query, key, rest)

    known = {
        aten.addmm_: product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
@pytest.mark.parametrize(
    ("accumulation", "checkpointing"), [(1, "false"), (2, "false"), (1, "true")]
)
def test_the_operations_that_hours_are_predicted_from_are_those_of_a_step(
    weights: Any, accumulation: int, checkpointing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several micro-batches, of which one prefix is computed once, and with one."""
    from tinyagent_fast.shared_prefix import forward, prefix
    from tinyagent_fast.shared_prefix.attention import CPU_FLASH
    from tinyagent_fast.training.dry_run import dry_run

    for module in (forward, prefix):  # a kernel for many lengths hides them from the counter
        monkeypatch.setattr(module, "kernel_for", lambda _: CPU_FLASH)

    lengths = RowLengths(
        rows=4 * accumulation,
        mean_tokens=1200,
        longest_tokens=1200,
        supervised_tokens=88,
        shared_tokens=700,
    )
    config = Config(
        model=ModelConfig(weights=weights), train=TrainConfig(batch=4, accumulation=accumulation)
    )
    estimator = replace(estimator_of(config, math.inf, "transformers", lengths), shape=COUNTED)
    counted = counted_flops(lambda: dry_run(estimator, 4, checkpointing))
    # In 16 bits a CPU's attention goes by tiles, which reach a little beyond the diagonal.
    assert estimator.flops_per_epoch(checkpointing) == pytest.approx(counted, rel=1e-2)


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
@pytest.mark.parametrize("model_type", [kind for kind in FAMILIES if kind != "llama"])
def test_what_other_families_keep_is_predicted_too(model_type: str, weights: Any) -> None:
    from tinyagent_fast.training.dry_run import dry_run

    config = Config(model=ModelConfig(weights=weights), train=TrainConfig(shared_prefix="off"))
    lengths = replace(PUBLISHED, longest_tokens=3490)
    shape = replace(COUNTED, model_type=model_type, tied=True)
    estimator = replace(estimator_of(config, math.inf, "transformers", lengths), shape=shape)
    got = estimator.estimate(2, "false")
    counted = dry_run(estimator, 2)
    assert got.activations_gib + got.logits_gib == pytest.approx(counted.peak_gib, rel=0.1)


def test_an_embedding_that_is_the_output_layer_too_counts_once() -> None:
    raw = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262_144,
        "model_type": "gemma3_text",
    }
    shape = ModelShape.from_config(raw)  # Gemma 3 270M, whose config.json leaves the tie unsaid
    assert (shape.body_weights + shape.embedding_weights) / 1e6 == pytest.approx(268, rel=0.01)
    assert not ModelShape.from_config({**raw, "model_type": "qwen2"}).tied
    untied = ModelShape.from_config({**raw, "tie_word_embeddings": False})
    assert untied.embedding_weights == 2 * shape.embedding_weights


def test_a_dry_run_counts_the_same_as_real_tensors() -> None:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import AutoConfig, LlamaForCausalLM

    from tinyagent_fast.shared_prefix.packing import pack_step
    from tinyagent_fast.shared_prefix.step import step_gradients
    from tinyagent_fast.training.dry_run import LiveBytes, dry_run, made_rows

    shape = ModelShape(
        hidden=64,
        intermediate=160,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=128,
        tied=True,
    )
    lengths = RowLengths(
        rows=4, mean_tokens=200, longest_tokens=200, supervised_tokens=20, shared_tokens=120
    )
    config = Config(model=ModelConfig(weights="fp32"), lora=LoraConfig(rank=4))
    estimator = replace(estimator_of(config, math.inf, "transformers", lengths), shape=shape)
    model = LlamaForCausalLM(AutoConfig.for_model(**shape.to_config()))
    model = get_peft_model(model, PeftLora(r=4, target_modules=LLAMA.target_modules("all-linear")))
    step = pack_step(made_rows(8, 200, 20, 120), 4)
    with LiveBytes() as live:
        step_gradients(model.train(), step)
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert dry_run(estimator, 4).peak_gib * GIB == pytest.approx(live.peak - gradients, rel=0.01)


SIZES = st.fixed_dictionaries(
    {
        "weights": st.sampled_from(["nf4", "bf16", "fp16", "fp32"]),
        "targets": st.sampled_from(["all-linear", "attention"]),
        "dropout": st.sampled_from([0.0, 0.1]),
        "optimizer": st.sampled_from(["adamw_8bit", "adamw_torch"]),
        "backend": st.sampled_from(["unsloth", "transformers"]),
        "checkpointing": st.sampled_from(CHECKPOINTINGS),
        "shared_prefix": st.sampled_from(["off", "auto"]),
        "batch": st.integers(1, 64),
        "row_tokens": st.integers(1, 40_000),
        "rank": st.integers(1, 256),
        "usable_gib": st.one_of(st.just(math.inf), st.floats(4, 100)),
    }
)


@given(SIZES, st.sampled_from(["batch", "row_tokens", "rank"]), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_more_rows_longer_rows_and_more_rank_never_need_less(
    sizes: dict[str, Any], name: str, more: int
) -> None:
    some = predicted(**sizes)
    larger = predicted(**{**sizes, name: sizes[name] + more})
    assert larger.total_gib >= some.total_gib - 1e-9
    if sizes["usable_gib"] == math.inf:
        assert larger.total_gib > some.total_gib


@given(SIZES)
@settings(max_examples=100, deadline=None)
def test_computing_again_never_needs_more_once_there_are_several_layers(
    sizes: dict[str, Any],
) -> None:
    kept, again, moved = (
        predicted(**{**sizes, "checkpointing": c}).activations_gib for c in CHECKPOINTINGS
    )
    assert moved <= again < kept


@given(SIZES)
@settings(max_examples=100, deadline=None)
def test_unsloth_keeps_less_than_transformers_in_16_bits(sizes: dict[str, Any]) -> None:
    sizes = {**sizes, "weights": "nf4" if sizes["weights"] == "fp32" else sizes["weights"]}
    sizes["shared_prefix"] = "off"
    ours, plain = (
        predicted(**{**sizes, "backend": b}).activations_gib for b in ("unsloth", "transformers")
    )
    assert ours < plain


def test_smaller_weights_take_less_and_the_8_bit_optimizer_too() -> None:
    by_weights = [predicted(weights=w).weights_gib for w in ("nf4", "bf16", "fp32")]
    assert by_weights == sorted(by_weights)
    assert predicted(weights="fp16").weights_gib == by_weights[1]
    small, large = (
        predicted(optimizer=o).adapter_and_optimizer_gib for o in ("adamw_8bit", "adamw_torch")
    )
    assert large == pytest.approx(small * 16 / 10)


def test_a_shared_beginning_is_paid_for_once() -> None:
    """Four rows that share 1,865 tokens, as one stream, and as a padded batch."""
    changes = {"batch": 4, "checkpointing": "false"}
    computed = 1865 + 4 * (4608 - 1865)
    for backend in ("transformers", "unsloth"):
        padded = predicted(backend=backend, **changes)
        shared = predicted(backend=backend, computed_tokens=computed, **changes)
        assert shared.kept_gib <= padded.kept_gib * computed / (4 * 4608) + 1e-9
        assert shared.total_gib < padded.total_gib


def test_unsloths_loss_takes_half_of_what_is_free_and_is_no_reason_not_to_fit() -> None:
    changes = {"batch": 2, "checkpointing": "false"}
    roomy, tight = (predicted(usable_gib=gib, **changes) for gib in (100.0, 14.0))
    assert roomy.logits_gib > tight.logits_gib > 0
    assert tight.shrinkable_gib == tight.logits_gib
    assert tight.total_gib <= 14.0
    assert tight.fits(13.0, error_share=0.0)


def test_a_prediction_fits_only_with_its_error() -> None:
    got = predicted(backend="transformers")
    assert got.fits(got.total_gib * 1.151)
    assert not got.fits(got.total_gib * 1.149)
    assert got.fits(got.total_gib * 1.001, error_share=0.0)
    assert not got.fits(got.total_gib * 0.999, error_share=0.0)


RAW = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def test_a_shape_is_read_from_a_models_config() -> None:
    assert ModelShape.from_config(RAW) == TINYLLAMA
    assert ModelShape.from_config({**RAW, "head_dim": None}) == TINYLLAMA
    without = {key: value for key, value in RAW.items() if key != "num_key_value_heads"}
    got = ModelShape.from_config({**without, "head_dim": 80, "tie_word_embeddings": True})
    assert (got.kv_heads, got.head_dim, got.tied) == (32, 80, True)


@pytest.mark.parametrize("value", [None, "2048", 0, -1, 2.5, []])
def test_a_config_without_a_size_is_refused_by_name(value: object) -> None:
    with pytest.raises(ModelError, match=r"my/config\.json: hidden_size is"):
        ModelShape.from_config({**RAW, "hidden_size": value}, "my/config.json")


def estimator_of(
    config: Config,
    usable_gib: float = 21.5,
    backend: str = "unsloth",
    lengths: RowLengths = PUBLISHED,
) -> MemoryEstimator:
    return MemoryEstimator(
        config=config,
        shape=TINYLLAMA,
        lengths=lengths,
        backend=backend,
        usable_gib=usable_gib,
    )


def with_train(config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, **changes))


def test_on_an_l4_eight_mean_rows_that_share_their_beginning_compute_nothing_twice() -> None:
    config = preset_config("l4")
    estimator = estimator_of(config)
    found = estimator.recommend()
    assert found.fits
    assert (found.batch, found.accumulation, found.checkpointing) == (8, 2, "auto")
    assert (config.train.batch, config.model.gradient_checkpointing) == (8, "auto")
    mean, longest = (estimator.computed_tokens(8, tokens) for tokens in (3490, 4608))
    assert mean < estimator.kept_tokens(8) < longest


def test_what_computes_again_only_where_it_must_never_needs_more_than_is_there() -> None:
    estimator = estimator_of(preset_config("l4"))
    assert not estimator.estimate(8, "false").fits(21.5)
    got = estimator.estimate(8, "auto")
    assert got.fits(21.5)
    kept = estimator.estimate(8, "false", computed_tokens=estimator.kept_tokens(8))
    assert got.total_gib >= kept.total_gib
    assert estimator.estimate(2, "auto") == estimator.estimate(2, "false")


def test_a_card_too_small_for_two_rows_computes_again_instead() -> None:
    for backend, checkpointing in (("unsloth", "unsloth"), ("transformers", "true")):
        config = with_train(preset_config("l4"), shared_prefix="off", batch=2, accumulation=8)
        found = estimator_of(config, 8.0, backend).recommend()
        assert found.checkpointing == checkpointing
        assert found.fits


def test_a_batch_of_one_that_was_asked_for_is_enough_to_leave_checkpointing_out() -> None:
    two = with_train(preset_config("l4"), shared_prefix="off", batch=2, accumulation=8)
    one = with_train(two, batch=1, accumulation=16)
    found = estimator_of(one, 9.0).recommend()
    assert (found.checkpointing, found.batch) == ("false", 1)
    assert estimator_of(two, 9.0).recommend().checkpointing == "unsloth"


def test_where_nothing_fits_a_batch_of_one_is_named_as_not_fitting() -> None:
    found = estimator_of(preset_config("l4"), 1.5, "transformers").recommend()
    assert (found.batch, found.accumulation, found.fits) == (1, 16, False)


def test_packed_rows_are_as_long_as_the_longest_allowed() -> None:
    config = with_train(preset_config("l4"), batching="packed")
    config = replace(config, model=replace(config.model, max_length_tokens=8192))
    assert estimator_of(config).row_tokens == 8192


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from(["unsloth", "transformers"]),
    st.floats(1, 150),
    st.sampled_from(CHECKPOINTINGS),
    st.integers(10, 20_000),
    st.one_of(st.none(), st.integers(1, 50)),
)
@settings(max_examples=100, deadline=None)
def test_the_largest_batch_keeps_the_rows_of_a_step_and_no_larger_one_fits(
    batch: int,
    accumulation: int,
    backend: str,
    usable_gib: float,
    how: Any,
    longest: int,
    most: int | None,
) -> None:
    config = Config(train=TrainConfig(batch=batch, accumulation=accumulation))
    lengths = replace(PUBLISHED, longest_tokens=longest)
    estimator = estimator_of(config, usable_gib, backend, lengths)
    found = estimator.largest_batch(how, most)
    wanted = batch * accumulation
    assert found.batch * found.accumulation == wanted
    assert found.fits == found.estimate.fits(usable_gib)
    assert found.fits or found.batch == 1
    assert found.estimate == estimator.estimate(found.batch, how)
    for larger in range(found.batch + 1, min(wanted, most or wanted) + 1):
        if wanted % larger == 0:
            assert not estimator.estimate(larger, how).fits(usable_gib)


def test_a_batch_beyond_all_reason_is_looked_at_in_moments() -> None:
    started = time.process_time()
    found = estimator_of(Config(train=TrainConfig(batch=2**31 - 1)), 20.0).recommend()
    assert found.fits
    assert time.process_time() - started < 10


@given(st.integers(1, 16), st.sampled_from(["unsloth", "transformers"]), st.floats(1, 150))
@settings(max_examples=60, deadline=None)
def test_a_recommendation_fits_wherever_any_batch_does(
    batch: int, backend: str, usable_gib: float
) -> None:
    config = with_train(preset_config("l4"), batch=batch)
    estimator = estimator_of(config, usable_gib, backend)
    found = estimator.recommend()
    assert found.fits == any(estimator.estimate(1, c).fits(usable_gib) for c in CHECKPOINTINGS)


def test_an_automatic_batch_keeps_the_rows_of_a_step_of_its_preset() -> None:
    config = preset_config("a100")
    auto = with_train(config, batch="auto")
    assert preset_batch(auto) == preset_batch(config) == 16
    assert with_batch(with_train(auto, accumulation=6), 8).train.accumulation == 12
    assert preset_batch(Config(preset="mine", train=TrainConfig(batch="auto"))) == 1
    found = estimator_of(auto).recommend()
    resolved = with_batch(auto, found.batch)
    assert resolved.train.rows_per_batch == found.batch
    assert resolved.train.rows_per_batch * resolved.train.accumulation == 16
    assert replace(resolved, train=auto.train) == auto


def test_predicting_imports_no_torch() -> None:
    code = (
        "import sys; import tinyagent_fast.training.memory; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
