"""Quantisation-aware training: the forward pass sees weights as the exported file will hold them.

Every linear weight is rounded to the grid of the K-quant that the export recipe gives it, base and
adapter together, and gradients pass the rounding unchanged (straight-through), so the adapter
learns what survives four bits. Nothing is stored rounded: the adapter stays an ordinary one.

Source: straight-through estimator: Bengio et al., arXiv 1308.3432; grids: llama.cpp's Q4_K, Q5_K,
Q6_K and Q8_0 blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.families import ModelShape, family_of

if TYPE_CHECKING:
    import torch

_TINY = 1e-12


def train_quantised(model: Any, quant: str) -> dict[str, int]:
    """Let a model with a LoRA adapter compute with rounded weights, in training and in generation.

    The quant is the file type that will be exported, such as `q4_k_m`.

    Returns:
        How many linear weights were given each grid.

    Raises:
        ModelError: A weight is in 4 bits already.
    """
    from tinyagent_fast.export.quantising import tensor_type

    config = model.config.to_dict()
    shape = ModelShape.from_config(config, "config of the model")
    tensors = {one.source: one for one in family_of(config).tensors(shape) if one.layer >= 0}
    counts: dict[str, int] = {}
    for name, module in list(model.named_modules()):
        tensor = tensors.get(f"{name[max(0, name.find('model.layers.')) :]}.weight")
        if tensor is None or len(tensor.shape) != 2:
            continue
        weight = getattr(module, "base_layer", module).weight
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ModelError(
                f"quantisation-aware training of {name}",
                "the base weights are in 4 bits, so what 4-bit export costs cannot be seen",
                "use --model.weights bf16 (fp16 on a T4, fp32 without a GPU)",
            )
        grid, _ = tensor_type(tensor, quant, shape.layers)
        _compute_rounded(module, grid)
        counts[grid] = counts.get(grid, 0) + 1
    return counts


def _compute_rounded(module: Any, grid: str) -> None:
    """Replace a module's forward by one that rounds its whole weight first."""
    from torch.nn.functional import linear

    base = getattr(module, "base_layer", module)

    def forward(x_BTI: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        weight_OI = base.weight
        if hasattr(module, "lora_A") and not module.disable_adapters:
            for name in module.active_adapters:
                a_RI, b_OR = module.lora_A[name].weight, module.lora_B[name].weight
                weight_OI = weight_OI + (module.scaling[name] * (b_OR @ a_RI)).to(base.weight.dtype)
        rounded_OI = weight_OI + (rounded(weight_OI.detach(), grid) - weight_OI).detach()
        return linear(x_BTI, rounded_OI.to(x_BTI.dtype), base.bias)

    module.forward = forward


def rounded(weight_OI: torch.Tensor, grid: str) -> torch.Tensor:
    """Round a weight to the values that a block format can hold.

    The scales are the plain ones of a block's range; llama.cpp searches a little for better ones,
    so its files are at least about as near. The grid is a ggml type that can hold the rows.
    """
    if grid in ("F32", "F16", "BF16"):
        return weight_OI
    values = weight_OI.float()
    if grid in ("Q4_K", "Q5_K"):
        result = _affine(values.reshape(-1, 8, 32), 15 if grid == "Q4_K" else 31)
    elif grid == "Q6_K":
        result = _symmetric(values.reshape(-1, 16, 16), 31, 127)
    elif grid == "Q5_0":
        result = _symmetric(values.reshape(-1, 1, 32), 15, None)
    else:
        result = _symmetric(values.reshape(-1, 1, 32), 127, None)
    return result.reshape(weight_OI.shape).to(weight_OI.dtype)


def _affine(blocks_NSV: torch.Tensor, levels: int) -> torch.Tensor:
    """Round to `scale * q - offset`, scales and offsets themselves in 6 bits of a super-block."""
    offset_NS1 = (-blocks_NSV.amin(dim=2, keepdim=True)).clamp(min=0)
    scale_NS1 = (blocks_NSV.amax(dim=2, keepdim=True) + offset_NS1).clamp(min=0) / levels
    scale_NS1, offset_NS1 = _six_bits(scale_NS1), _six_bits(offset_NS1)
    q = ((blocks_NSV + offset_NS1) / scale_NS1.clamp(min=_TINY)).round().clamp(0, levels)
    return q * scale_NS1 - offset_NS1


def _six_bits(scale_NS1: torch.Tensor) -> torch.Tensor:
    unit_N11 = scale_NS1.amax(dim=1, keepdim=True) / 63
    return (scale_NS1 / unit_N11.clamp(min=_TINY)).round() * unit_N11


def _symmetric(blocks_NSV: torch.Tensor, levels: int, scale_levels: int | None) -> torch.Tensor:
    """Round to `scale * q`, q in -levels - 1 .. levels."""
    scale_NS1 = blocks_NSV.abs().amax(dim=2, keepdim=True) / levels
    if scale_levels is not None:
        unit_N11 = scale_NS1.amax(dim=1, keepdim=True) / scale_levels
        scale_NS1 = (scale_NS1 / unit_N11.clamp(min=_TINY)).round() * unit_N11
    q = (blocks_NSV / scale_NS1.clamp(min=_TINY)).round().clamp(-levels - 1, levels)
    return q * scale_NS1
