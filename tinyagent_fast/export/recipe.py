"""Which storage type each tensor gets, as llama.cpp chooses it; the plan that quantising follows.

Pure: names and shapes in, type names out. Only Llama models with one feed-forward network a layer.
"""

from __future__ import annotations

import re

QUANTS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
"""Kinds of file that can be written, from exact to small."""

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15}
"""What `general.file_type` says for each kind (enum llama_ftype in llama.cpp's llama.h)."""

BLOCK_VALUES = {
    "F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q5_0": 32, "Q5_1": 32, "Q4_K": 256, "Q5_K": 256,
    "Q6_K": 256,
}  # fmt: skip
"""Values that one block of a type holds; a row must be made of whole blocks."""

_DEFAULT = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q6_k": "Q6_K",
    "q5_k_m": "Q5_K", "q4_k_m": "Q4_K",
}  # fmt: skip
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.")


def tensor_type(
    name: str, shape: tuple[int, ...], quant: str, layers: int, tied: bool
) -> tuple[str, str | None]:
    """Choose the type one tensor is stored as.

    Args:
        name: GGUF name, such as `blk.0.attn_v.weight`.
        shape: Rows first, so the last number is the row length.
        quant: One of `QUANTS`.
        layers: Layers of the model.
        tied: Whether the token embedding is also the output layer.

    Returns:
        The ggml type's name, and the type that was wanted where rows do not divide into its
        blocks (None where the first choice fits).

    Source:
        llama.cpp, src/llama-quant.cpp: tensor_allows_quantization, llama_tensor_get_type_impl,
        tensor_type_fallback (release 0.5.0).
    """
    if len(shape) < 2 or not name.endswith("weight") or name.endswith("_norm.weight"):
        return "F32", None
    wanted = _wanted_type(name, quant, layers, tied)
    row = shape[-1]
    if row % BLOCK_VALUES[wanted] == 0:
        return wanted, None
    is_output = name == "output.weight" or (tied and name == "token_embd.weight")
    chosen = "Q8_0" if is_output else _SMALLER_BLOCKS.get(wanted, wanted)
    return (chosen if row % BLOCK_VALUES[chosen] == 0 else "F16"), wanted


def layer_of(name: str) -> int:
    """Return the layer that a tensor belongs to, to sort by and to choose types.

    Args:
        name: GGUF name of a tensor.

    Returns:
        The layer's number, -1 for tensors outside the layers.
    """
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _wanted_type(name: str, quant: str, layers: int, tied: bool) -> str:
    """Return the type by the tensor's role alone, before its shape is looked at."""
    default = _DEFAULT[quant]
    if BLOCK_VALUES[default] != 256:
        return default
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    sensitive = "attn_v.weight" in name or "ffn_down" in name
    return "Q6_K" if sensitive and _gets_more_bits(layer_of(name), layers) else default


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Say whether a layer is one that loses most by few bits: the outer ones and every third."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
