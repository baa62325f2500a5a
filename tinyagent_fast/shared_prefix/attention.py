"""Exact attention over packed sequences, by flash attention kernels that know of no packing.

By spans: each row's queries get a copy of the keys that they see, one span behind the other, and
one call of a kernel for many lengths computes all. Keys have few heads, so the copies are small.

By blocks, for kernels of one length: each block gives its output and the log-sum-exp of its scores.
A query's blocks are joined by weighting the outputs with the share that each has in the sum.
Backwards, the kernels are called with the joined output and log-sum-exp, from which they recompute
the true probabilities of their own block: the sum of the blocks' gradients is the gradient, as in
ring attention.

Source: Dao 2023, arXiv 2307.08691 (log-sum-exp and backward); Liu et al. 2023, arXiv 2310.01889
    (blocks joined by their log-sum-exp); Juravsky et al. 2024, arXiv 2402.05099 (shared prefixes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable

from tinyagent_fast.shared_prefix.packing import Block

Extras = tuple[Any, ...]
"""What a kernel's backward wants back from its forward, apart from output and log-sum-exp."""
Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value."""

_TILE_QUERIES = 64
"""Queries whose scores are held at once; of 64, 128 and 256 the fastest on a CPU."""

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Spans:
    """The queries of causal blocks, one after another, and the keys that each block's see."""

    keys: Tensor | None
    """Index of every key that is read, span by span; None where they stand so already."""
    query_starts: Tensor
    """Where each span's queries begin, and the end of the last; int32, as kernels want them."""
    key_starts: Tensor
    most_queries: int
    most_keys: int


@lru_cache(maxsize=8)  # all layers of a micro-batch but the last have the same
def spans_of(blocks: tuple[Block, ...], device: torch.device) -> Spans:
    """Write blocks as spans, in which the last query sees all keys and each before one less."""
    causal = sorted((b for b in blocks if b.causal), key=lambda b: b.query_start)
    whole = sorted((b for b in blocks if not b.causal), key=lambda b: b.key_start)
    seen: list[Tensor] = []
    key_starts, query_starts = [0], [0]
    for span in causal:
        before = (
            block
            for block in whole
            if block.query_start <= span.query_start and span.query_stop <= block.query_stop
        )
        ranges = [torch.arange(b.key_start, b.key_stop, device="cpu") for b in (*before, span)]
        seen += ranges
        key_starts.append(key_starts[-1] + sum(map(len, ranges)))
        query_starts.append(span.query_stop)
    in_place = not whole and len(causal) == 1

    def moved(tensor: Tensor) -> Tensor:
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)

    return Spans(
        keys=None if in_place else moved(torch.cat(seen)),
        query_starts=moved(torch.tensor(query_starts, dtype=torch.int32, device="cpu")),
        key_starts=moved(torch.tensor(key_starts, dtype=torch.int32, device="cpu")),
        most_queries=max(b - a for a, b in pairwise(query_starts)),
        most_keys=max(b - a for a, b in pairwise(key_starts)),
    )


class Inputs(NamedTuple):
    """What attention of one block is computed from.

    Tensors are 1 x heads x tokens x head_dim, with as many heads for keys and values as they have.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float


class Outputs(NamedTuple):
    """What was read, 1 x heads x queries x head_dim, and log-sum-exps, 1 x heads x queries."""

    read: Tensor
    total: Tensor
    extras: Extras = ()


@dataclass(frozen=True)
class BlockKernel:
    """Attention of one block, forward and backward."""

    name: str
    forward: Callable[[Inputs], Outputs]
    backward: Callable[[Tensor, Inputs, Outputs], Gradients]
    """Gradient of what was read, the inputs and the outputs to the inputs' gradients."""


@dataclass(frozen=True)
class SpanKernel:
    """Attention of all spans at once, forward and backward; tensors are tokens x heads x D."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Spans], Outputs]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Outputs, Spans], Gradients]
    """Gradient of what was read, query, key and value, the outputs and the spans."""


Kernel = BlockKernel | SpanKernel


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], *, kernel: Kernel
) -> Tensor:
    """Let every query attend the keys of its blocks.

    Args:
        query: 1 x heads x queries x head_dim.
        key: 1 x key heads x tokens x head_dim; the heads are a multiple of the key heads.
        value: As key.
        blocks: Which queries attend which keys; each query is in one causal block, which comes
            before its other blocks.
        kernel: What computes a block, from `kernel_for`.

    Returns:
        1 x queries x heads x head_dim, contiguous.
    """
    by = _BySpans if isinstance(kernel, SpanKernel) else _ByBlocks
    apply: Callable[..., Tensor] = by.apply
    return apply(query, key, value, tuple(blocks), kernel)


class _BySpans(torch.autograd.Function):
    """One call of a kernel; of keys that several spans see, the gradients are summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        kernel: SpanKernel,
    ) -> Tensor:
        # Tensors without content belong to one dry run, so none of them is kept for the next.
        """Attend by spans, and keep what the kernel needs backwards."""
        spans = (spans_of.__wrapped__ if is_fake(query) else spans_of)(blocks, query.device)
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        copies = [_read(x, spans.keys) for x in (key, value)]
        out, total, extras = kernel.forward(query, copies[0], copies[1], spans)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.kernel, ctx.spans, ctx.extras = kernel, spans, extras
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the gradients of all copies of a key or value."""
        query, key, value, out, total = ctx.saved_tensors
        keys = ctx.spans.keys
        outputs = Outputs(out, total, ctx.extras)
        copies = [_read(x, keys) for x in (key, value)]
        of_query, *of_copies = ctx.kernel.backward(
            grad[0].contiguous(), query, *copies, outputs, ctx.spans
        )
        of_both = (
            part
            if keys is None
            else x.new_zeros(x.shape, dtype=_accumulator(x.dtype))
            .index_add_(0, keys, part.to(_accumulator(x.dtype)))
            .to(x.dtype)
            for x, part in zip((key, value), of_copies, strict=True)
        )
        grads = (x.transpose(0, 1)[None] for x in (of_query, *of_both))
        return (*grads, None, None)


def _read(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


class _ByBlocks(torch.autograd.Function):
    """Forward and backward by blocks; the blocks' probabilities are never stored."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        kernel: BlockKernel,
    ) -> Tensor:
        # Heads apart: rows of one head lie 4 KiB apart otherwise, which caches dislike.
        """Attend by blocks, and join what they read."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        stored = query.new_empty(query.transpose(1, 2).shape, dtype=_accumulator(query.dtype))
        out, total = stored.transpose(1, 2), stored.new_empty(query.shape[:-1])
        extras = []
        for block in blocks:
            at = block.queries
            part, part_total, extra = kernel.forward(_inputs(query, key, value, block))
            extras.append(extra)
            if block.causal:
                out[:, :, at] = part
                total[:, :, at] = part_total
            else:
                join(out[:, :, at], total[:, :, at], part, part_total)
        stored = stored.to(query.dtype)
        ctx.save_for_backward(query, key, value, stored, total)
        ctx.blocks, ctx.kernel, ctx.extras = blocks, kernel, extras
        return stored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sum the gradients that the blocks give."""
        query, key, value, out, total = ctx.saved_tensors
        grad, out = grad.transpose(1, 2).contiguous(), out.transpose(1, 2)
        sums = [
            x.new_zeros(x.transpose(1, 2).shape, dtype=total.dtype).transpose(1, 2)
            for x in (query, key, value)
        ]
        for block, extra in zip(ctx.blocks, ctx.extras, strict=True):
            at, keys = block.queries, block.keys
            # Kernels take the log-sum-exps as dense.
            outputs = Outputs(out[:, :, at], total[:, :, at].contiguous(), extra)
            inputs = _inputs(query, key, value, block)
            parts = ctx.kernel.backward(grad[:, :, at], inputs, outputs)
            for gradient, where, part in zip(sums, (at, keys, keys), parts, strict=True):
                gradient[:, :, where] += part
        grads = (x.to(query.dtype) for x in sums)
        return (*grads, None, None)


def _inputs(query: Tensor, key: Tensor, value: Tensor, block: Block) -> Inputs:
    keys, scale = block.keys, 1 / math.sqrt(query.shape[-1])
    return Inputs(
        query[:, :, block.queries], key[:, :, keys], value[:, :, keys], block.causal, scale
    )


def join(out: Tensor, total: Tensor, part: Tensor, part_total: Tensor) -> None:
    """Join attention to some keys with attention of the same queries to others, in place.

    Args:
        out: What was read from the first keys, .. x queries x head_dim; becomes what is read from
            both.
        total: Log-sum-exps of the scores there, .. x queries; become those of both.
        part: What was read from the other keys.
        part_total: Log-sum-exps there.
    """
    share_of_part = (part_total - total).sigmoid_()[..., None]
    out.lerp_(part.to(out.dtype), share_of_part)
    torch.logaddexp(total, part_total, out=total)


def rows_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let the few queries of every row attend all its keys; for decoding, so without gradients.

    Args:
        query: Rows x key heads x queries x head_dim; heads that share keys are further queries.
        key: Rows x key heads x tokens x head_dim.
        value: As key.
        mask: Added to the scores, broadcast over key heads.

    Returns:
        What is read, in fp32 or better, and the log-sum-exps of the scores.
    """
    if query.device.type != "cpu":
        return plain_rows_attention(query, key, value, mask)
    read, total = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=1 / math.sqrt(query.shape[-1])
    )
    return read.to(_accumulator(query.dtype)), total


def plain_rows_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `rows_attention` does, on any device."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.mT
    scores = scores.to(_accumulator(query.dtype))
    if mask is not None:
        scores = scores + mask
    total = scores.logsumexp(-1)
    read = (scores - total[..., None]).exp().to(value.dtype) @ value
    return read.to(scores.dtype), total


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def kernel_for(query: Tensor) -> Kernel:
    """Choose the fastest kernel for such queries; `TILED` where no fused one fits."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if is_fake(query):  # a dry run counts what a GPU keeps
        return CUDA_FLASH if half else CPU_FLASH
    if query.device.type == "cpu":
        return TILED if half else CPU_FLASH
    # Fused kernels on CUDA want rows of head_dim to begin at multiples of 16 bytes.
    if query.device.type != "cuda" or query.shape[-1] % 8:
        return TILED
    if half and query.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return CUDA_FLASH
    return CUDA_EFFICIENT if half or query.dtype is torch.float32 else TILED


def _tiles(inputs: Inputs) -> Iterator[tuple[slice, slice, Tensor]]:
    """Give some queries at a time with the keys before their end, and their scaled scores.

    Scores are key heads x heads of each x queries x keys, in fp32 or better; what a causal block
    hides is minus infinity.
    """
    key = inputs.key[0]
    query = _by_key_heads(inputs.query, len(key))
    exact = _accumulator(key.dtype)
    scaled = (key.to(exact) * inputs.scale).mT
    for start in range(0, query.shape[2], _TILE_QUERIES):
        queries = slice(start, min(start + _TILE_QUERIES, query.shape[2]))
        keys = slice(0, queries.stop if inputs.causal else key.shape[1])
        tile = query[:, :, queries]
        scores = (tile.flatten(1, 2).to(exact) @ scaled[..., keys]).view(*tile.shape[:3], keys.stop)
        if inputs.causal:
            size = queries.stop - start
            later = torch.ones(size, size, dtype=torch.bool, device=key.device).triu(1)
            scores[..., queries].masked_fill_(later, -math.inf)
        yield queries, keys, scores


def _by_key_heads(x: Tensor, key_heads: int) -> Tensor:
    """View 1 x heads x .. as key heads x heads of each x ..; heads that share keys are together."""
    return x.reshape(key_heads, -1, *x.shape[2:])


def _tiled_forward(inputs: Inputs) -> Outputs:
    value, query = inputs.value[0], _by_key_heads(inputs.query, inputs.key.shape[1])
    read = torch.empty_like(query)
    total = query.new_empty(query.shape[:3], dtype=_accumulator(query.dtype))
    for queries, keys, scores in _tiles(inputs):
        shares = scores.softmax(-1)
        # The largest share is exp(largest score - total): less work than a log-sum-exp of its own.
        total[:, :, queries] = scores.amax(-1) - shares.amax(-1).log()
        together = shares.to(value.dtype).flatten(1, 2) @ value[:, keys]
        read[:, :, queries] = together.view(*shares.shape[:3], -1)
    return Outputs(read.flatten(0, 1)[None], total.flatten(0, 1)[None])


def _tiled_backward(grad: Tensor, inputs: Inputs, outputs: Outputs) -> Gradients:
    key, value, scale = inputs.key[0], inputs.value[0], inputs.scale
    query, grad, read = (_by_key_heads(x, len(key)) for x in (inputs.query, grad, outputs.read))
    dtype, exact = key.dtype, _accumulator(key.dtype)
    total = _by_key_heads(outputs.total, len(key)).to(exact)[..., None]
    mean = (grad.to(exact) * read).sum(-1, keepdim=True)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(x, dtype=exact) for x in (key, value))
    for queries, keys, scores in _tiles(inputs):
        asked, grads = (x[:, :, queries].flatten(1, 2) for x in (query, grad))
        shares = scores.sub_(total[:, :, queries]).exp_()
        towards = (grads @ value[:, keys].mT).view_as(shares) - mean[:, :, queries]
        towards = towards.mul_(shares).to(dtype).flatten(1, 2)
        together = (towards @ key[:, keys]).mul_(scale)
        grad_query[:, :, queries] = together.view(*shares.shape[:3], -1)
        grad_key[:, keys] += (towards.mT @ asked).mul_(scale)
        grad_value[:, keys] += shares.to(dtype).flatten(1, 2).mT @ grads
    return grad_query.flatten(0, 1)[None], grad_key[None], grad_value[None]


def _cpu_forward(inputs: Inputs) -> Outputs:
    *tensors, causal, scale = inputs
    return Outputs(
        *_aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal, scale=scale)
    )


def _cpu_backward(grad: Tensor, inputs: Inputs, outputs: Outputs) -> Gradients:
    *tensors, causal, scale = inputs
    gradients: Gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *tensors, outputs.read, outputs.total, 0.0, causal, scale=scale
    )
    return gradients


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Outputs:
    read, total, *extras = _aten._flash_attention_forward(
        *(query, key, value, *_lengths(spans)),
        0.0,
        True,
        False,
        scale=1 / math.sqrt(query.shape[-1]),
    )
    return Outputs(read, total, tuple(extras[:2]))


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, outputs: Outputs, spans: Spans
) -> Gradients:
    gradients: Gradients = _aten._flash_attention_backward(
        *(grad, query, key, value, outputs.read, outputs.total, *_lengths(spans)),
        *(0.0, True, *outputs.extras),
        scale=1 / math.sqrt(query.shape[-1]),
    )
    return gradients


def _lengths(spans: Spans) -> tuple[Tensor, Tensor, int, int]:
    return spans.query_starts, spans.key_starts, spans.most_queries, spans.most_keys


def _by_group(x: Tensor, key_heads: int) -> Tensor:
    """View heads as a batch of groups, so that keys need no copy for the heads that share them."""
    return x.view(key_heads, -1, *x.shape[2:]).transpose(0, 1)


def _heads_again(x: Tensor) -> Tensor:
    """Undo `_by_group`."""
    return x.transpose(0, 1).flatten(0, 1)[None]


def _efficient_forward(inputs: Inputs) -> Outputs:
    query, key, value, causal, scale = inputs
    grouped = _by_group(query, key.shape[1])
    keys, values = (x.expand(len(grouped), -1, -1, -1) for x in (key, value))
    read, total, *extras = _aten._scaled_dot_product_efficient_attention(
        grouped, keys, values, None, True, 0.0, causal, scale=scale
    )
    total = total[..., : query.shape[2]]  # the kernel rounds up to a multiple of 32
    return Outputs(_heads_again(read), _heads_again(total), tuple(extras))


def _efficient_backward(grad: Tensor, inputs: Inputs, outputs: Outputs) -> Gradients:
    query, key, value, causal, scale = inputs
    read, total, extras = outputs
    filled = torch.nn.functional.pad(total, (0, -total.shape[-1] % 32), value=math.inf)
    groups = (_by_group(x, key.shape[1]) for x in (query, grad, read, filled))
    grouped, grads, reads, totals = groups
    keys, values = (x.expand(len(grouped), -1, -1, -1) for x in (key, value))
    # In 16 bits the kernel takes what was read as dense, query by query, whatever its strides are.
    reads = reads.transpose(1, 2).contiguous().transpose(1, 2)
    grad_query, grad_key, grad_value, _ = _aten._scaled_dot_product_efficient_attention_backward(
        *(grads, grouped, keys, values, None, reads, totals.contiguous()),
        *(*extras, 0.0, [True, True, True, False], causal),
        scale=scale,
    )
    return _heads_again(grad_query), grad_key.sum(0)[None], grad_value.sum(0)[None]


TILED = BlockKernel("tiled", _tiled_forward, _tiled_backward)
"""Matrix products of whole tiles in torch's own operations, for any device and type.

On one core, 16 bits take half the time of the fused backward. Scores and sums are in fp32 or
better; what is multiplied otherwise is rounded to 16 bits, as flash attention does too.
"""
CPU_FLASH = BlockKernel("cpu flash", _cpu_forward, _cpu_backward)
CUDA_FLASH = SpanKernel("cuda flash", _flash_forward, _flash_backward)
"""Its causal mask is aligned with the last key, so that queries see all keys before their own."""
CUDA_EFFICIENT = BlockKernel("cuda efficient", _efficient_forward, _efficient_backward)
"""For fp32, and for devices older than Ampere."""
