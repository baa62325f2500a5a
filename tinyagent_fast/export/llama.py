"""What a plain Llama is: its sizes, its rotation of positions and its tensors, in both namings.

Conversion follows this description and nothing else, so a model that is another architecture, or
has one feature more, is refused here and not written as a file that answers wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.checkpoints import Checkpoint

OUTPUT = "lm_head.weight"
"""Name of the output matrix in transformers; a model with tied embeddings has none."""

# What a feature is in a plain Llama; a config that says otherwise is refused.
_PLAIN: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The sizes that names, shapes and keys follow from."""

    vocabulary: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    context_tokens: int
    norm_epsilon: float
    tied: bool


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions are rotated."""

    base: float
    linear_factor: float | None = None
    frequency_divisors: tuple[float, ...] | None = None
    """One for each pair of a head, where low frequencies are scaled as in Llama 3."""


@dataclass(frozen=True, kw_only=True)
class LlamaTensor:
    """One tensor in both namings; `head_rows` is set where llama.cpp orders a head's rows anew."""

    name: str
    source: str
    shape: tuple[int, ...]
    head_rows: int | None = None


def refused(checkpoint: Checkpoint, what: str, why: str) -> ModelError:
    """Build the error for a model that cannot be converted.

    Args:
        checkpoint: The model.
        what: What was found in it.
        why: Why that cannot be converted.

    Returns:
        The error, to be raised.
    """
    return ModelError(
        f"model in {checkpoint.folder}: {what}",
        why,
        "export a model of the plain Llama architecture, with its adapter merged",
    )


def read_shape(checkpoint: Checkpoint) -> LlamaShape:
    """Read the sizes from config.json.

    Args:
        checkpoint: A model folder.

    Returns:
        The sizes.

    Raises:
        ModelError: Another architecture, a feature that a plain Llama has not, or a size missing.
    """
    config = checkpoint.config
    kind = config.get("model_type")
    if kind != "llama":
        raise refused(checkpoint, f"model_type {kind!r}", "only llama can be converted")
    for key, plain in _PLAIN.items():
        if config.get(key) not in (plain, None):
            raise refused(checkpoint, f"{key} {config[key]!r}", f"only {plain!r} can be converted")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return LlamaShape(
            vocabulary=int(config["vocab_size"]),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head=int(config.get("head_dim") or hidden // heads),
            context_tokens=int(config["max_position_embeddings"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise refused(checkpoint, "config.json", f"it has no {error}") from error


def read_rope(checkpoint: Checkpoint, head: int) -> Rope:
    """Read how positions are rotated, in the spellings of transformers 4 and 5.

    Args:
        checkpoint: A model folder.
        head: Values of one attention head.

    Returns:
        Base and scaling; a scaling lost here would give a model that errs only on long prompts.

    Raises:
        ModelError: A scaling that is not known here.
    """
    config = checkpoint.config
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    known = kind in ("default", "linear", "llama3")
    if not known or given.get("partial_rotary_factor", 1.0) != 1.0:
        why = "only default, linear and llama3 can be converted"
        raise refused(checkpoint, f"RoPE {dict(given)}", why)
    try:
        if kind == "linear":
            return Rope(base=base, linear_factor=float(given["factor"]))
        if kind == "llama3":
            return Rope(base=base, frequency_divisors=_llama_3_divisors(base, head, given))
    except KeyError as error:
        raise refused(checkpoint, f"RoPE {dict(given)}", f"it has no {error}") from error
    return Rope(base=base)


def _llama_3_divisors(base: float, head: int, given: Mapping[str, Any]) -> tuple[float, ...]:
    """Compute by what each frequency is divided: 1 for short waves, `factor` for long ones.

    Source: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    factor = float(given["factor"])
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    context = float(given["original_max_position_embeddings"])
    divisors = []
    for at in range(0, head, 2):
        wavelength = 2 * math.pi * base ** (at / head)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def llama_tensors(shape: LlamaShape) -> Iterator[LlamaTensor]:
    """List the tensors of a model, in the order in which they are written.

    Args:
        shape: Its sizes.

    Yields:
        Each tensor in both namings, with its shape.

    Source: llama.cpp, gguf-py/gguf/tensor_mapping.py and conversion/llama.py.
    """
    hidden, ffn = shape.hidden, shape.intermediate
    query, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    rows = (shape.vocabulary, hidden)
    yield LlamaTensor(name="token_embd.weight", source="model.embed_tokens.weight", shape=rows)
    parts: tuple[tuple[str, str, tuple[int, ...], int | None], ...] = (
        ("attn_norm", "input_layernorm", (hidden,), None),
        ("attn_q", "self_attn.q_proj", (query, hidden), shape.head),
        ("attn_k", "self_attn.k_proj", (kv, hidden), shape.head),
        ("attn_v", "self_attn.v_proj", (kv, hidden), None),
        ("attn_output", "self_attn.o_proj", (hidden, query), None),
        ("ffn_norm", "post_attention_layernorm", (hidden,), None),
        ("ffn_gate", "mlp.gate_proj", (ffn, hidden), None),
        ("ffn_up", "mlp.up_proj", (ffn, hidden), None),
        ("ffn_down", "mlp.down_proj", (hidden, ffn), None),
    )
    for layer in range(shape.layers):
        for name, source, size, head_rows in parts:
            yield LlamaTensor(
                name=f"blk.{layer}.{name}.weight",
                source=f"model.layers.{layer}.{source}.weight",
                shape=size,
                head_rows=head_rows,
            )
    yield LlamaTensor(name="output_norm.weight", source="model.norm.weight", shape=(hidden,))
    if not shape.tied:
        yield LlamaTensor(name="output.weight", source=OUTPUT, shape=rows)
