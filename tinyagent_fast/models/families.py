"""Model families as data: one row says all that training, decoding and export know of a family.

A new family is a new row, and docs/models.md shows the rows. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinyagent_fast.config import Targets
from tinyagent_fast.errors import ModelError

_MOST_LAYERS = 10_000
OUTPUT = "lm_head.weight"
"""The output layer in transformers; a model with tied embeddings needs none."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only model, from which memory, work and tensor shapes follow."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether the token embedding is also the output layer."""
    model_type: str = "llama"

    @classmethod
    def from_config(cls, raw: Mapping[str, object], source: str = "config.json") -> ModelShape:
        """Read the sizes from what a model's config.json holds; `source` is named in messages.

        Raises:
            ModelError: A size is missing or no positive whole number.
        """

        def size(name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
            value = raw.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ModelError(
                    f"{source}: {name} is {value!r:.80}",
                    f"it must be a positive whole number, and at most {most:,}",
                    "name a base model whose config.json has it",
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        kind = str(raw.get("model_type") or "llama")
        tied = raw.get("tie_word_embeddings")
        return cls(
            hidden=hidden,
            intermediate=size("intermediate_size"),
            layers=size("num_hidden_layers", most=_MOST_LAYERS),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", max(1, hidden // heads)),
            vocab=size("vocab_size"),
            tied=nearest_family(kind).tied if tied is None else bool(tied),
            model_type=kind,
        )

    def to_config(self) -> dict[str, Any]:
        """Name the sizes as a model's config.json does."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
        }

    @property
    def query_width(self) -> int:
        """Features of all query heads of a token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Features of all key heads of a token, and of all value heads."""
        return self.kv_heads * self.head_dim

    def linears(self, targets: Targets = "all-linear") -> list[tuple[int, int]]:
        """List in and out features of a layer's linear modules."""
        modules = nearest_family(self.model_type).linears_of(targets)
        return [(getattr(self, one.inputs), getattr(self, one.outputs)) for one in modules]

    @property
    def normed_features(self) -> int:
        """Features of a token that a layer's norms take in, over all of them."""
        norms = nearest_family(self.model_type).norms
        return sum(getattr(self, one.over or one.outputs) for one in norms)

    @property
    def body_weights(self) -> int:
        """Weights of all layers' linear modules."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears())

    @property
    def embedding_weights(self) -> int:
        """Weights of embedding and output layer, counted once where they are one."""
        return self.vocab * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class Module:
    """A linear module or a norm of a layer, as transformers and as GGUF name it."""

    module: str
    """Its path within a layer, such as `self_attn.q_proj`."""
    gguf: str
    """Its name in GGUF, such as `attn_q`."""
    inputs: str = ""
    """The `ModelShape` attribute that gives a linear module's input features."""
    outputs: str = "hidden"
    """The `ModelShape` attribute that gives its output features, or the values of a norm."""
    bias: bool = False
    """Whether a linear module adds a bias."""
    over: str = ""
    """The `ModelShape` attribute of the features that a norm runs over, where heads share it."""
    rotary_rows: bool = False
    """Whether llama.cpp expects the rows of each head as interleaved pairs."""
    sensitive: bool = False
    """Whether the mixed K-quants of llama.cpp give it more bits in some layers."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of a model file in both namings."""

    gguf: str
    source: str
    """Its name in transformers."""
    shape: tuple[int, ...]
    layer: int = -1
    """Its layer; -1 for embedding, output and last norm."""
    head_rows: int | None = None
    """Rows of one head, where llama.cpp orders them as interleaved pairs."""
    sensitive: bool = False
    """As of its module."""
    shift: float = 0.0
    """Added to what transformers stores: see `Family.norm_shift`."""
    is_output: bool = False
    """Whether it is the output layer, also as a tied embedding."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models."""

    name: str
    models: str
    """The models that people know it by."""
    tried: str
    """What of it was trained and exported with real weights; empty if nothing."""
    model_type: str
    """`model_type` in config.json."""
    causal_lm: str
    """Its class in transformers."""
    modeling: str
    """The module of transformers that has the class."""
    gguf_architecture: str
    modules: Sequence[Module]
    """Of a layer, in the order in which they compute."""
    whole_rows: str = ""
    """Why the shared forward pass does not compute its layers; empty where it does."""
    config_values: Mapping[str, Any] = field(default_factory=dict)
    """What config.json must say where it says anything: other values are other models."""
    equal_values: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that must have the values of others."""
    tied: bool = False
    """Whether the embedding is the output layer where config.json does not say it."""
    norm_shift: float = 0.0
    """What transformers adds to the weights of norms when it computes, and llama.cpp does not."""
    full_attention_every: int = 1
    """Every so many layers see all tokens; the others see a sliding window."""
    rope_base: float = 10000.0
    """Base of the rotary embedding where config.json names none."""
    rope_types: Sequence[str] = ("default", "linear")
    """Scalings of the rotary embedding that can be exported."""
    logit_noise: float = 0.0
    """What llama.cpp's own arithmetic changes in logits, even with weights and cache in f32."""

    @property
    def linears(self) -> list[Module]:
        """The linear modules of a layer."""
        return [one for one in self.modules if one.inputs]

    @property
    def norms(self) -> list[Module]:
        """The norms of a layer."""
        return [one for one in self.modules if not one.inputs]

    def linears_of(self, targets: Targets) -> list[Module]:
        """List the linear modules of a layer that get an adapter."""
        everywhere = targets == "all-linear"
        return [one for one in self.linears if everywhere or one.module.startswith("self_attn.")]

    def target_modules(self, targets: Targets) -> list[str]:
        """Name the modules that get an adapter by the last part of their paths, as peft does."""
        return [one.module.rpartition(".")[2] for one in self.linears_of(targets)]

    def tensors(self, shape: ModelShape) -> Iterator[Tensor]:
        """List the tensors of a model, in the order in which a GGUF file has them.

        Source: llama.cpp, gguf-py/gguf/tensor_mapping.py.
        """
        rows = (shape.vocab, shape.hidden)
        yield Tensor(
            gguf="token_embd.weight",
            source="model.embed_tokens.weight",
            shape=rows,
            is_output=shape.tied,
        )
        for layer in range(shape.layers):
            for one in self.modules:
                sizes = [one.outputs, one.inputs] if one.inputs else [one.outputs]
                weight = Tensor(
                    gguf=f"blk.{layer}.{one.gguf}.weight",
                    source=f"model.layers.{layer}.{one.module}.weight",
                    shape=tuple(getattr(shape, size) for size in sizes),
                    layer=layer,
                    head_rows=shape.head_dim if one.rotary_rows else None,
                    sensitive=one.sensitive,
                    shift=0.0 if one.inputs else self.norm_shift,
                )
                yield weight
                if one.bias:
                    yield replace(
                        weight,
                        gguf=f"blk.{layer}.{one.gguf}.bias",
                        source=f"model.layers.{layer}.{one.module}.bias",
                        shape=weight.shape[:1],
                    )
        yield Tensor(
            gguf="output_norm.weight",
            source="model.norm.weight",
            shape=(shape.hidden,),
            shift=self.norm_shift,
        )
        if not shape.tied:
            yield Tensor(gguf="output.weight", source=OUTPUT, shape=rows, is_output=True)


def _modules(
    *,
    bias: bool = False,
    rotary_rows: bool = False,
    head_norms: bool = False,
    output_norms: bool = False,
) -> Iterator[Module]:
    """List the modules of a layer: Llama's, and what families add to them."""
    yield Module("input_layernorm", "attn_norm")
    attention: dict[str, Any] = {"bias": bias, "inputs": "hidden"}
    rotated = {**attention, "rotary_rows": rotary_rows}
    yield Module("self_attn.q_proj", "attn_q", outputs="query_width", **rotated)
    yield Module("self_attn.k_proj", "attn_k", outputs="kv_width", **rotated)
    yield Module("self_attn.v_proj", "attn_v", outputs="kv_width", sensitive=True, **attention)
    if head_norms:
        yield Module("self_attn.q_norm", "attn_q_norm", outputs="head_dim", over="query_width")
        yield Module("self_attn.k_norm", "attn_k_norm", outputs="head_dim", over="kv_width")
    yield Module("self_attn.o_proj", "attn_output", "query_width")
    if output_norms:
        yield Module("post_attention_layernorm", "post_attention_norm")
        yield Module("pre_feedforward_layernorm", "ffn_norm")
    else:
        yield Module("post_attention_layernorm", "ffn_norm")
    yield Module("mlp.gate_proj", "ffn_gate", "hidden", "intermediate")
    yield Module("mlp.up_proj", "ffn_up", "hidden", "intermediate")
    yield Module("mlp.down_proj", "ffn_down", "intermediate", sensitive=True)
    if output_norms:
        yield Module("post_feedforward_layernorm", "post_ffw_norm")


_PLAIN = {"use_sliding_window": False, "hidden_act": "silu", "attention_bias": False}

LLAMA = Family(
    name="Llama",
    models="Llama 2, Llama 3.x, TinyLlama, SmolLM2",
    tried="SmolLM2-135M",
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    modeling="transformers.models.llama.modeling_llama",
    gguf_architecture="llama",
    modules=tuple(_modules(rotary_rows=True)),
    config_values={
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
    },
    rope_types=("default", "linear", "llama3"),
)

QWEN2 = Family(
    name="Qwen2",
    models="Qwen2, Qwen2.5",
    tried="",
    model_type="qwen2",
    causal_lm="Qwen2ForCausalLM",
    modeling="transformers.models.qwen2.modeling_qwen2",
    gguf_architecture="qwen2",
    modules=tuple(_modules(bias=True)),
    config_values=_PLAIN,
)

QWEN3 = Family(
    name="Qwen3",
    models="Qwen3 (dense)",
    tried="",
    model_type="qwen3",
    causal_lm="Qwen3ForCausalLM",
    modeling="transformers.models.qwen3.modeling_qwen3",
    gguf_architecture="qwen3",
    modules=tuple(_modules(head_norms=True)),
    config_values=_PLAIN,
)

GEMMA3 = Family(
    name="Gemma 3",
    models="Gemma 3 270M and 1B (text)",
    tried="Gemma 3 270M",
    model_type="gemma3_text",
    causal_lm="Gemma3ForCausalLM",
    modeling="transformers.models.gemma3.modeling_gemma3",
    gguf_architecture="gemma3",
    modules=tuple(_modules(head_norms=True, output_norms=True)),
    whole_rows="most of Gemma 3's layers see a sliding window of each row",
    config_values={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "rope_local_base_freq": 10000.0,
    },
    equal_values={"query_pre_attn_scalar": "head_dim"},
    tied=True,
    norm_shift=1.0,
    full_attention_every=6,
    rope_base=1_000_000.0,
    # Its activation is looked up in a table of f16: 0.039 with Gemma 3 270M's weights, and this
    # is twice that. Source: GGML_GELU_FP16 in ggml-cpu.
    logit_noise=0.08,
)

FAMILIES: Mapping[str, Family] = {row.model_type: row for row in (LLAMA, QWEN2, QWEN3, GEMMA3)}
"""Families by `model_type`."""


def nearest_family(model_type: str) -> Family:
    """Give the row of a model type, or Llama's where there is none.

    Most decoder-only models name their linear modules as Llama does, and peft refuses the others.
    Such a model can be trained; export asks `family_of`.
    """
    return FAMILIES.get(model_type, LLAMA)


def family_of(config: Mapping[str, Any], source: str = "config.json") -> Family:
    """Find a model's family by what its config.json holds; `source` is named in messages.

    Raises:
        ModelError: No row has this model type, or a setting makes it another model.
    """
    kind = config.get("model_type")
    names = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ModelError(
            f"{source}: model_type {kind!r}",
            "the project does not know this family of models",
            f"take a base model of one of these families: {names}",
        )
    layers = range(int(config.get("num_hidden_layers") or 0))
    full = [(at + 1) % family.full_attention_every == 0 for at in layers]
    wanted: dict[str, Any] = {
        **family.config_values,
        **{key: config.get(other) for key, other in family.equal_values.items()},
        "layer_types": ["full_attention" if one else "sliding_attention" for one in full],
    }
    for key, value in wanted.items():
        if config.get(key) not in (value, None):
            raise ModelError(
                f"{source}: {key} is {config[key]!r}",
                f"a plain {family.name} model has {value!r}",
                f"take a plain base model of one of these families: {names}",
            )
    return family
