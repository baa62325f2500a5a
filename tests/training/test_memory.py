"""Predicted memory and work: as published, as autograd keeps it, and never less for more."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.config import Config, LoraConfig, ModelConfig, TrainConfig
from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.families import FAMILIES, LLAMA, ModelShape
from tinyagent_fast.presets import preset_config
from tinyagent_fast.training.memory import (
    GIB,
    MemoryEstimate,
    MemoryEstimator,
    RowLengths,
    preset_batch,
    with_batch,
)

TINYLLAMA = ModelShape(
    hidden=2048,
    intermediate=5632,
    layers=22,
    heads=32,
    kv_heads=4,
    head_dim=64,
    vocab=32000,
    tied=False,
)
LLAMA_8B = ModelShape(
    hidden=4096,
    intermediate=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    tied=False,
)
PUBLISHED = RowLengths(rows=39_030, mean_tokens=3490, longest_tokens=4608, supervised_tokens=88)
CHECKPOINTINGS = ("false", "true", "unsloth")
FULL_LOGITS = 18
"""Bytes of a logit where all are made at once, in the figures of plain transformers."""


def predicted(shape: ModelShape = TINYLLAMA, **changes: Any) -> MemoryEstimate:
    """Estimate for a micro-batch of one published row, with changes."""
    row_tokens = changes.pop("row_tokens", 4608)
    checkpointing = changes.pop("checkpointing", "unsloth")
    batch, computed = changes.pop("batch", 1), changes.pop("computed_tokens", None)
    others = {key: changes.pop(key) for key in ("usable_gib",) if key in changes}
    backend = changes.pop("backend", "unsloth")
    config = Config(
        model=ModelConfig(weights=changes.pop("weights", "nf4")),
        train=TrainConfig(optimizer=changes.pop("optimizer", "adamw_8bit")),
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
    flops = estimator_of(Config(lora=LoraConfig(rank=16)), lengths=lengths).flops_per_epoch(
        checkpointing
    )
    assert flops / row_tokens / 1e9 == pytest.approx(giga_per_token, rel=0.03)


@pytest.mark.parametrize(("checkpointing", "hours"), [("false", 10.6), ("true", 15.1)])
def test_three_epochs_on_an_l4_take_at_least_the_published_hours(
    checkpointing: Any, hours: float
) -> None:
    flops = 3 * estimator_of(Config(lora=LoraConfig(rank=16))).flops_per_epoch(checkpointing)
    assert flops / (57e12 * 3600) == pytest.approx(hours, rel=0.02)


COUNTED = ModelShape(
    hidden=256,
    intermediate=704,
    layers=4,
    heads=4,
    kv_heads=1,
    head_dim=64,
    vocab=640,
    tied=False,
)


@pytest.mark.parametrize(
    ("weights", "targets", "checkpointing", "batch"),
    [
        ("bf16", "all-linear", "false", 1),
        ("nf4", "all-linear", "false", 1),
        ("nf4", "attention", "false", 1),
        ("bf16", "all-linear", "false", 2),
        ("fp32", "all-linear", "false", 1),
        ("bf16", "all-linear", "true", 1),
        ("nf4", "all-linear", "true", 1),
        ("nf4", "all-linear", "true", 2),
        ("fp32", "all-linear", "true", 1),
    ],
)
def test_transformers_keep_what_is_predicted(
    weights: str, targets: str, checkpointing: str, batch: int
) -> None:
    """Counts what is alive in forward and backward; 4-bit weights keep as much as 16-bit ones."""
    tokens, supervised = 512, 20
    counted = _counted_bytes(weights, targets, checkpointing, batch, tokens, supervised)
    got = predicted(
        COUNTED,
        weights=weights,
        targets=targets,
        checkpointing=checkpointing,
        batch=batch,
        row_tokens=tokens,
        backend="transformers",
    )
    assert (got.activations_gib + got.logits_gib) * GIB == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
@pytest.mark.parametrize("model_type", [kind for kind in FAMILIES if kind != "llama"])
def test_what_other_families_keep_is_predicted_too(model_type: str, weights: str) -> None:
    shape = replace(COUNTED, model_type=model_type, tied=True)
    counted = _counted_bytes(weights, "all-linear", "false", 1, 512, 20, shape)
    got = predicted(
        shape, weights=weights, checkpointing="false", row_tokens=512, backend="transformers"
    )
    assert (got.activations_gib + got.logits_gib) * GIB == pytest.approx(counted, rel=0.1)


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


def _counted_bytes(
    weights: str,
    targets: Any,
    checkpointing: str,
    batch: int,
    tokens: int,
    supervised: int,
    shape: ModelShape = COUNTED,
) -> int:
    """Train once on a CPU and count the bytes of all tensors that live at the same time."""
    import torch
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.sft_trainer import _chunked_cross_entropy_loss

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            shape.model_type,
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
    )
    model = model.to(torch.float32 if weights == "fp32" else torch.bfloat16)
    if weights == "nf4":
        for name, parameter in model.named_parameters():
            if not name.endswith("_proj.weight"):
                parameter.data = parameter.data.float()
    if checkpointing == "true":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    adapter = PeftLora(r=16, lora_dropout=0.0, target_modules=LLAMA.target_modules(targets))
    model = get_peft_model(model, adapter).train()
    base = model.get_base_model()
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    labels = torch.full((batch, tokens), -100)
    labels[0, -supervised:] = 1
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1:, -1] = 0
    cast = torch.autocast("cpu", torch.bfloat16) if weights != "fp32" else contextlib.nullcontext()
    with _live_bytes() as live:
        with cast:
            hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            loss = _chunked_cross_entropy_loss(hidden, base.lm_head.weight, 256, labels=labels)[0]
        del hidden
        loss.backward()
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return int(live.peak) - gradients


def _live_bytes() -> Any:
    """Make a mode that counts the bytes of tensors made within it that are still alive."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class LiveBytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live = self.peak = 0
            self.known: Any = weakref.WeakSet()

        def __torch_dispatch__(
            self, function: Any, _: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            before = {
                id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
            }
            out = function(*args, **(kwargs or {}))
            for tensor in tree_iter(out):
                if isinstance(tensor, Tensor):
                    self.note(tensor.untyped_storage(), before)
            return out

        def note(self, storage: Any, before: set[int]) -> None:
            if storage in self.known or id(storage) in before:
                return  # a view of something else
            self.known.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage.nbytes())

        def forget(self, size: int) -> None:
            self.live -= size

    return LiveBytes()


SIZES = st.fixed_dictionaries(
    {
        "weights": st.sampled_from(["nf4", "bf16", "fp16", "fp32"]),
        "targets": st.sampled_from(["all-linear", "attention"]),
        "dropout": st.sampled_from([0.0, 0.1]),
        "optimizer": st.sampled_from(["adamw_8bit", "adamw_torch"]),
        "backend": st.sampled_from(["unsloth", "transformers"]),
        "checkpointing": st.sampled_from(CHECKPOINTINGS),
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


def test_an_l4_needs_no_checkpointing_for_two_of_the_longest_rows() -> None:
    found = estimator_of(preset_config("l4")).recommend()
    assert found.checkpointing == "false"
    assert (found.batch, found.accumulation) == (2, 8)
    assert found.fits


def test_a_card_too_small_for_two_rows_computes_again_instead() -> None:
    for backend, checkpointing in (("unsloth", "unsloth"), ("transformers", "true")):
        found = estimator_of(preset_config("l4"), 8.0, backend).recommend()
        assert found.checkpointing == checkpointing
        assert found.fits


def test_a_batch_of_one_that_was_asked_for_is_enough_to_leave_checkpointing_out() -> None:
    one = with_train(preset_config("l4"), batch=1, accumulation=16)
    found = estimator_of(one, 9.0).recommend()
    assert (found.checkpointing, found.batch) == ("false", 1)
    assert estimator_of(preset_config("l4"), 9.0).recommend().checkpointing == "unsloth"


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
    assert preset_batch(auto) == preset_batch(config) == 4
    assert with_batch(with_train(auto, accumulation=6), 8).train.accumulation == 3
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
