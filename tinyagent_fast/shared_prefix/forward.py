"""A decoder's layers over packed sequences: the one forward pass of training and of decoding.

Only the way from module to module is written here. Weights, their quantisation, adapters, norms
and rotary embedding are the model's, called through the table `LayerPieces`, so another backend is
another row. Who keeps keys and values decides what a query attends: the caller's `attend`.

Letters in names of shapes: T tokens of the sequence, W of them that are wanted, H heads, K heads of
keys and values, D numbers a head, E numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tinyagent_fast.models.families import FAMILIES
from tinyagent_fast.shared_prefix.attention import kernel_for, packed_attention
from tinyagent_fast.shared_prefix.projections import project

if TYPE_CHECKING:
    from tinyagent_fast.shared_prefix.packing import PackedSequence

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, query 1HWD, key 1KTD, value 1KTD to what each query reads, 1WHD."""

_HEAD_CHUNK_TOKENS = 1024
"""Positions whose logits are held at once: 128 MB in fp32 with 32,000 pieces."""
_CHANGED_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on how long the sequence becomes."""
_PROCESSORS = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
)
"""Settings of `generation_config` that change what greedy decoding writes."""


@dataclass(frozen=True, kw_only=True)
class LayerPieces:
    """How one backend computes the pieces of a decoder layer."""

    norm: Callable[[Any, Tensor], Tensor]
    """Norm module and states."""
    query_key_value: Callable[[Any, Tensor], Sequence[Tensor]]
    """Attention module and normed states, which have no other use."""
    projection: Callable[[Any, Tensor], Tensor]
    """A single linear module and states."""
    output: Callable[[Any, Tensor], Tensor]
    """Attention module and what its heads read."""
    mlp: Callable[[Any, Tensor], Tensor]
    """MLP module and normed states, which have no other use."""
    rotary: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Decoder, states 1TE and positions 1T to cosines and sines, 1TD each."""


def _mlp(mlp: Any, states: Tensor) -> Tensor:
    gate, up = project(states, (mlp.gate_proj, mlp.up_proj))
    return project(mlp.act_fn(gate) * up, (mlp.down_proj,))[0]


TRANSFORMERS = LayerPieces(
    norm=lambda norm, states: norm(states),
    query_key_value=lambda attention, states: project(
        states, (attention.q_proj, attention.k_proj, attention.v_proj)
    ),
    projection=lambda linear, states: project(states, (linear,))[0],
    output=lambda attention, read: project(read, (attention.o_proj,))[0],
    mlp=_mlp,
    rotary=lambda decoder, states, positions: decoder.rotary_emb(states, position_ids=positions),
)
"""transformers' modules, with peft's adapters in them."""
PIECES: Mapping[str, LayerPieces] = {"transformers": TRANSFORMERS}
"""By `LoadedModel.backend`."""


def unsupported(
    model: Any, use: Literal["training", "decoding"], backend: str = "transformers"
) -> str | None:
    """Say why a model's layers cannot be run here.

    Args:
        model: A causal language model, wrapped by peft or not.
        use: Dropout in attention matters to training only, `generate` and its settings to decoding.
        backend: What loaded it.

    Returns:
        The reason, or None if what is computed here is what the model itself computes.
    """
    if backend not in PIECES:
        return f"{backend} runs layers by kernels of its own (model.backend transformers does not)"
    own_generate = getattr(model, "max_seq_length", None) is not None or "generate" in vars(model)
    if use == "decoding" and own_generate:
        return "the model brings its own way to generate"
    if _is_peft(model):
        for adapter in map(model.peft_config.get, model.active_adapters):
            if adapter.peft_type != "LORA":
                return f"the adapter is {adapter.peft_type.value}, not LoRA"
            if getattr(adapter, "alora_invocation_tokens", None):
                return "an activated LoRA treats the tokens of a row differently"
    base = _without_adapter(model)
    reason = _other_layers(base)
    if reason is not None:
        return reason
    rope_type = base.config.rope_parameters["rope_type"]
    if rope_type in _CHANGED_BY_LENGTH:
        return f"its {rope_type} position encoding depends on the length of the whole sequence"
    devices = {parameter.device for parameter in base.parameters()}
    if len(devices) > 1:
        return f"it is spread over {len(devices)} devices"
    if use == "training" and base.config.attention_dropout:
        return f"attention_dropout is {base.config.attention_dropout}, not 0"
    asked = [name for name in _PROCESSORS if _is_asked(base.generation_config, name)]
    return f"its generation_config sets {asked[0]}" if use == "decoding" and asked else None


def _other_layers(base: Any) -> str | None:
    """Say whether the modules between embedding and head are others than the family's own."""
    kind = type(base)
    family = FAMILIES.get(getattr(getattr(base, "config", None), "model_type", ""))
    if family is None or (kind.__module__, kind.__name__) != (family.modeling, family.causal_lm):
        return f"its layers are those of {kind.__name__}, which this forward pass does not know"
    if family.whole_rows:
        return family.whole_rows
    if "sliding_attention" in (getattr(base.config, "layer_types", None) or ()):
        return "some of its layers see a sliding window of each row"
    for part in _passes(base):
        kind, forward = type(part), vars(part).get("forward")
        # trl's way to the loss goes round the head only, and the layers are called one by one here.
        replaced = forward is not None and not str(forward.__module__).startswith("trl.")
        known = kind.__module__ == kind.forward.__module__ == family.modeling
        if replaced or not known or "generate" in vars(part):
            return "another library replaced its forward pass"
    return None


def _passes(base: Any) -> Iterator[Any]:
    yield from (base, base.model)
    for layer in base.model.layers:
        yield from (layer, layer.self_attn, layer.mlp)


def _is_asked(settings: Any, name: str) -> bool:
    value = getattr(settings, name, None)
    return bool(value) and not (name in ("repetition_penalty", "guidance_scale") and value == 1)


def _is_peft(model: Any) -> bool:
    return type(model).__module__.startswith("peft.")


def _without_adapter(model: Any) -> Any:
    """Take the peft wrapper off; the adapter's layers stay where they are."""
    return model.get_base_model() if _is_peft(model) else model


class DecoderForward:
    """Runs the layers of a Llama, or of a family alike, over keys and values the caller keeps."""

    def __init__(self, model: Any, backend: str = "transformers") -> None:
        """Look into a model.

        Args:
            model: One that `unsupported` has nothing against.
            backend: What loaded it.
        """
        base = _without_adapter(model)
        self.decoder = base.model
        self.lm_head = base.lm_head
        self.layers = list(base.model.layers)
        self.device: torch.device = base.device
        self.pieces = PIECES[backend]

    def hidden_states(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        *,
        wanted_W: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Run tokens through the layers.

        Args:
            ids_T: The tokens.
            positions_T: Where each stands in its own row.
            attend: Lets the queries of a layer read keys and values.
            wanted_W: Indices of the tokens whose states are asked for, so that the last layer has
                queries for them only; None asks for all.
            checkpointing: Keep each layer's input only and compute the layer again in the backward.

        Returns:
            Normed hidden states WE, which the head takes.
        """
        hidden = self.decoder.embed_tokens(ids_T[None])
        rotary = self.pieces.rotary(self.decoder, hidden, positions_T[None])
        for at, layer in enumerate(self.layers):
            wanted = wanted_W if at == len(self.layers) - 1 else None
            run = partial(self._layer, layer, rotary, partial(attend, at), wanted)
            hidden = checkpoint(run, hidden, use_reentrant=False) if checkpointing else run(hidden)
        return self.pieces.norm(self.decoder.norm, hidden)[0]

    def _layer(
        self,
        layer: Any,
        rotary: tuple[Tensor, Tensor],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        wanted_W: Tensor | None,
        hidden: Tensor,
    ) -> Tensor:
        pieces, attention = self.pieces, layer.self_attn
        of_queries = rotary
        normed = pieces.norm(layer.input_layernorm, hidden)
        if wanted_W is None:
            query, key, value = pieces.query_key_value(attention, normed)
        else:
            key = pieces.projection(attention.k_proj, normed)
            value = pieces.projection(attention.v_proj, normed)
            cos, sin, hidden, normed = (
                x.index_select(1, wanted_W) for x in (*rotary, hidden, normed)
            )
            of_queries = (cos, sin)
            query = pieces.projection(attention.q_proj, normed)
        query, key, value = (_by_heads(x, attention.head_dim) for x in (query, key, value))
        if hasattr(attention, "q_norm"):
            query, key = pieces.norm(attention.q_norm, query), pieces.norm(attention.k_norm, key)
        query, key = _rotated(query, *of_queries), _rotated(key, *rotary)
        # Autocast does this for torch's own attention.
        device = value.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else value.dtype
        read = attend(query.to(dtype), key.to(dtype), value.to(dtype))
        hidden = hidden + pieces.output(attention, read.flatten(2))
        return hidden + pieces.mlp(layer.mlp, pieces.norm(layer.post_attention_layernorm, hidden))


def shared_prefix_loss(
    model: Any,
    packed: PackedSequence,
    num_items: float | Tensor | None = None,
    *,
    checkpointing: bool = False,
    backend: str = "transformers",
) -> Tensor:
    """Compute the loss of a micro-batch, equal to that of its padded full rows.

    Dropout within LoRA layers is drawn once for the tokens that rows share. Nothing is computed
    that the loss does not need: behind the last layer's keys and values only the positions that
    predict a supervised token go on.

    Args:
        model: One that `unsupported` has nothing against for training.
        packed: The micro-batch, on the model's device.
        num_items: What the sum of the token losses is divided by: the supervised tokens of the
            optimizer step; by default those of the micro-batch.
        checkpointing: Keep each layer's input only and compute the layer again in the backward.
        backend: What loaded the model.

    Returns:
        A scalar, in fp32 or better.
    """
    forward = DecoderForward(model, backend)
    last = len(forward.layers) - 1

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks = packed.last_blocks if layer == last else packed.blocks
        return packed_attention(query, key, value, blocks, kernel=kernel_for(query))

    hidden = forward.hidden_states(
        packed.input_ids,
        packed.position_ids,
        attend,
        wanted_W=packed.last_positions,
        checkpointing=checkpointing,
    )
    if len(packed.target_positions) != len(hidden):
        hidden = hidden.index_select(0, packed.target_positions)
    total = _summed_losses(forward.lm_head, hidden, packed.target_ids)
    return total / (packed.supervised_tokens if num_items is None else num_items)


def _by_heads(x: Tensor, head_dim: int) -> Tensor:
    """View a projection 1TE as 1HTD."""
    return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding as transformers does, so that nothing is rounded differently."""
    first, second = x.chunk(2, -1)
    rotated = torch.cat((-second, first), -1)
    return (x * cos.unsqueeze(1)) + (rotated * sin.unsqueeze(1))


def _summed_losses(lm_head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropies; of many positions the logits are not kept but computed again."""
    size = _HEAD_CHUNK_TOKENS
    if len(targets) <= size:
        return _losses(lm_head, hidden, targets)
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    sums = [checkpoint(_losses, lm_head, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum()


def _losses(lm_head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = lm_head(hidden)
    logits = logits.float() if logits.element_size() < 4 else logits
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
