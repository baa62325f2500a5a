"""The gradients of an optimizer step whose micro-batches share prefixes.

A prefix is run once. Its keys and values are leaves for the micro-batches behind it, whose
gradients to them are summed; one backward pass through the prefix takes the sums on at the end.
That is the chain rule: only the order of additions differs from computing the prefix every time.

On a CPU several micro-batches run at once, each by a worker of its own. Cores that share one
operation wait for each other after each of thousands a step, and for long where another program
has one of them; workers wait once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinyagent_fast.shared_prefix import forward as layers
from tinyagent_fast.shared_prefix.packing import PackedGroup, PackedSequence, PackedStep
from tinyagent_fast.shared_prefix.prefix import Prefix, compute_prefix

_Found = tuple[Tensor, Sequence[Tensor]]
"""A micro-batch's loss and gradients."""


def step_gradients(
    model: Any,
    step: PackedStep,
    num_items: float | Tensor | None = None,
    *,
    kept_tokens: float = math.inf,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    workers: int = 1,
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
        workers: Micro-batches that are computed at once, on a CPU and without `backward`. Their
            gradients are summed in order; dropout would be drawn in any.

    Returns:
        The loss, a scalar without gradient.
    """
    passes = _Passes(
        model=model,
        parameters=[p for p in model.parameters() if p.requires_grad],
        items=step.supervised_tokens if num_items is None else num_items,
        kept_tokens=kept_tokens,
        backward=backward,
        autocast=autocast,
        workers=workers,
    )
    losses = [loss for group in step.groups for loss in passes.of_group(group)]
    return torch.stack(losses).sum()


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """The passes of a step, forward and backward; its fields are as in `step_gradients`."""

    model: Any
    parameters: Sequence[Tensor]
    items: float | Tensor
    kept_tokens: float
    backward: Callable[[Tensor], None]
    autocast: Callable[[], AbstractContextManager[Any]]
    workers: int

    def of_group(self, group: PackedGroup) -> list[Tensor]:
        """Run a prefix forward, the micro-batches behind it, and it backward; give their losses."""
        with self.autocast():
            prefix = compute_prefix(layers.DecoderForward(self.model), group.prefix_ids)
        outputs = [x for pair in prefix.layers for x in pair]
        # In fp32, as 16 bits would round at each micro-batch.
        sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in outputs
        ]
        losses = []
        runs = (partial(self.of_part, part, prefix) for part in group.parts)
        for loss, found in _at_once(runs, self.workers):
            losses.append(loss)
            for total, gradient in zip(sums, found, strict=False):
                total.add_(gradient)
            for parameter, gradient in zip(self.parameters, found[len(sums) :], strict=False):
                parameter.grad = (
                    gradient if parameter.grad is None else parameter.grad.add_(gradient)
                )
        if outputs:
            gradients = [total.to(x.dtype) for total, x in zip(sums, outputs, strict=True)]
            torch.autograd.backward(outputs, gradients)
        return losses

    def of_part(self, part: PackedSequence, prefix: Prefix) -> _Found:
        """Give a micro-batch's loss, and gradients to its prefix and, of a worker, parameters."""
        leaves = [x.detach().requires_grad_() for pair in prefix.layers for x in pair]
        pairs = tuple(zip(leaves[::2], leaves[1::2], strict=True))
        tokens = part.behind_tokens + part.computed_tokens
        with self.autocast():
            loss = layers.shared_prefix_loss(
                self.model,
                part,
                self.items,
                behind=Prefix(prefix.tokens, pairs).followed_by if leaves else None,
                checkpointing=layers.computes_again(self.model) or tokens > self.kept_tokens,
            )
        if self.workers > 1:
            return loss.detach(), torch.autograd.grad(loss, (*leaves, *self.parameters))
        self.backward(loss)
        found = [leaf.grad for leaf in leaves]
        assert None not in found, "every micro-batch reads its prefix in every layer"
        return loss.detach(), [x for x in found if x is not None]


def _at_once(runs: Iterable[Callable[[], _Found]], workers: int) -> Iterator[_Found]:
    """Give what each run finds, in order; workers share torch's threads among them."""
    if workers == 1:
        yield from (run() for run in runs)
        return
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    try:
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            yield from pool.map(lambda run: run(), runs)
    finally:
        torch.set_num_threads(threads)  # what later threads begin with
