"""A plain Llama's own layers, run over keys and values that are kept by whoever asks.

`prefix_cache` keeps them in two parts; attention to the parts is joined by their log-sum-exp, which
gives what attention to all keys gives. The layers' modules are called as they are, so adapters,
quantised weights and types stay the model's own.

Letters in names of shapes: B rows, N new tokens of a row, T tokens of a stream of rows, H heads,
K heads of keys and values, D numbers a head, E numbers a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


_CHANGED_BY_LENGTH = ("dynamic", "longrope")
"""Rotary encodings in which a token's turn depends on how long the sequence becomes."""
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


def unsupported(model: Any) -> str | None:
    """Say why a model's layers cannot be run here.

    Args:
        model: A causal language model, wrapped by PEFT or not.

    Returns:
        The reason in words, or none if `LayerRunner` does what `model.generate` would.
    """
    from transformers.models.llama import modeling_llama as llama

    if getattr(model, "max_seq_length", None) is not None or "generate" in vars(model):
        return "the model brings its own way to generate"
    base, reason = _without_peft(model)
    if reason is not None:
        return reason
    layers = [] if type(base) is not llama.LlamaForCausalLM else list(base.model.layers)
    passes = [base, *([base.model] if layers else []), *layers, *(x.self_attn for x in layers)]
    own = (llama.LlamaForCausalLM, llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention)
    if not layers or any(type(part) not in own for part in passes):
        return f"its layers are not those of a plain Llama but of {type(base).__name__}"
    if any(_is_replaced(part) for part in passes) or any(
        kind.forward.__module__ != llama.__name__ for kind in own
    ):
        return "another library replaced its forward pass"
    if base.config.rope_parameters["rope_type"] in _CHANGED_BY_LENGTH:
        return "its position encoding depends on the length of the whole sequence"
    if len({parameter.device for parameter in base.parameters()}) > 1:
        return "it is spread over several devices"
    asked = [name for name in _PROCESSORS if _is_asked(base.generation_config, name)]
    return f"its generation_config sets {asked[0]}" if asked else None


def _is_replaced(part: Any) -> bool:
    """Tell whether calling a module does something else than its class says."""
    forward = vars(part).get("forward")
    # trl's way to the loss goes round the head only, and the layers are called one by one here.
    replaced = forward is not None and not str(forward.__module__).startswith("trl.")
    return replaced or "generate" in vars(part)


def _without_peft(model: Any) -> tuple[Any, str | None]:
    if not type(model).__module__.startswith("peft."):
        return model, None
    settings = model.active_peft_config
    if settings.is_prompt_learning or getattr(settings, "alora_invocation_tokens", None):
        return model, f"its adapter ({settings.peft_type.value}) is more than changed layers"
    return model.get_base_model(), None


def _is_asked(settings: Any, name: str) -> bool:
    value = getattr(settings, name, None)
    return bool(value) and not (name in ("repetition_penalty", "guidance_scale") and value == 1)


class Pass(Protocol):
    """What one run through the layers does with their keys, values and queries."""

    def store(self, layer: int, keys_1TKD: Tensor, values_1TKD: Tensor) -> None:
        """Take the keys and values of the tokens that run."""

    def attend(self, layer: int, queries_1THD: Tensor) -> Tensor:
        """Give what each token's heads read, as 1THD."""


class LayerRunner:
    """Runs a Llama's layers over keys and values kept elsewhere."""

    def __init__(self, model: Any, *, by_blocks: bool | None = None) -> None:
        """Look into a model.

        Args:
            model: One that `unsupported` has nothing against, in evaluation mode.
            by_blocks: Whether prefix and suffix are attended apart also in prefill, by a kernel
                that only CPUs have; none asks the device.
        """
        self.base = base = _without_peft(model)[0]
        self.layers = list(base.model.layers[: base.config.num_hidden_layers])
        self.device = base.device
        self.head_size: int = self.layers[0].self_attn.head_dim
        self.scale: float = self.layers[0].self_attn.scaling
        self.by_blocks = self.device.type == "cpu" if by_blocks is None else by_blocks

    def run(
        self, ids_T: Tensor, positions_T: Tensor, through: Pass, wanted: Tensor | None = None
    ) -> Tensor:
        """Run tokens through the layers.

        Args:
            ids_T: The tokens.
            positions_T: Where each stands in its own sequence.
            through: Keeps keys and values and attends to them.
            wanted: Indices of the tokens whose last hidden state is asked for; the last layer does
                nothing else. None asks for all.

        Returns:
            The hidden states behind the last layer, one row a wanted token.
        """
        hidden = self.base.model.embed_tokens(ids_T[None])
        turns = self.base.model.rotary_emb(hidden, position_ids=positions_T[None])
        for at, layer in enumerate(self.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            values = self._by_head(attention.v_proj(normed))
            keys = _turned(self._by_head(attention.k_proj(normed)), *turns)
            through.store(at, keys.to(values.dtype), values)
            if wanted is not None and at == len(self.layers) - 1:
                hidden, normed = hidden[:, wanted], normed[:, wanted]
                if not len(wanted):
                    break
                turns = [turn[:, wanted] for turn in turns]
            queries = _turned(self._by_head(attention.q_proj(normed)), *turns)
            read = through.attend(at, queries.to(values.dtype))
            hidden = hidden + attention.o_proj(read.flatten(-2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        last: Tensor = hidden[0]
        return last

    def most_likely(self, hidden_TE: Tensor) -> list[int]:
        """Give the token that each hidden state makes most likely.

        Args:
            hidden_TE: What `run` gave.

        Returns:
            Token ids; of equals the one that `argmax` names.
        """
        logits = self.base.lm_head(self.base.model.norm(hidden_TE[None]))[0]
        ids: list[int] = logits.float().argmax(-1).tolist()
        return ids

    def _by_head(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], -1, self.head_size)

    def attention(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend from few queries to all keys.

        Args:
            queries: Rows, heads of keys, queries, numbers.
            keys: Rows, heads of keys, keys, numbers.
            values: As the keys.
            mask: Added to the scores; broadcast over heads.

        Returns:
            What is read, and the log-sum-exp of the scores.
        """
        import torch

        if self.by_blocks:
            return cpu_attention(queries, keys, values, scale=self.scale, mask=mask)
        scores = (queries * self.scale) @ keys.transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores + mask
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse


def _turned(states_1THD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """Apply the rotary position encoding."""
    from transformers.models.llama.modeling_llama import rotate_half

    turned: Tensor = rotate_half(states_1THD) * sin_1TD[:, :, None]
    return states_1THD * cos_1TD[:, :, None] + turned


def joined(read: Tensor, lse: Tensor, other_read: Tensor, other_lse: Tensor) -> Tensor:
    """Join attention to two sets of keys into attention to both.

    Args:
        read: What was read from one set.
        lse: Log-sum-exp of the scores there.
        other_read: What was read from the other.
        other_lse: Log-sum-exp there.

    Returns:
        What is read from both.
    """
    weight = (other_lse - lse).sigmoid()[..., None]
    return read.lerp(other_read, weight.to(read.dtype))


def cpu_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with torch's fused CPU kernel, which also gives the log-sum-exp of the scores.

    Args:
        queries: Rows, heads, queries, numbers.
        keys: Rows, heads of keys, keys, numbers.
        values: As the keys.
        scale: Multiplies the scores.
        causal: Whether a query sees the keys up to its own only; then both are the same tokens.
        mask: Added to the scores.

    Returns:
        What is read, and the log-sum-exp.
    """
    import torch

    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, causal, attn_mask=mask, scale=scale
    )
    return found


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend causally where the queries are the last of the keys' tokens.

    Args:
        queries: Rows, heads, queries, numbers.
        keys: Rows, heads of keys, keys, numbers.
        values: As the keys.
        scale: Multiplies the scores.

    Returns:
        What is read.
    """
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    copies = queries.shape[1] // keys.shape[1]
    if copies > 1:
        keys, values = (x.repeat_interleave(copies, dim=1) for x in (keys, values))
    asked, seen = queries.shape[2], keys.shape[2]
    if asked == seen:
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
    bias = causal_lower_right(asked, seen)
    return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
