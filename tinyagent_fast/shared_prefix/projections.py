"""Linear layers with LoRA adapters: those of one input together, and added up in place.

PEFT adds an adapter's output to the base layer's in three steps, each of which writes a tensor as
large as the output; here the matrix product adds to the output itself, and backwards to the
gradient of the input. Layers that are not plain (quantised, with dropout, with a rounded or
otherwise changed forward) are called as the modules they are, and so are all without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def project(x: Tensor, modules: Sequence[Any]) -> list[Tensor]:
    """Apply linear layers to one input.

    Args:
        x: 1 x tokens x features.
        modules: Linear layers, with or without an adapter.
    """
    dtype = _computed_in(x)
    weights = []
    for module in modules:
        found = _plain_adapter(module, dtype) if torch.is_grad_enabled() else None
        if found is None:
            return [module(x) for module in modules]
        weights.append(found)
    scales = tuple(one.scale for one in weights)
    biases = tuple(one.bias for one in weights)
    flat = [tensor for one in weights for tensor in (one.base, one.down, one.up)]
    apply: Callable[..., tuple[Tensor, ...]] = _Adapted.apply
    return list(apply(x.to(dtype), scales, biases, *flat))


def _computed_in(x: Tensor) -> torch.dtype:
    """Tell the type that linear layers compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Plain(NamedTuple):
    """What a linear layer with an adapter computes with, where it is nothing but that."""

    base: Tensor
    bias: Tensor | None
    """Of the base, which is frozen."""
    down: Tensor
    up: Tensor
    scale: float


def _plain_adapter(module: Any, dtype: torch.dtype) -> _Plain | None:
    """Give the weights of a layer that is nothing but a frozen base and an adapter, else None."""
    from peft.tuners.lora.layer import Linear as LoraLinear

    if type(module) is not LoraLinear or module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or active[0] in module.lora_variant:
        return None
    down, up = module.lora_A[active[0]], module.lora_B[active[0]]
    dropout = module.lora_dropout[active[0]]
    if not isinstance(dropout, nn.Identity) and module.training:
        return None
    layers = (module.base_layer, down, up)
    if any(type(layer) is not nn.Linear for layer in layers):
        return None
    if down.bias is not None or up.bias is not None:
        return None
    if any(_is_changed(layer) for layer in (module, *layers)):
        return None
    weight, bias = module.base_layer.weight, module.base_layer.bias
    if bias is not None and bias.requires_grad:
        return None
    # Without autocast, an adapter of another type is PEFT's to cast.
    castable = torch.is_autocast_enabled(weight.device.type)
    if weight.requires_grad or weight.dtype is not dtype:
        return None
    if down.weight.dtype is not dtype and not castable:
        return None
    return _Plain(weight, bias, down.weight, up.weight, float(module.scaling[active[0]]))


def _is_changed(module: nn.Module) -> bool:
    """Tell whether calling the module does more than its class says."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


class _Adapted(torch.autograd.Function):
    """Projections of one input, `x W' + b + s (x A') B'` each; W and b get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: tuple[float, ...],
        biases: tuple[Tensor | None, ...],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute all projections of one input, their adapters' first factors in one product."""
        dtype, flat = x.dtype, x.flatten(0, -2)
        bases, downs, ups = weights[::3], weights[1::3], weights[2::3]
        ctx.scales, ctx.adapter_dtype = scales, downs[0].dtype
        down, ups = torch.cat(downs).to(dtype), tuple(up.to(dtype) for up in ups)
        ranks = [one.shape[0] for one in downs]
        inner = flat @ down.T
        outputs = []
        for base, bias, up, part, scale in zip(
            bases, biases, ups, inner.split_with_sizes(ranks, 1), scales, strict=True
        ):
            output = flat @ base.T if bias is None else torch.addmm(bias.to(dtype), flat, base.T)
            outputs.append(output.addmm_(part, up.T, alpha=scale).view(*x.shape[:-1], -1))
        ctx.ranks, ctx.shape = ranks, x.shape
        ctx.save_for_backward(flat, inner, down, *bases, *ups)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of the input and of the adapters; bases are frozen."""
        flat, inner, down, *rest = ctx.saved_tensors
        bases, ups = rest[: len(grads)], rest[len(grads) :]
        flat_grads = [grad.flatten(0, -2) for grad in grads]
        grad_inner = torch.cat(
            [(g @ up).mul_(s) for g, up, s in zip(flat_grads, ups, ctx.scales, strict=True)], 1
        )
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_x = flat_grads[0] @ bases[0]
            for grad, base in zip(flat_grads[1:], bases[1:], strict=True):
                grad_x.addmm_(grad, base)
            grad_x = grad_x.addmm_(grad_inner, down).view(ctx.shape)
        grad_downs = (grad_inner.T @ flat).to(ctx.adapter_dtype).split_with_sizes(ctx.ranks)
        parts = zip(flat_grads, inner.split_with_sizes(ctx.ranks, 1), ctx.scales, strict=True)
        grad_ups = [
            (grad.T @ part).mul_(scale).to(ctx.adapter_dtype) for grad, part, scale in parts
        ]
        adapters = zip(grad_downs, grad_ups, strict=True)
        return (grad_x, None, None, *(g for pair in adapters for g in (None, *pair)))
