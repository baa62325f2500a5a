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


@dataclass(frozen=True, kw_only=True)
class LinearModule:
    """One linear module of a layer, as transformers and as GGUF name it."""

    module: str
    """Its path within a layer, such as `self_attn.q_proj`."""
    gguf: str
    """Its name in GGUF, such as `attn_q`."""
    inputs: str
    """The `ModelShape` attribute that gives its input features."""
    outputs: str
    """The `ModelShape` attribute that gives its output features."""
    rotary_rows: bool = False
    """Whether llama.cpp expects the rows of each head as interleaved pairs."""
    sensitive: bool = False
    """Whether the mixed K-quants of llama.cpp give it more bits in some layers."""

    @property
    def leaf(self) -> str:
        """The last part of its path, which LoRA's target modules name."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of a layer, as transformers and as GGUF name it."""

    module: str
    gguf: str
    before: str
    """The block of linear modules that it stands before, such as `self_attn`."""


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
    linears: Sequence[LinearModule]
    """Of a layer, in the order in which they compute."""
    norms: Sequence[Norm]
    """Of a layer, in the order in which they compute."""
    config_values: Mapping[str, Any] = field(default_factory=dict)
    """What config.json must say where it says anything: other values are other models."""
    rope_types: Sequence[str] = ("default", "linear", "llama3")
    """Scalings of the rotary embedding that can be exported."""

    def target_modules(self, targets: Targets) -> list[str]:
        """Name the modules that get an adapter.

        Args:
            targets: All linear modules of a layer, or those of attention.

        Returns:
            Last parts of their paths, as peft wants them.
        """
        return [one.leaf for one in self.linears_of(targets)]

    def linears_of(self, targets: Targets) -> list[LinearModule]:
        """List a layer's linear modules.

        Args:
            targets: All of them, or those of attention.

        Returns:
            The modules in the order in which they compute.
        """
        return [
            one
            for one in self.linears
            if targets == "all-linear" or one.module.startswith("self_attn.")
        ]

    def tensors(self, shape: ModelShape) -> Iterator[Tensor]:
        """List the tensors of a model, in the order in which a GGUF file has them.

        Args:
            shape: Its sizes.

        Yields:
            Each tensor in both namings.

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
            for norm in self.norms:
                yield Tensor(
                    gguf=f"blk.{layer}.{norm.gguf}.weight",
                    source=f"model.layers.{layer}.{norm.module}.weight",
                    shape=(shape.hidden,),
                    layer=layer,
                )
                for one in self.linears:
                    if one.module.startswith(f"{norm.before}."):
                        yield Tensor(
                            gguf=f"blk.{layer}.{one.gguf}.weight",
                            source=f"model.layers.{layer}.{one.module}.weight",
                            shape=(getattr(shape, one.outputs), getattr(shape, one.inputs)),
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
    linears=(
        LinearModule(
            module="self_attn.q_proj",
            gguf="attn_q",
            inputs="hidden",
            outputs="query_width",
            rotary_rows=True,
        ),
        LinearModule(
            module="self_attn.k_proj",
            gguf="attn_k",
            inputs="hidden",
            outputs="kv_width",
            rotary_rows=True,
        ),
        LinearModule(
            module="self_attn.v_proj",
            gguf="attn_v",
            inputs="hidden",
            outputs="kv_width",
            sensitive=True,
        ),
        LinearModule(
            module="self_attn.o_proj", gguf="attn_output", inputs="query_width", outputs="hidden"
        ),
        LinearModule(
            module="mlp.gate_proj", gguf="ffn_gate", inputs="hidden", outputs="intermediate"
        ),
        LinearModule(module="mlp.up_proj", gguf="ffn_up", inputs="hidden", outputs="intermediate"),
        LinearModule(
            module="mlp.down_proj",
            gguf="ffn_down",
            inputs="intermediate",
            outputs="hidden",
            sensitive=True,
        ),
    ),
    norms=(
        Norm(module="input_layernorm", gguf="attn_norm", before="self_attn"),
        Norm(module="post_attention_layernorm", gguf="ffn_norm", before="mlp"),
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
    """Find the family of a model.

    Args:
        config: What its config.json holds.
        source: Named in messages.

    Returns:
        The family's row.

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
