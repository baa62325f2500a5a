"""Memory and hours of a training run, estimated from shapes: before a GPU is rented or filled.

The command `memory` prints the estimates, `--train.batch auto` is resolved by them, and `doctor`
and the checks before step 1 compare them with what there is. It needs no torch, but can ask it for
the memory of the GPU at hand.

The estimates are good to 15-20 % and not measured on a GPU. What is kept for the backward pass was
counted on a CPU in bf16 autocast (transformers 5.17, peft 0.21, torch 2.13), of Unsloth by its own
functions (2026.10) where prefixes are shared, and tests count it again. Without sharing it is read
from them, and fitted to the context lengths that Unsloth published for an 8B model.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import BASE_MODEL, Checkpointing, Config, LoraConfig
from tinyagent_fast.display import Stage, unseen
from tinyagent_fast.errors import ModelError, plainly
from tinyagent_fast.models.families import ModelShape, nearest_family
from tinyagent_fast.models.published import PUBLISHED, TINYLLAMA_32K
from tinyagent_fast.presets import PRESETS, REAL_TRAIN

if TYPE_CHECKING:
    from tinyagent_fast.training.inputs import RunExamples

GIB = 2**30
ERROR_SHARE = 0.15
"""A batch counts as fitting only if it does with this much more than estimated."""
RESERVE_GIB = 0.66
"""What the CUDA context takes of a card. Source: torch sees 22.16 GiB of an L4, 21.5 are usable."""

LIBRARIES_GIB = 0.6
"""What torch, transformers and trl take on a CPU; measured with `--preset smoke`."""

# 4 bits, an 8-bit scale for 64 weights and a 32-bit one for 256 scales.
# Source: QLoRA, arXiv 2305.14314, double quantisation.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# bf16 logits, their fp32 copy, its log-softmax and the gradients. Source: counted on TRL's chunked
# loss, and `_CE_BYTES_PER_LOGIT` in unsloth_zoo/fused_losses/cross_entropy_loss.py.
_BYTES_PER_LOGIT = 16
# Rows of logits at a time. Source: `_CHUNKED_LM_HEAD_CHUNK_SIZE` in trl/trainer/sft_trainer.py.
CHUNK_TOKENS = 256
# Rows of logits at a time where prefixes are shared, as in `shared_prefix.forward`.
_HEAD_TOKENS = 1024
# Unsloth's loss takes half of the free memory, but no more than this. Source: `_CE_TARGET_GB_CAP`.
_FUSED_LOSS_GIB = 4.0
_WORKSPACE_BYTES = 32 * 2**20  # of cuBLAS. Source: torch's notes on CUBLAS_WORKSPACE_CONFIG


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """Lengths of the training rows."""

    rows: int
    mean_tokens: float
    longest_tokens: int
    supervised_tokens: float
    """Mean tokens with loss of a row."""
    shared_tokens: float = 0.0
    """Tokens that stand once in a step instead of once a row, where prefixes are shared."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Sequence[int]]], config: Config) -> RowLengths:
        """Measure rows with input_ids and labels, which share as in the steps of a config."""
        from tinyagent_fast.prompts.tokens import IGNORED
        from tinyagent_fast.shared_prefix.packing import mean_shared_tokens

        tokens = [len(row["input_ids"]) for row in rows]
        return cls(
            rows=len(rows),
            mean_tokens=statistics.fmean(tokens),
            longest_tokens=max(tokens),
            supervised_tokens=sum(i != IGNORED for row in rows for i in row["labels"]) / len(rows),
            shared_tokens=mean_shared_tokens(rows, rows_that_share(config)),
        )


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of a micro-batch by what it is for."""

    weights_gib: float
    adapter_and_optimizer_gib: float
    activations_gib: float
    """Kept for the backward pass, and the most that one layer's backward pass adds."""
    kept_gib: float
    """The part of activations_gib that is there when the loss is computed."""
    logits_gib: float
    """What the loss needs beyond what the backward pass needs later anyway."""
    overhead_gib: float
    """Attention mask, one dequantised weight and workspace."""
    shrinkable_gib: float = 0.0
    """How much of logits_gib is given up where memory is short (Unsloth cuts its chunks to it)."""

    @property
    def total_gib(self) -> float:
        """All of it."""
        static_gib = self.weights_gib + self.adapter_and_optimizer_gib + self.overhead_gib
        return static_gib + self.activations_gib + self.logits_gib

    def fits(self, usable_gib: float, *, error_share: float = ERROR_SHARE) -> bool:
        """Say whether the micro-batch fits, also when this much more than estimated is needed."""
        return (self.total_gib - self.shrinkable_gib) * (1 + error_share) <= usable_gib


@dataclass(frozen=True, kw_only=True)
class BatchChoice:
    """A batch for a card, with the accumulation that keeps the rows of an optimizer step."""

    batch: int
    accumulation: int
    checkpointing: Checkpointing
    estimate: MemoryEstimate
    fits: bool


@dataclass(frozen=True, kw_only=True)
class MemoryEstimator:
    """Estimates memory and work of a run from its config, model and rows."""

    config: Config
    shape: ModelShape
    lengths: RowLengths
    backend: str
    """`unsloth` or `transformers`, with `auto` resolved."""
    usable_gib: float = math.inf
    """Memory of the card without what is reserved."""

    @property
    def passes(self) -> float:
        """Epochs that the config's steps make."""
        packed = self.config.train.batching == "packed"
        filled = self.lengths.mean_tokens / self.row_tokens if packed else 1
        train = replace(self.config.train, batch=preset_batch(self.config))
        return train.passes(math.ceil(self.lengths.rows * filled))

    @property
    def checkpointings(self) -> tuple[Checkpointing, ...]:
        """What the backend can compute again, from nothing to what saves most memory."""
        return ("false", "true", "unsloth") if self.backend == "unsloth" else ("false", "true")

    @property
    def shares_prefixes(self) -> bool:
        """Whether what rows share is computed once."""
        train, family = self.config.train, nearest_family(self.shape.model_type)
        wanted = train.shared_prefix != "off" and train.batching != "packed"
        return wanted and not family.whole_rows

    def keeps_one_prefix(self, checkpointing: Checkpointing) -> bool:
        """Whether the micro-batches of a step share one prefix, as on all but large cards.

        There each has its own, which takes a little less memory.
        """
        kept = checkpointing in ("false", "auto")
        return self.shares_prefixes and kept and self.config.train.accumulation > 1

    @property
    def _joins_projections(self) -> bool:
        """Whether `shared_prefix.projections` computes the linear layers, not the modules."""
        return self.config.model.weights != "nf4" and not self.config.lora.dropout

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row of a micro-batch, packed rows being filled up."""
        packed = self.config.train.batching == "packed"
        return self.config.model.max_length_tokens if packed else self.lengths.longest_tokens

    def estimate(
        self,
        batch: int | None = None,
        checkpointing: Checkpointing | None = None,
        *,
        computed_tokens: int | None = None,
    ) -> MemoryEstimate:
        """Estimate the peak that torch reserves for a micro-batch of the longest rows.

        What quantisation-aware training keeps besides is not counted.

        Args:
            batch: Its rows; None takes the config's, which must be a number by now.
            checkpointing: What is computed again; None takes the config's.
            computed_tokens: Tokens of the micro-batch's packed sequence, where prefixes are shared;
                None takes those of the longest rows.
        """
        shape, model, train = self.shape, self.config.model, self.config.train
        batch = train.rows_per_batch if batch is None else batch
        checkpointing = checkpointing or model.gradient_checkpointing
        tokens = computed_tokens or self.computed_tokens(batch)
        if checkpointing == "auto":
            return self._estimate_cut_to_fit(batch, tokens)
        unsloth, shared = self.backend == "unsloth", self.shares_prefixes
        # Unsloth drops the mask, and a packed sequence has none of this size.
        masked = not unsloth and not shared and batch > 1
        token = self._token_bytes(masked=masked)
        kept, backward = token.kept_and_backward(shape.layers, checkpointing)
        prefix_gib = 0.0
        if self.keeps_one_prefix(checkpointing):
            # Its keys and values again before those of a micro-batch, and their gradients' sums.
            pair = 2 * shape.layers * shape.kv_width * (self._held_bytes + 4)
            prefix_gib = min(self.lengths.shared_tokens, tokens) * pair / GIB
        weight = {"nf4": _NF4_BYTES, "fp32": 4}.get(model.weights, 2)
        weights_gib = (
            shape.body_weights * weight + shape.embedding_weights * self._wide_bytes
        ) / GIB
        # fp32 weight and gradient, and AdamW's two moments in 8 or 32 bits.
        moments = 2 if train.optimizer == "adamw_8bit" else 8
        adapter_gib = adapter_weights(shape, self.config.lora) * (8 + moments) / GIB
        loss_gib = self._loss_gib(batch, tokens)
        if self._loses_at_every_token:
            free_gib = self.usable_gib - weights_gib - adapter_gib - tokens * kept / GIB
            loss_gib = min(loss_gib, max(0.0, free_gib / 2))
        logits_gib = max(0.0, loss_gib - tokens * backward / GIB)
        largest = max(inputs * outputs for inputs, outputs in shape.linears())
        dequantised = 2 * largest if model.weights == "nf4" else 0
        # A truth value and a 16-bit bias for each pair of tokens.
        mask = 3 * batch * self.row_tokens**2 if masked else 0
        return MemoryEstimate(
            weights_gib=weights_gib,
            adapter_and_optimizer_gib=adapter_gib,
            activations_gib=tokens * (kept + backward) / GIB + prefix_gib,
            kept_gib=tokens * kept / GIB + prefix_gib,
            logits_gib=logits_gib,
            overhead_gib=(_WORKSPACE_BYTES + dequantised + mask) / GIB,
            shrinkable_gib=logits_gib if self._loses_at_every_token else 0.0,
        )

    @property
    def _held_bytes(self) -> int:
        """Bytes of an activation."""
        return 4 if self.config.model.weights == "fp32" else 2

    @property
    def _wide_bytes(self) -> int:
        """Bytes of what is in no 4 bits: peft's prepare_model_for_kbit_training makes it fp32."""
        weights = self.config.model.weights
        return 4 if weights == "fp32" or (weights == "nf4" and self.backend != "unsloth") else 2

    @property
    def _loses_at_every_token(self) -> bool:
        """Whether the loss runs over every token, as Unsloth's own does."""
        return self.backend == "unsloth" and not self.shares_prefixes

    def _token_bytes(self, *, masked: bool) -> _TokenBytes:
        """Count what the backend keeps of a token, with or without an attention mask."""
        shape, lora, held, wide = self.shape, self.config.lora, self._held_bytes, self._wide_bytes
        if self.backend == "unsloth":
            return _unsloth_token(shape, lora, held, self.shares_prefixes)
        if not self.shares_prefixes:
            return _plain_token(shape, lora, held, wide, masked)
        if self._joins_projections:
            token = _shared_token(shape, lora, held, wide)
        else:
            token = _plain_token(shape, lora, held, wide, masked)
        # The last layer needs keys and values of all, and little else.
        needed = 3 * (4 + held) * shape.hidden + 2 * held * shape.kv_width
        return replace(token, last_layer=min(token.layer, needed))

    def _loss_gib(self, batch: int, tokens: int) -> float:
        """Estimate what the loss of a micro-batch takes where memory is not short."""
        shape = self.shape
        if self._loses_at_every_token:
            return min(tokens * shape.vocab * _BYTES_PER_LOGIT / GIB, _FUSED_LOSS_GIB)
        supervised = round(batch * self.lengths.supervised_tokens)
        rows = min(_HEAD_TOKENS, supervised) if self.shares_prefixes else min(CHUNK_TOKENS, tokens)
        # Autocast's copy of an fp32 head.
        copied_head = 2 * shape.hidden if self._wide_bytes == 4 else 0
        return shape.vocab * (rows * _BYTES_PER_LOGIT + copied_head) / GIB

    def _estimate_cut_to_fit(self, batch: int, tokens: int) -> MemoryEstimate:
        """Estimate a micro-batch that is cut to fill the memory as far as it is safe."""
        whole = self.estimate(batch, "false", computed_tokens=tokens)
        if whole.fits(self.usable_gib):
            return whole
        most, one = self.kept_tokens(batch), self.computed_tokens(1)
        filled = self.estimate(batch, "false", computed_tokens=max(1, most))
        if most >= one:
            return filled
        # A longer row alone computes its layers again.
        again = self.estimate(1, self.checkpointings[-1], computed_tokens=one)
        return max(again, filled, key=lambda estimate: estimate.total_gib)

    def computed_tokens(self, batch: int, row_tokens: float | None = None) -> int:
        """Count the tokens that a micro-batch computes, by default one of the longest rows."""
        row_tokens = self.row_tokens if row_tokens is None else row_tokens
        shared = min(self.lengths.shared_tokens, row_tokens) if self.shares_prefixes else 0.0
        return round(shared + batch * (row_tokens - shared))

    def kept_tokens(self, batch: int) -> int:
        """Find the most tokens of a micro-batch whose activations fit without computing again.

        Returns:
            Their number, at most those of the longest rows; 0 if there are none.
        """

        def are_too_many(tokens: int) -> bool:
            estimate = self.estimate(batch, "false", computed_tokens=tokens)
            return not estimate.fits(self.usable_gib)

        return bisect_left(range(1, self.computed_tokens(batch) + 1), True, key=are_too_many)

    def largest_batch(self, checkpointing: Checkpointing, most: int | None = None) -> BatchChoice:
        """Find the largest batch, of `most` rows, that fits and divides those of an optimizer step.

        With `auto`, a micro-batch of mean rows must fit without computing again.

        Returns:
            The batch, or a batch of one with `fits` false.
        """
        wanted = preset_batch(self.config) * self.config.train.accumulation

        def is_good(batch: int, estimate: MemoryEstimate) -> bool:
            if not estimate.fits(self.usable_gib):
                return False
            mean_tokens = self.computed_tokens(batch, self.lengths.mean_tokens)
            return checkpointing != "auto" or mean_tokens <= self.kept_tokens(batch)

        small = [rows for rows in range(1, math.isqrt(wanted) + 1) if wanted % rows == 0]
        divisors = sorted({*small, *(wanted // rows for rows in small)}, reverse=True)
        for batch in (rows for rows in divisors if rows <= (most or wanted)):
            estimate = self.estimate(batch, checkpointing)
            if is_good(batch, estimate):
                break
        return BatchChoice(
            batch=batch,
            accumulation=wanted // batch,
            checkpointing=checkpointing,
            estimate=estimate,
            fits=estimate.fits(self.usable_gib),
        )

    def recommend(self) -> BatchChoice:
        """Choose batch, accumulation and checkpointing, with the rows of an optimizer step kept.

        Nothing is computed twice where the batch that was asked for, or two of the longest rows,
        fit without it.

        Returns:
            The largest batch that fits, or a batch of one with `fits` false.
        """
        found = self.largest_batch("auto" if self.shares_prefixes else "false")
        if found.checkpointing == "auto" and self.computed_tokens(found.batch) <= self.kept_tokens(
            found.batch
        ):
            found = replace(found, checkpointing="false")
        if found.fits and found.batch >= min(preset_batch(self.config), 2):
            return found
        return self.largest_batch(self.checkpointings[-1])

    def flops_per_epoch(self, checkpointing: Checkpointing) -> float:
        """Count the floating-point operations of an epoch's forward and backward passes.

        The base is frozen: its backward pass makes gradients of activations only.
        """
        shape, rows, lora = self.shape, self.lengths, self.config.lora
        batch, accumulation = preset_batch(self.config), self.config.train.accumulation
        if checkpointing == "auto":
            fits = self.computed_tokens(1, rows.mean_tokens) <= self.kept_tokens(batch)
            checkpointing = "false" if fits else "true"
        forwards = 1 if checkpointing == "false" else 2
        shares, step_rows = self.shares_prefixes, batch * accumulation
        shared = min(rows.shared_tokens, rows.mean_tokens) if shares else 0.0
        own = rows.mean_tokens - shared
        prefixes = 1 if self.keeps_one_prefix(checkpointing) else accumulation
        tokens = prefixes * shared + step_rows * own
        supervised = step_rows * rows.supervised_tokens

        def multiplied(weights: float, adapter: float) -> float:
            """Count a token's multiplications; a frozen weight has no gradient of its own."""
            return weights * (forwards + 1) + adapter * (forwards + 2)

        layer = multiplied(
            shape.body_weights / shape.layers, adapter_weights(shape, lora) / shape.layers
        )
        keys_and_values = multiplied(
            2 * shape.hidden * shape.kv_width, 2 * lora.rank * (shape.hidden + shape.kv_width)
        )
        # The last layer has queries at supervised tokens only.
        whole = shape.layers - 1 if shares else shape.layers
        in_all = whole * tokens * layer
        if shares:
            in_all += tokens * keys_and_values + supervised * (layer - keys_and_values)
        if forwards == 1 and self.backend != "unsloth":  # nothing below the first layer learns
            in_all -= tokens * shape.hidden * (shape.query_width + 2 * shape.kv_width)
        # Pairs of tokens that attend, a row's own half square apart for each segment.
        pairs = whole * (prefixes * shared**2 / 2 + step_rows * (own * shared + own**2 / 2))
        if shares:
            pairs += supervised * rows.mean_tokens
        # Scores and values of a pair; the backward pass makes five such products of two.
        in_all += 2 * shape.query_width * pairs * (forwards + 2.5)
        # Unsloth's own loss makes logits of all tokens, the others of the supervised ones.
        logits = supervised if shares or self.backend != "unsloth" else tokens
        in_all += 2 * logits * shape.vocab * shape.hidden
        return rows.rows / step_rows * 2 * in_all


@dataclass(frozen=True, kw_only=True)
class _TokenBytes:
    """What a backend keeps of a token for the backward pass, in bytes."""

    outside: int
    """Before and after the layers."""
    layer: int
    """Of a layer whose activations are kept."""
    layer_input: int
    """Of a layer that is computed again."""
    backward: int
    """What the backward pass of one layer adds."""
    last_layer: int | None = None
    """Of the last one, where only supervised tokens go through it; None if it is as the others."""
    offloaded: int = 0
    """Of all layers where their inputs are moved to host memory: the last one, and a buffer."""

    def kept_and_backward(self, layers: int, checkpointing: Checkpointing) -> tuple[int, int]:
        """Give the bytes that are kept through the step, and those that a backward layer adds."""
        if checkpointing == "false":
            last = self.layer if self.last_layer is None else self.last_layer
            return self.outside + (layers - 1) * self.layer + last, self.backward
        # A last layer that takes less is done, and its input gone, when the one before takes most.
        inputs = (layers - (self.last_layer is not None)) * self.layer_input
        if checkpointing == "unsloth" and self.offloaded:
            inputs = self.offloaded
        return self.outside + inputs, self.layer + self.backward


def _plain_token(
    shape: ModelShape, lora: LoraConfig, held: int, wide: int, masked: bool
) -> _TokenBytes:
    """Count what autograd keeps of transformers with peft and SDPA."""
    linears = shape.linears(lora.targets)
    inputs = sum(features for features, _ in linears)
    kv_heads = shape.heads if masked else shape.kv_heads  # a mask rules grouped heads out
    norms = 4 * shape.normed_features  # in fp32
    attention = held * (2 * shape.query_width + 2 * kv_heads * shape.head_dim) + 4 * shape.heads
    mlp = held * 3 * shape.intermediate
    if held == 2 or lora.dropout:
        adapter = held * inputs  # every module casts, or drops, its own copy
    else:
        mlp_inputs = shape.hidden + shape.intermediate if lora.targets == "all-linear" else 0
        adapter = held * (shape.hidden + mlp_inputs)
    adapter += held * lora.rank * len(linears) + (inputs if lora.dropout else 0)
    return _TokenBytes(
        outside=2 * wide * shape.hidden,  # counted: the hidden states that TRL sorts
        layer=norms + attention + mlp + adapter,
        layer_input=wide * shape.hidden,
        # Counted: an MLP's gradients, with peft's fp32 copies.
        backward=(6 if held == 2 else 4) * shape.intermediate + 4 * shape.hidden,
    )


def _shared_token(shape: ModelShape, lora: LoraConfig, held: int, wide: int) -> _TokenBytes:
    """Count what autograd keeps where projections of one input are computed together."""
    adapts_mlp = lora.targets == "all-linear"
    # What goes into the norms, in fp32, and what comes out, where an adapter needs it.
    norms = 4 * shape.normed_features + (2 if adapts_mlp else 1) * held * shape.hidden
    attention = held * (2 * shape.query_width + 2 * shape.kv_width) + 4 * shape.heads
    mlp = held * (4 if adapts_mlp else 3) * shape.intermediate
    return _TokenBytes(
        outside=2 * wide * shape.hidden,
        layer=norms + attention + mlp + held * lora.rank * len(shape.linears(lora.targets)),
        layer_input=wide * shape.hidden,
        backward=4 * shape.hidden,
    )


def _unsloth_token(shape: ModelShape, lora: LoraConfig, held: int, shared: bool) -> _TokenBytes:
    """Count what Unsloth's kernels keep; xformers gets k and v of all heads, packed sequences not.

    Source: save_for_backward in unsloth/kernels (fast_lora, rms_layernorm), and a dry run of them.
    The backward pass of its own forward is fitted to an 8B model's 212 KB a token,
    unsloth.ai/docs/basics/unsloth-benchmarks.
    """
    fused_mlp = lora.targets == "all-linear"  # one without adapters is transformers' own
    # Inputs of both norms, of q, k, v and of a fused MLP, which keeps no activated gate.
    hidden, mlp = (4, 2) if fused_mlp else (3, 3)
    # q, k, v and the output
    attention = 2 * shape.query_width + 2 * (shape.kv_width if shared else shape.query_width)
    layer = held * (hidden * shape.hidden + attention + mlp * shape.intermediate) + 4 * shape.heads
    if lora.dropout:
        layer += sum(features for features, _ in shape.linears(lora.targets))
    token = _TokenBytes(
        outside=held * shape.hidden,  # the final norm's input
        layer=layer,
        layer_input=held * shape.hidden,
        backward=held * (2 * shape.intermediate + 4 * shape.hidden),
        offloaded=2 * held * shape.hidden,
    )
    if not shared:
        return token
    # The gradients of SwiGLU's product, and of what goes into the MLP and comes out.
    backward = held * ((1 if fused_mlp else 2) * shape.intermediate + 2 * shape.hidden)
    # The inputs of its norm and of k and v, these, and what dropout drew for both.
    last_layer = held * (2 * shape.hidden + 2 * shape.kv_width)
    if lora.dropout:
        last_layer += 2 * shape.hidden
    return replace(token, outside=0, backward=backward, last_layer=last_layer)


def adapter_weights(shape: ModelShape, lora: LoraConfig) -> int:
    """Count the adapter's parameters."""
    return shape.layers * lora.rank * sum(sum(sizes) for sizes in shape.linears(lora.targets))


def preset_batch(config: Config) -> int:
    """Give the rows of a config's micro-batch, with `auto` those of its preset."""
    if config.train.batch != "auto":
        return config.train.batch
    preset = PRESETS[config.preset]() if config.preset in PRESETS else Config()
    return preset.train.rows_per_batch


def rows_that_share(config: Config) -> int:
    """Give the rows of a config's step, or of a micro-batch where its layers are computed again."""
    again = config.model.gradient_checkpointing in ("true", "unsloth")
    return preset_batch(config) * (1 if again else config.train.accumulation)


def with_batch(config: Config, batch: int) -> Config:
    """Put a batch into a config, which maybe has `auto`, and keep the rows of an optimizer step."""
    rows = preset_batch(config) * config.train.accumulation
    train = replace(config.train, batch=batch, accumulation=rows // batch)
    return replace(config, train=train)


def usable_gib() -> float:
    """Measure the memory that a run may use, on the GPU at hand or without one in the machine.

    Returns:
        What is free or held by this process, less what the context or libraries take.
    """
    import torch

    if not torch.cuda.is_available():
        import psutil

        held = psutil.Process().memory_info().rss
        return float(psutil.virtual_memory().available + held) / GIB - LIBRARIES_GIB
    free, total = torch.cuda.mem_get_info()
    return min((free + torch.cuda.memory_reserved()) / GIB, total / GIB - RESERVE_GIB)


def base_shape(base: str) -> ModelShape:
    """Find a base model's sizes without loading it or asking a network.

    Args:
        base: A folder, a .gguf file, `nano`, `random`, a published base's short name, or the
            default base's name.

    Raises:
        ModelError: It is none of these.
    """
    if base == BASE_MODEL:
        return TINYLLAMA_32K
    if base in ("nano", "random"):
        from tinyagent_fast.models.nano import NANO_SHAPE, RANDOM_SHAPE

        return NANO_SHAPE if base == "nano" else RANDOM_SHAPE
    if base in PUBLISHED:
        return PUBLISHED[base].shape
    if base.endswith(".gguf"):
        from tinyagent_fast.models.gguf_base import gguf_shape

        return gguf_shape(Path(base))
    path = Path(base) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model {base!r}",
            f"its sizes are not known: {path}: {plainly(error)}",
            f"put its config.json into a folder and name that with --model.base; known by name are "
            f"{', '.join((BASE_MODEL, *PUBLISHED))}, nano and random",
        ) from error
    return ModelShape.from_config(raw if isinstance(raw, dict) else {}, str(path))


_PUBLISHED = RowLengths(
    rows=39_030,
    mean_tokens=3490,
    longest_tokens=4608,
    supervised_tokens=88,
    shared_tokens=1865,
)
"""Plans of the published training file. Source: counts of its public re-training
(github.com/SamvelMinasyan/TinyAgent), mean and supervised tokens partly inferred; the beginning
that prompts share was counted on prompts of its own builder, up to their date."""
_SAMPLE_ROWS = 256
_LONGEST_ROWS = 64


def longest_rows(config: Config) -> RowLengths:
    """Take a row as long as a config allows, without a look at its data."""
    return _rows_of(config, 1, config.model.max_length_tokens, config.model.max_length_tokens)


def _rows_of(config: Config, rows: int, mean: int, longest: int) -> RowLengths:
    published = config.data.train == REAL_TRAIN
    return RowLengths(
        rows=rows,
        mean_tokens=mean,
        longest_tokens=longest,
        supervised_tokens=mean * _PUBLISHED.supervised_tokens / _PUBLISHED.mean_tokens,
        shared_tokens=min(_PUBLISHED.shared_tokens, mean) if published else 0.0,
    )


def row_lengths(
    config: Config, given: tuple[int, int] | None, stage: Stage = unseen
) -> tuple[RowLengths, str]:
    """Find the lengths of a config's rows: as given (mean, longest), counted, or as published.

    Args:
        config: The config, whose prompts count as training rewrites them.
        given: Mean and longest; None to find them.
        stage: Reading, generating and training a retriever are some.

    Returns:
        The lengths, and where they come from.

    Raises:
        DataError: A data file is faulty, or missing and not the published one.
    """
    data, allowed = config.data, config.model.max_length_tokens
    if given is None and data.train is not None and _can_count(data.train, config.model.base):
        counted = _counted(config, _read_examples(config, stage))
        return counted, f"a sample and the longest texts of {data.train}"
    rows, rewritten = _count_rows(config, stage), data.prompts != "as-is"
    if given is not None:
        (mean, longest), source = given, "as given"
    elif data.train == REAL_TRAIN:
        longest = min(_PUBLISHED.longest_tokens, allowed)
        mean = min(int(_PUBLISHED.mean_tokens), longest)
        source = "as published for plans" + ", before their prompts are rewritten" * rewritten
        source += "; --lengths MEAN,LONGEST gives others"
    else:
        mean = longest = allowed
        source = "the longest allowed, not counted; --lengths MEAN,LONGEST gives others"
    return _rows_of(config, rows, mean, longest), source


def _count_rows(config: Config, stage: Stage) -> int:
    """Count the rows of an epoch; their prompts may be any."""
    data = config.data
    absent = data.train == REAL_TRAIN and not REAL_TRAIN.exists()
    if not absent and (data.train is not None or data.points != "plan"):
        as_is = replace(config, data=replace(data, prompts="as-is"))
        return _rows_in(_read_examples(as_is, stage))
    rows = _PUBLISHED.rows if absent else data.generated_entries - data.validation_entries
    rows = max(1, min(rows, data.limit_entries or rows))
    return rows * data.own_passes + data.generated_entries * data.with_generated


def _read_examples(config: Config, stage: Stage) -> RunExamples:
    from tinyagent_fast.training.inputs import load_run_examples

    test = config.data.test
    if test is not None and not test.exists():  # it has no say in how long rows are
        config = replace(config, data=replace(config.data, test=None))
    return load_run_examples(config, stage)


def _rows_in(examples: RunExamples) -> int:
    return int(examples.summary["examples"]["train"])


def _can_count(train: Path, base: str) -> bool:
    """Say whether tokens can be counted here, without asking a network."""
    tokenizer = any((Path(base) / f"tokenizer.{ext}").exists() for ext in ("json", "model"))
    return train.exists() and tokenizer and find_spec("transformers") is not None


def _counted(config: Config, run: RunExamples) -> RowLengths:
    """Count tokens of a seeded sample, and of the rows with the longest texts."""
    from tinyagent_fast.prompts.loading import load_tokenizer
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    tokenizer = PromptTokenizer(load_tokenizer(Path(config.model.base)), config.model.prompt_format)

    def encode(indices: Iterable[int]) -> list[dict[str, list[int]]]:
        examples = (run.train[index] for index in indices)
        rows = tokenizer.training_rows(examples)
        return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]

    sizes = [len(e.system or "") + len(e.user) + len(e.output) for e in run.train]
    longest = encode(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:_LONGEST_ROWS])
    rng = random.Random(config.data.seed)
    sample = encode(rng.sample(range(len(sizes)), min(len(sizes), _SAMPLE_ROWS)))
    tokens = max(len(row["input_ids"]) for row in (*sample, *longest))
    return replace(
        RowLengths.of(sample, config),
        rows=_rows_in(run),
        longest_tokens=min(tokens, config.model.max_length_tokens),
    )
