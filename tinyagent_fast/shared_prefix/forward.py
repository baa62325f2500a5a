"""The loss of a packed stream, by the model's own modules: what LoRA training calls instead of it.

Only the way from module to module is written here. Weights, their quantisation, adapters, norms
and rotary embedding are the model's, called as modules, so whatever they do stays as it is.
Nothing is computed that the loss does not need: behind the last layer's keys and values only the
positions that predict a supervised token go on.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinyagent_fast.shared_prefix.attention import kernel_for, stream_attention
from tinyagent_fast.shared_prefix.projections import project

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinyagent_fast.shared_prefix.layout import Block, PackedStream

_HEAD_CHUNK_TOKENS = 1024
"""Positions whose logits are held at once: 128 MB in fp32 with 32,000 pieces."""


def supported(model: Any) -> str | None:
    """Say why a model cannot be trained on packed streams.

    Args:
        model: A transformers model, in a PEFT wrapper or not.

    Returns:
        The reason, or none if it can.
    """
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    if isinstance(model, PeftModel):
        for adapter in model.active_adapters:
            reason = _adapter_reason(model.peft_config[adapter])
            if reason:
                return reason
    base = _causal_lm(model)
    if type(base) is not LlamaForCausalLM:
        return f"the model is a {type(base).__name__}, not a LlamaForCausalLM"
    if base.config.attention_dropout:
        return f"attention_dropout is {base.config.attention_dropout}, not 0"
    rope = base.model.rotary_emb.rope_type
    if rope in ("dynamic", "longrope"):
        return f"rope_type {rope} depends on the longest row of a batch"
    devices = set((getattr(base, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        return f"the model is spread over {len(devices)} devices"
    return None


def _adapter_reason(adapter: Any) -> str | None:
    if adapter.peft_type != "LORA":
        return f"the adapter is {getattr(adapter.peft_type, 'value', adapter.peft_type)}, not LoRA"
    if getattr(adapter, "alora_invocation_tokens", None):
        return "an activated LoRA treats the tokens of a row differently"
    return None


def _causal_lm(model: Any) -> Any:
    """Take the PEFT wrapper off; the adapter's layers stay where they are."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def shared_prefix_loss(
    model: Any,
    stream: PackedStream,
    num_items: float | Tensor | None = None,
    *,
    checkpointing: bool = False,
) -> Tensor:
    """Compute the loss of a micro-batch, equal to that of its padded full rows.

    Dropout within LoRA layers is drawn once for the tokens that rows share.

    Args:
        model: One that `supported` has nothing against.
        stream: The micro-batch, on the model's device.
        num_items: What the sum of the token losses is divided by: the supervised tokens of the
            optimizer step; by default those of the stream.
        checkpointing: Keep each layer's input only and compute the layer again in the backward.

    Returns:
        A scalar, in fp32 or better.
    """
    base = _causal_lm(model)
    decoder = base.model
    hidden = decoder.embed_tokens(stream.input_ids[None])
    rotary = decoder.rotary_emb(hidden, position_ids=stream.position_ids[None])
    run: Any = partial(checkpoint, _layer, use_reentrant=False) if checkpointing else _layer
    *most, last = decoder.layers
    for layer in most:
        hidden = run(layer, hidden, rotary, stream.blocks, None)
    hidden = run(last, hidden, rotary, stream.last_blocks, stream.last_positions)
    if len(stream.target_positions) != hidden.shape[1]:
        hidden = hidden.index_select(1, stream.target_positions)
    total = _summed_losses(base.lm_head, decoder.norm(hidden)[0], stream.target_ids)
    return total / (stream.supervised_tokens if num_items is None else num_items)


def _layer(
    layer: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    blocks: Sequence[Block],
    positions: Tensor | None,
) -> Tensor:
    """Run one decoder layer; with positions, only what these need."""
    attention, mlp = layer.self_attn, layer.mlp
    of_queries = of_keys = rotary
    normed = layer.input_layernorm(hidden)
    if positions is None:
        together = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = project(normed, together)
    else:
        key, value = project(normed, (attention.k_proj, attention.v_proj))
        cos, sin, hidden, normed = (x.index_select(1, positions) for x in (*rotary, hidden, normed))
        of_queries = (cos, sin)
        (query,) = project(normed, (attention.q_proj,))
    query, key, value = (_by_heads(x, attention.head_dim) for x in (query, key, value))
    query, key = _rotated(query, *of_queries), _rotated(key, *of_keys)
    query, key, value = _as_autocast_has_it(query, key, value)
    out = stream_attention(query, key, value, blocks, kernel=kernel_for(query))
    hidden = hidden + project(out.flatten(2), (attention.o_proj,))[0]
    gate, up = project(layer.post_attention_layernorm(hidden), (mlp.gate_proj, mlp.up_proj))
    after: Tensor = hidden + project(mlp.act_fn(gate) * up, (mlp.down_proj,))[0]
    return after


def _by_heads(x: Tensor, head_dim: int) -> Tensor:
    """View a projection as 1 x heads x tokens x head_dim."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding as transformers does, so that nothing is rounded differently."""
    from transformers.models.llama.modeling_llama import rotate_half

    rotated: Tensor = (x * cos.unsqueeze(1)) + (rotate_half(x) * sin.unsqueeze(1))
    return rotated


def _as_autocast_has_it(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast what goes into attention, as autocast does for torch's own attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)


def _summed_losses(lm_head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropies; of many positions the logits are not kept but computed again."""
    if len(targets) <= _HEAD_CHUNK_TOKENS:
        return _losses(lm_head, hidden, targets)
    chunks = [
        slice(start, start + _HEAD_CHUNK_TOKENS)
        for start in range(0, len(targets), _HEAD_CHUNK_TOKENS)
    ]
    sums = [
        checkpoint(_losses, lm_head, hidden[at], targets[at], use_reentrant=False) for at in chunks
    ]
    return torch.stack(sums).sum()


def _losses(lm_head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = lm_head(hidden)
    logits = logits.float() if logits.element_size() < 4 else logits
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
