"""The gradients of an optimizer step whose micro-batches share prefixes.

A prefix is run once. Its keys and values are leaves for the micro-batches behind it, whose
gradients to them are summed; one backward pass through the prefix takes the sums on at the end.
That is the chain rule: only the order of additions differs from computing the prefix every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tinyagent_fast.shared_prefix import forward as layers
from tinyagent_fast.shared_prefix.packing import PackedGroup, PackedStep
from tinyagent_fast.shared_prefix.prefix import NO_PREFIX, Prefix, compute_prefix


def step_gradients(
    model: Any,
    step: PackedStep,
    num_items: float | Tensor | None = None,
    *,
    kept_tokens: float = math.inf,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Compute the loss of a step's rows, and add its gradients to those of the parameters.

    Args:
        model: One that `forward.unsupported` has nothing against for training.
        step: The rows, on the model's device; with a prefix for several micro-batches only where
            the model does not compute its layers again.
        num_items: What the sum of the token losses is divided by; by default the step's supervised
            tokens.
        kept_tokens: A micro-batch that has more with its prefix computes its layers again.
        backward: Makes the backward pass of a micro-batch, maybe of a scaled loss.
        autocast: Context of the forward passes.

    Returns:
        The loss, a scalar without gradient.
    """
    items = step.supervised_tokens if num_items is None else num_items
    losses = [
        loss
        for group in step.groups
        for loss in _group_losses(model, group, items, kept_tokens, backward, autocast)
    ]
    return torch.stack(losses).sum()


def _group_losses(
    model: Any,
    group: PackedGroup,
    items: float | Tensor,
    kept_tokens: float,
    backward: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Tensor]:
    """Run a group's micro-batches forward and backward, and then its prefix backward."""
    prefix = NO_PREFIX
    if len(group.prefix_ids):
        with autocast():
            prefix = compute_prefix(layers.DecoderForward(model), group.prefix_ids)
    outputs = [x for pair in prefix.layers for x in pair]
    leaves = [x.detach().requires_grad_() for x in outputs]
    seen = Prefix(prefix.tokens, tuple(zip(leaves[::2], leaves[1::2], strict=True)))
    # In fp32, as 16 bits would round at each micro-batch.
    sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in leaves]
    losses = []
    for part in group.parts:
        tokens = part.behind_tokens + part.computed_tokens
        with autocast():
            loss = layers.shared_prefix_loss(
                model,
                part,
                items,
                behind=seen.followed_by if leaves else None,
                checkpointing=layers.computes_again(model) or tokens > kept_tokens,
            )
        backward(loss)
        losses.append(loss.detach())
        for total, leaf in zip(sums, leaves, strict=True):
            assert leaf.grad is not None, "every micro-batch reads its prefix in every layer"
            total.add_(leaf.grad)
            leaf.grad = None
    if outputs:
        gradients = [total.to(x.dtype) for total, x in zip(sums, outputs, strict=True)]
        torch.autograd.backward(outputs, gradients)
    return losses
