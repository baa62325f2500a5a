"""Memory and work of a training step, predicted from shapes: before a GPU is rented or filled.

`plan` prints the predictions, `sizing` chooses batches by them, and the checks before step 1 hold
what was measured against them. All of it is arithmetic on a `ModelShape`; no torch.

The predictions are estimates, good to 15-20 % and not measured on a GPU. What transformers and
peft keep for the backward pass was counted on a CPU in bf16 autocast (transformers 5.17, peft 0.21,
torch 2.13), and tests count it again. What Unsloth keeps is read from its kernels (2026.10), and
its backward pass is fitted to the context lengths that Unsloth published for an 8B model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tinyagent_fast.config import Checkpointing, LoraConfig, ModelConfig
from tinyagent_fast.errors import ModelError

GIB = 2**30
ERROR_SHARE = 0.15
"""A batch counts as fitting only if it does with this much more than predicted."""
RESERVE_GIB = 0.66
"""What the CUDA context takes of a card. Source: torch sees 22.16 GiB of an L4, 21.5 are usable."""

# 4 bits, an 8-bit scale for 64 weights and a 32-bit one for 256 scales.
# Source: QLoRA, arXiv 2305.14314, double quantisation.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# bf16 logits, their fp32 copy, its log-softmax and the gradients. Source: counted on TRL's chunked
# loss, and `_CE_BYTES_PER_LOGIT` in unsloth_zoo/fused_losses/cross_entropy_loss.py.
_BYTES_PER_LOGIT = 16
# Rows of logits at a time. Source: `_CHUNKED_LM_HEAD_CHUNK_SIZE` in trl/trainer/sft_trainer.py.
_CHUNK_TOKENS = 256
# Unsloth's loss takes half of the free memory, but no more than this. Source: `_CE_TARGET_GB_CAP`.
_FUSED_LOSS_GIB = 4.0
_WORKSPACE_BYTES = 32 * 2**20  # of cuBLAS. Source: torch's notes on CUBLAS_WORKSPACE_CONFIG


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama that decide memory and work."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def from_config(cls, raw: Mapping[str, object], source: str = "config.json") -> ModelShape:
        """Read the sizes from a model's config.

        Args:
            raw: What its config.json holds.
            source: Named in messages.

        Returns:
            The shape.

        Raises:
            ModelError: A size is missing or no positive whole number.
        """

        def size(name: str, default: int | None = None) -> int:
            value = raw.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or value < 1:
                raise ModelError(
                    f"{source}: {name} is {value!r}",
                    "memory is predicted from the sizes of a Llama-like model",
                    "name a base model whose config.json has it",
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            hidden=hidden,
            intermediate=size("intermediate_size"),
            layers=size("num_hidden_layers"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", max(1, hidden // heads)),
            vocab=size("vocab_size"),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )

    @property
    def query_width(self) -> int:
        """Features of all query heads of a token."""
        return self.heads * self.head_dim

    def linears(self, *, attention_only: bool = False) -> list[tuple[int, int]]:
        """List in and out features of a layer's linear modules.

        Args:
            attention_only: Leave the three of the MLP out.

        Returns:
            q, k, v, o and, unless left out, gate, up, down.
        """
        h, q, kv, i = (
            self.hidden,
            self.query_width,
            self.kv_heads * self.head_dim,
            self.intermediate,
        )
        attention = [(h, q), (h, kv), (h, kv), (q, h)]
        return attention if attention_only else [*attention, (h, i), (h, i), (i, h)]

    @property
    def body_weights(self) -> int:
        """Weights of all layers' linear modules."""
        return self.layers * sum(a * b for a, b in self.linears())

    @property
    def embedding_weights(self) -> int:
        """Weights of embedding and output layer, counted once where they are one."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def adapter_weights(self, lora: LoraConfig) -> int:
        """Count the adapter's parameters.

        Args:
            lora: Rank and targets.

        Returns:
            Trainable parameters.
        """
        linears = self.linears(attention_only=lora.targets == "attention")
        return self.layers * lora.rank * sum(a + b for a, b in linears)


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """Peak memory of a micro-batch by what it is for; an estimate."""

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
        """Say whether the micro-batch fits.

        Args:
            usable_gib: Memory there is.
            error_share: How much more than predicted may be needed.

        Returns:
            Whether it does.
        """
        return (self.total_gib - self.shrinkable_gib) * (1 + error_share) <= usable_gib


def predict_memory(
    shape: ModelShape,
    model: ModelConfig,
    lora: LoraConfig,
    *,
    optimizer: str,
    backend: str,
    batch: int,
    row_tokens: int,
    supervised_tokens: int,
    checkpointing: Checkpointing,
    computed_tokens: int | None = None,
    usable_gib: float | None = None,
) -> MemoryPrediction:
    """Predict the peak memory that torch reserves for a micro-batch; qat's extra is not counted.

    Args:
        shape: The base model.
        model: Says how its weights are held.
        lora: The adapter.
        optimizer: `adamw_8bit` or `adamw_torch`.
        backend: `unsloth` or `transformers`; only Unsloth has `unsloth` checkpointing.
        batch: Rows together.
        row_tokens: Tokens of each row with its padding.
        supervised_tokens: Tokens with loss in the whole micro-batch.
        checkpointing: What is computed again instead of kept.
        computed_tokens: Tokens computed where shared prefixes are computed once, without mask.
        usable_gib: Memory there is; Unsloth's loss takes at most half of what is free.

    Returns:
        The prediction.
    """
    unsloth = backend == "unsloth"
    tokens = batch * row_tokens if computed_tokens is None else computed_tokens
    padded = not unsloth and computed_tokens is None and batch > 1  # Unsloth drops the mask
    held = 4 if model.weights == "fp32" else 2
    # prepare_model_for_kbit_training turns all that is not in 4 bits into fp32. Source: peft.
    wide = 4 if model.weights == "fp32" or (model.weights == "nf4" and not unsloth) else 2
    weights_gib, adapter_gib = _static_gib(shape, model, lora, optimizer, wide)
    per_layer = (
        _unsloth_layer(shape, lora, held) if unsloth else _plain_layer(shape, lora, held, padded)
    )
    kept, backward = _kept_and_backward(shape, per_layer, held, wide, unsloth, checkpointing)
    loss_gib = _loss_gib(shape, unsloth, tokens, supervised_tokens, wide, computed_tokens is None)
    if unsloth and usable_gib is not None:
        free_gib = usable_gib - weights_gib - adapter_gib - tokens * kept / GIB
        loss_gib = min(loss_gib, max(0.0, free_gib / 2))
    logits_gib = max(0.0, loss_gib - tokens * backward / GIB)
    dequantised = 2 * max(a * b for a, b in shape.linears()) if model.weights == "nf4" else 0
    mask = 3 * batch * row_tokens**2 if padded else 0  # a truth value and a 16-bit bias for each
    return MemoryPrediction(
        weights_gib=weights_gib,
        adapter_and_optimizer_gib=adapter_gib,
        activations_gib=tokens * (kept + backward) / GIB,
        kept_gib=tokens * kept / GIB,
        logits_gib=logits_gib,
        overhead_gib=(_WORKSPACE_BYTES + dequantised + mask) / GIB,
        shrinkable_gib=logits_gib if unsloth else 0.0,
    )


def _static_gib(
    shape: ModelShape, model: ModelConfig, lora: LoraConfig, optimizer: str, wide: int
) -> tuple[float, float]:
    """Memory of the base's weights, and of the adapter with its optimizer."""
    body = _NF4_BYTES if model.weights == "nf4" else 4 if model.weights == "fp32" else 2
    weights = shape.body_weights * body + shape.embedding_weights * wide
    # fp32 weight and gradient, and AdamW's two moments in 8 or 32 bits.
    adapter = shape.adapter_weights(lora) * (8 + (2 if optimizer == "adamw_8bit" else 8))
    return weights / GIB, adapter / GIB


def _kept_and_backward(
    shape: ModelShape, per_layer: int, held: int, wide: int, unsloth: bool, checkpointing: str
) -> tuple[int, int]:
    """Bytes of a token that are kept through the step, and those that a backward layer adds."""
    h, i = shape.hidden, shape.intermediate
    if unsloth:
        # The final norm's input; what a backward layer adds is fitted to an 8B model's 212 KB
        # a token. Source: unsloth.ai/docs/basics/unsloth-benchmarks.
        rest, backward = held * h, held * (2 * i + 4 * h)
    else:
        # Counted: the hidden states that TRL sorts; an MLP's gradients, with peft's fp32 copies.
        rest, backward = 2 * wide * h, (6 if held == 2 else 4) * i + 4 * h
    if checkpointing == "false":
        return rest + shape.layers * per_layer, backward
    if unsloth and checkpointing == "unsloth":
        # The last layer's input stays, and one buffer brings the others back.
        return rest + 2 * held * h, per_layer + backward
    return rest + shape.layers * (held if unsloth else wide) * h, per_layer + backward


def _plain_layer(shape: ModelShape, lora: LoraConfig, held: int, expanded: bool) -> int:
    """Bytes of a token that autograd keeps of a layer of transformers with peft and SDPA."""
    linears = shape.linears(attention_only=lora.targets == "attention")
    inputs = sum(a for a, _ in linears)
    heads = shape.heads if expanded else shape.kv_heads  # a mask rules grouped heads out
    norms = 2 * 4 * shape.hidden  # in fp32
    attention = held * (2 * shape.query_width + 2 * heads * shape.head_dim) + 4 * shape.heads
    mlp = held * 3 * shape.intermediate
    if held == 2 or lora.dropout:
        adapter = held * inputs  # every module casts, or drops, its own copy
    else:
        mlp_inputs = shape.hidden + shape.intermediate if lora.targets == "all-linear" else 0
        adapter = held * (shape.hidden + mlp_inputs)
    adapter += held * lora.rank * len(linears) + (inputs if lora.dropout else 0)
    return norms + attention + mlp + adapter


def _unsloth_layer(shape: ModelShape, lora: LoraConfig, held: int) -> int:
    """Bytes of a token that Unsloth's kernels keep of a layer; xformers gets k and v of all heads.

    Source: save_for_backward in unsloth/kernels (fast_lora, rms_layernorm).
    """
    hidden = 4 * shape.hidden  # inputs of both norms, of q, k, v and of the MLP
    attention = 4 * shape.query_width  # q, k, v and the output
    kept = held * (hidden + attention + 2 * shape.intermediate) + 4 * shape.heads
    if lora.dropout:
        kept += sum(a for a, _ in shape.linears(attention_only=lora.targets == "attention"))
    return kept


def _loss_gib(
    shape: ModelShape, unsloth: bool, tokens: int, supervised: int, wide: int, by_trl: bool
) -> float:
    """Memory of the loss: Unsloth's runs over every token, the others in chunks of a fixed size."""
    if unsloth:
        return min(tokens * shape.vocab * _BYTES_PER_LOGIT / GIB, _FUSED_LOSS_GIB)
    rows = min(_CHUNK_TOKENS, tokens if by_trl else supervised)
    copied_head = 2 * shape.hidden if wide == 4 else 0  # autocast's copy of an fp32 output layer
    return shape.vocab * (rows * _BYTES_PER_LOGIT + copied_head) / GIB


def step_flops(
    shape: ModelShape,
    lora: LoraConfig,
    *,
    tokens: float,
    row_tokens: float,
    head_tokens: float,
    checkpointing: Checkpointing,
) -> float:
    """Count the work of forward and backward passes.

    The base is frozen: its backward pass makes gradients of activations only.

    Args:
        shape: The base model.
        lora: The adapter.
        tokens: Tokens computed.
        row_tokens: Mean length of a row, on which causal attention depends.
        head_tokens: Tokens of which logits are made: all with Unsloth, else the supervised ones.
        checkpointing: Whether every layer's forward pass is made twice.

    Returns:
        Floating-point operations.
    """
    forwards = 1 if checkpointing == "false" else 2
    body = 2 * shape.body_weights * (forwards + 1)
    adapter = 2 * shape.adapter_weights(lora) * (forwards + 2)
    # Half of T^2 for scores and for values; the backward pass makes five such products of two.
    attention = 2 * shape.layers * row_tokens * shape.query_width * (forwards + 2.5)
    head = 4 * shape.vocab * shape.hidden
    return tokens * (body + adapter + attention) + head_tokens * head


def hours_per_epoch(flops: float, tflops: float) -> float:
    """Turn the work of an epoch into time.

    Args:
        flops: Work, from `step_flops` with all tokens of an epoch.
        tflops: TFLOP/s that the card sustains.

    Returns:
        Hours.
    """
    return flops / (tflops * 1e12 * 3600)
