"""A decoder's layers over packed sequences: the one forward pass of training and of decoding.

Only the way from module to module is written here. Weights, their quantisation, adapters, norms
and rotary embedding are the model's, called through the table `PIECES`, which has a row for
transformers' layers and one for Unsloth's fused kernels. Who keeps keys and values decides what a
query attends: the caller's `attend`.

Letters in names of shapes: T tokens of the sequence, W of them that are wanted, H heads, K heads of
keys and values, D numbers a head, E numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinyagent_fast.models.families import FAMILIES, LLAMA
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
    """How one kind of layers computes its pieces.

    States that go into `query_key_value` and `mlp` have no other use: Unsloth writes their gradient
    over them, which is also why each may be asked for its gradient once only.
    """

    embedding: Callable[[Any, Tensor], Tensor]
    """Decoder and tokens 1T to states 1TE in the type that the layers compute in."""
    norm: Callable[[Any, Tensor], Tensor]
    """Norm module and states."""
    query_key_value: Callable[[Any, Tensor], Sequence[Tensor]]
    """Attention module and normed states."""
    projection: Callable[[Any, Any, Tensor], Tensor]
    """Attention module, its query, key or value module, and normed states."""
    output: Callable[[Any, Tensor], Tensor]
    """Attention module and what its heads read."""
    mlp: Callable[[Any, Tensor], Tensor]
    """MLP module and normed states."""
    rotary: Callable[[Any, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    """Decoder, states 1TE, positions 1T and what they end before to cosines and sines, 1TD each."""
    rotated: Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
    """Queries 1HTD and keys 1KTD of the same tokens, with their cosines and sines."""


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding as transformers does, so that nothing is rounded differently."""
    first, second = x.chunk(2, -1)
    rotated = torch.cat((-second, first), -1)
    return (x * cos.unsqueeze(1)) + (rotated * sin.unsqueeze(1))


def _mlp(mlp: Any, states: Tensor) -> Tensor:
    gate, up = project(states, (mlp.gate_proj, mlp.up_proj))
    return project(mlp.act_fn(gate) * up, (mlp.down_proj,))[0]


TRANSFORMERS = LayerPieces(
    embedding=lambda decoder, ids: decoder.embed_tokens(ids),
    norm=lambda norm, states: norm(states),
    query_key_value=lambda attention, states: project(
        states, (attention.q_proj, attention.k_proj, attention.v_proj)
    ),
    projection=lambda _attention, linear, states: project(states, (linear,))[0],
    output=lambda attention, read: project(read, (attention.o_proj,))[0],
    mlp=_mlp,
    rotary=lambda decoder, states, positions, _: decoder.rotary_emb(states, position_ids=positions),
    rotated=lambda query, key, rotary: (_rotated(query, *rotary), _rotated(key, *rotary)),
)
"""transformers' modules, with peft's adapters in them."""


def _unsloth_embedding(decoder: Any, ids: Tensor) -> Tensor:
    # The kernels add adapters in place, which needs states of the weights' type, not autocast's.
    states: Tensor = decoder.embed_tokens(ids).to(decoder.config.dtype)
    # Their backward, and checkpointing that enters autograd again, need an input with a gradient.
    return states.requires_grad_() if torch.is_grad_enabled() else states


def _unsloth_norm(norm: Any, states: Tensor) -> Tensor:
    from unsloth.kernels import fast_rms_layernorm

    normed: Tensor = fast_rms_layernorm(norm, states)
    return normed


def _unsloth_projection(attention: Any, linear: Any, states: Tensor) -> Tensor:
    from unsloth.kernels.fast_lora import apply_lora_o, apply_lora_qkv

    if attention.apply_qkv is not apply_lora_qkv:
        return project(states, (linear,))[0]
    # The kernel for the output projection serves any single one: it knows it by its name only.
    projected: Tensor = apply_lora_o(SimpleNamespace(o_proj=linear), states)
    return projected


def _unsloth_rotary(
    decoder: Any, states: Tensor, positions: Tensor, end: int
) -> tuple[Tensor, Tensor]:
    if not hasattr(decoder.rotary_emb, "get_cached"):  # it has left transformers' own there
        return TRANSFORMERS.rotary(decoder, states, positions, end)
    decoder.rotary_emb.extend_rope_embedding(states, end)
    tables = decoder.rotary_emb.get_cached(end, states.device.index or 0)
    cos, sin = (table.to(states)[positions] for table in tables)
    return cos, sin


def _unsloth_rotated(
    query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    from unsloth.kernels import fast_rope_embedding

    both: tuple[Tensor, Tensor] = fast_rope_embedding(query, key, *rotary)
    return both


UNSLOTH = LayerPieces(
    embedding=_unsloth_embedding,
    norm=_unsloth_norm,
    query_key_value=lambda attention, states: attention.apply_qkv(attention, states),
    projection=_unsloth_projection,
    output=lambda attention, read: attention.apply_o(attention, read),
    mlp=lambda mlp, states: mlp(states),
    rotary=_unsloth_rotary,
    rotated=_unsloth_rotated,
)
"""Unsloth's kernels where it put them into the model, else the modules themselves."""
PIECES: Mapping[str, LayerPieces] = {"transformers": TRANSFORMERS, "unsloth": UNSLOTH}
"""By who made the layers what they are."""


def layers_by(model: Any) -> Literal["transformers", "unsloth"]:
    """Tell whose layers a model has, the key of its row in `PIECES`.

    Unsloth without a GPU leaves transformers' layers as they are.
    """
    layers = getattr(getattr(_without_adapter(model), "model", None), "layers", None)
    attention = getattr(layers[0], "self_attn", None) if layers else None
    return "unsloth" if hasattr(attention, "apply_qkv") else "transformers"


def unsupported(model: Any, use: Literal["training", "decoding"]) -> str | None:
    """Say why a model's layers cannot be run here.

    Args:
        model: A causal language model, wrapped by peft or not.
        use: Dropout in attention matters to training only, `generate` and its settings to decoding.

    Returns:
        The reason, or None if what is computed here is what the model itself computes.
    """
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
    by_unsloth = ("unsloth.",) if layers_by(base) == "unsloth" else ()
    if by_unsloth and family is not LLAMA:
        return f"Unsloth's kernels were not tried here with {family.name}"
    for part in _passes(base):
        kind, own = type(part), vars(part)
        # The layers are called one by one here, so another way round the head changes nothing.
        ways_round = ("trl.", "unsloth_zoo.cpu.", *by_unsloth)
        known = kind.forward.__module__.startswith((family.modeling, *by_unsloth))
        if (
            kind.__module__ != family.modeling
            or not known
            or not _is_of(own, "forward", ways_round)
        ):
            return "another library replaced its forward pass"
        if not _is_of(own, "generate", ("unsloth",)):
            return "another library replaced its way to generate"
    return None


def _is_of(own: Mapping[str, Any], name: str, modules: tuple[str, ...]) -> bool:
    """Say whether an object that has a function of its own has it from one of these modules."""
    # `__module__` is that of the function replaced, if it was replaced with manners.
    code = getattr(own.get(name), "__globals__", {"__name__": ""})
    return name not in own or code["__name__"].startswith(modules)


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

    def __init__(self, model: Any) -> None:
        """Look into a model, one that `unsupported` has nothing against."""
        base = _without_adapter(model)
        self.decoder = base.model
        self.lm_head = base.lm_head
        self.layers = list(base.model.layers)
        self.device: torch.device = base.device
        self.pieces = PIECES[layers_by(base)]

    def hidden_states(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        *,
        positions_end: int,
        wanted_W: Tensor | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Run tokens through the layers.

        Args:
            ids_T: The tokens.
            positions_T: Where each stands in its own row.
            attend: Lets the queries of a layer read keys and values.
            positions_end: What all positions are below; to read it from them, the host would wait
                for the device.
            wanted_W: Indices of the tokens whose states are asked for, so that the last layer has
                queries for them only; None asks for all.
            checkpointing: Keep each layer's input only and compute the layer again in the backward.

        Returns:
            Normed hidden states WE, which the head takes.
        """
        hidden = self.pieces.embedding(self.decoder, ids_T[None])
        rotary = self.pieces.rotary(self.decoder, hidden, positions_T[None], positions_end)
        for at, layer in enumerate(self.layers):
            wanted = wanted_W if at == len(self.layers) - 1 else None
            run = partial(self._layer, layer, rotary, partial(attend, at), wanted)
            hidden = _checkpoint(run, hidden) if checkpointing else run(hidden)
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
        normed = pieces.norm(layer.input_layernorm, hidden)
        if wanted_W is None:
            query, key, value = pieces.query_key_value(attention, normed)
        else:
            key = pieces.projection(attention, attention.k_proj, normed)
            value = pieces.projection(attention, attention.v_proj, normed)
            cos, sin, hidden, normed = (
                x.index_select(1, wanted_W) for x in (*rotary, hidden, normed)
            )
            query = pieces.projection(attention, attention.q_proj, normed)
        query, key, value = (_by_heads(x, attention.head_dim) for x in (query, key, value))
        if hasattr(attention, "q_norm"):
            query, key = pieces.norm(attention.q_norm, query), pieces.norm(attention.k_norm, key)
        if wanted_W is None:
            query, key = pieces.rotated(query, key, rotary)
        else:
            query, key = _rotated(query, cos, sin), _rotated(key, *rotary)
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
    behind: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    checkpointing: bool = False,
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
        behind: Puts the keys and values of a prefix that was computed elsewhere before those of a
            layer, where `packed` stands behind one.
        checkpointing: Keep each layer's input only and compute the layer again in the backward.

    Returns:
        A scalar, in fp32 or better.
    """
    forward = DecoderForward(model)
    last = len(forward.layers) - 1

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks = packed.last_blocks if layer == last else packed.blocks
        if behind is not None:
            key, value = behind(layer, key, value)
        return packed_attention(query, key, value, blocks, kernel=kernel_for(query))

    hidden = forward.hidden_states(
        packed.input_ids,
        packed.position_ids,
        attend,
        wanted_W=packed.last_positions,
        positions_end=packed.longest_tokens,
        checkpointing=checkpointing,
    )
    if len(packed.target_positions) != len(hidden):
        hidden = hidden.index_select(0, packed.target_positions)
    total = summed_losses(forward.lm_head, hidden, packed.target_ids)
    return total / (packed.supervised_tokens if num_items is None else num_items)


def computes_again(model: Any) -> bool:
    """Say whether a model is set to compute its layers again in the backward pass."""
    return bool(_without_adapter(model).is_gradient_checkpointing)


def _by_heads(x: Tensor, head_dim: int) -> Tensor:
    """View a projection 1TE as 1HTD."""
    return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim).transpose(1, 2)


def summed_losses(
    lm_head: Any, hidden: Tensor, targets: Tensor, size: int = _HEAD_CHUNK_TOKENS
) -> Tensor:
    """Sum the cross-entropies; of more positions than `size` logits are computed again."""
    if len(targets) <= size:
        return _losses(lm_head, targets, hidden)
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    sums = [_checkpoint(partial(_losses, lm_head, ids), states) for states, ids in chunks]
    return torch.stack(sums).sum()


def _checkpoint(run: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Keep what goes in and compute the rest again in the backward.

    Looked up at every call, because Unsloth may put there what moves `states` to host memory.
    """
    computed: Tensor = torch.utils.checkpoint.checkpoint(run, states, use_reentrant=False)
    return computed


def _losses(lm_head: Any, targets: Tensor, hidden: Tensor) -> Tensor:
    logits = lm_head(hidden)
    logits = logits.float() if logits.element_size() < 4 else logits
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
