"""Model families as data: one row says all that training, decoding and export know of a family.

A new family is a new row. Where its layers compute something that the shared forward pass does not,
that is written there; where GGUF stores its tensors in another way, `export` has it. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tinyagent_fast.errors import ModelError

Targets = Literal["all-linear", "attention"]

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

        def size(name: str, default: int | None = None) -> int:
            value = raw.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or value < 1:
                raise ModelError(
                    f"{source}: {name} is {value!r}",
                    "it must be a positive whole number",
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
            model_type=str(raw.get("model_type") or "llama"),
        )

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
    is_output: bool = False
    """Whether it is the output layer, also as a tied embedding."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models."""

    name: str
    model_type: str
    """`model_type` in config.json."""
    causal_lm: str
    """Its class in transformers."""
    modeling: str
    """The module of transformers that has the class."""
    gguf_architecture: str
    modules: Sequence[Module]
    """Of a layer, in the order in which they compute."""
    config_values: Mapping[str, Any] = field(default_factory=dict)
    """What config.json must say where it says anything: other values are other models."""
    rope_types: Sequence[str] = ("default", "linear", "llama3")
    """Scalings of the rotary embedding that can be exported."""

    @property
    def linears(self) -> list[Module]:
        """The linear modules of a layer."""
        return [one for one in self.modules if one.inputs]

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
                yield Tensor(
                    gguf=f"blk.{layer}.{one.gguf}.weight",
                    source=f"model.layers.{layer}.{one.module}.weight",
                    shape=tuple(getattr(shape, size) for size in sizes),
                    layer=layer,
                    head_rows=shape.head_dim if one.rotary_rows else None,
                    sensitive=one.sensitive,
                )
        yield Tensor(gguf="output_norm.weight", source="model.norm.weight", shape=(shape.hidden,))
        if not shape.tied:
            yield Tensor(gguf="output.weight", source=OUTPUT, shape=rows, is_output=True)


LLAMA = Family(
    name="Llama",
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    modeling="transformers.models.llama.modeling_llama",
    gguf_architecture="llama",
    modules=(
        Module("input_layernorm", "attn_norm"),
        Module("self_attn.q_proj", "attn_q", "hidden", "query_width", rotary_rows=True),
        Module("self_attn.k_proj", "attn_k", "hidden", "kv_width", rotary_rows=True),
        Module("self_attn.v_proj", "attn_v", "hidden", "kv_width", sensitive=True),
        Module("self_attn.o_proj", "attn_output", "query_width", "hidden"),
        Module("post_attention_layernorm", "ffn_norm"),
        Module("mlp.gate_proj", "ffn_gate", "hidden", "intermediate"),
        Module("mlp.up_proj", "ffn_up", "hidden", "intermediate"),
        Module("mlp.down_proj", "ffn_down", "intermediate", "hidden", sensitive=True),
    ),
    config_values={
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
    },
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA,)}
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
    for key, value in family.config_values.items():
        if config.get(key) not in (value, None):
            raise ModelError(
                f"{source}: {key} is {config[key]!r}",
                f"a plain {family.name} model has {value!r}",
                f"take a plain base model of one of these families: {names}",
            )
    return family
