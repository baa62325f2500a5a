"""Attention by blocks against attention with a mask, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyagent_fast.shared_prefix.attention import (
    CPU_FLASH,
    CUDA_EFFICIENT,
    CUDA_FLASH,
    TILED,
    Kernel,
    Outputs,
    SpanKernel,
    Spans,
    kernel_for,
    packed_attention,
)
from tinyagent_fast.shared_prefix.packing import Block, pack

HEAD_DIM = 8


def span_by_span(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """Attend as a kernel for many lengths does: the last query of each span sees all its keys."""
    read = []
    ends = zip(spans.query_starts.tolist(), spans.key_starts.tolist(), strict=True)
    for (first, start), (last, stop) in pairwise(ends):
        of_queries, *of_keys = (
            x[at].transpose(0, 1)[None]
            for x, at in (
                (query, slice(first, last)),
                (key, slice(start, stop)),
                (value, slice(start, stop)),
            )
        )
        before = stop - start - (last - first)
        blocks = [Block(0, last - first, before, stop - start, causal=True)]
        blocks += [Block(0, last - first, 0, before, causal=False)] if before else []
        assert stop - start <= spans.most_keys
        assert last - first <= spans.most_queries
        read.append(masked_attention(of_queries, *of_keys, blocks)[0])
    return torch.cat(read)


def differentiated(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, _: Outputs, spans: Spans
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        return torch.autograd.grad(span_by_span(*leaves, spans), leaves, grad)


BY_SPANS = SpanKernel(
    "span by span", lambda *x: Outputs(span_by_span(*x), torch.empty(0)), differentiated
)
"""What `CUDA_FLASH` does, by the definition of attention and on any device."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.04}


def masked_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Attend with the definition: one mask over all tokens, keys repeated for the heads."""
    allowed = torch.zeros(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    for block in blocks:
        queries, keys = (
            slice(block.query_start, block.query_stop),
            slice(block.key_start, block.key_stop),
        )
        new = torch.ones_like(allowed[queries, keys])
        allowed[queries, keys] = new.tril() if block.causal else new
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def blocks_of(prefix: int, suffixes: Sequence[int], *, last: bool) -> tuple[Sequence[Block], int]:
    rows = []
    for n, suffix in enumerate(suffixes):
        ids = [*range(prefix), *[1000 + n] * suffix]
        # The last layer needs the second half of each suffix only.
        first = prefix + suffix // 2
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    packed = pack(rows, smallest_shared_tokens=2)
    return (packed.last_blocks if last else packed.blocks), packed.computed_tokens


def tensors(
    heads: tuple[int, int],
    blocks: Sequence[Block],
    tokens: int,
    dtype: torch.dtype,
    head_dim: int = HEAD_DIM,
) -> list[Tensor]:
    """Make query, key, value and the gradient of the output, strided as projections leave them."""
    torch.manual_seed(tokens)
    queries = max(block.query_stop for block in blocks)
    shapes = [(queries, heads[0]), (tokens, heads[1]), (tokens, heads[1])]
    made = [torch.randn(1, n, h, head_dim, dtype=dtype).transpose(1, 2) for n, h in shapes]
    return [*made, torch.randn(1, queries, heads[0], head_dim, dtype=dtype)]


def with_gradients(
    attend: str, given: list[Tensor], blocks: Sequence[Block], kernel: Kernel
) -> list[Tensor]:
    query, key, value, grad = given
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    if attend == "masked":
        out = masked_attention(*leaves, blocks)
    else:
        out = packed_attention(*leaves, blocks, kernel=kernel)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        assert not got.isnan().any()
        error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
        assert error < tolerance or (got.double() - want.double()).abs().max() < tolerance / 10


@given(
    prefix=st.integers(0, 40),
    suffixes=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    kernel=st.sampled_from([CPU_FLASH, TILED, BY_SPANS]),
    last=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_attention_and_its_gradients_equal_those_with_a_mask(
    prefix: int,
    suffixes: list[int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    kernel: Kernel,
    last: bool,
) -> None:
    blocks, tokens = blocks_of(prefix, suffixes, last=last)
    given = tensors(heads, blocks, tokens, dtype)
    found = with_gradients("by blocks", given, blocks, kernel)
    assert_close(found, with_gradients("masked", given, blocks, kernel), TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", [CPU_FLASH, TILED], ids=lambda kernel: kernel.name)
def test_long_packed_sequences_cross_the_kernels_own_blocks_without_error(kernel: Kernel) -> None:
    """The CPU's kernel works on up to 256 queries and 512 keys at a time."""
    blocks, tokens = blocks_of(700, [530, 300], last=False)
    given = tensors((4, 2), blocks, tokens, torch.float32)
    found = with_gradients("by blocks", given, blocks, kernel)
    assert_close(found, with_gradients("masked", given, blocks, kernel), TOLERANCE[torch.float32])


@pytest.mark.parametrize("kernel", [CPU_FLASH, TILED], ids=lambda kernel: kernel.name)
def test_half_precision_is_as_near_as_its_rounding_allows(kernel: Kernel) -> None:
    blocks, tokens = blocks_of(60, [30, 20, 25], last=False)
    given = tensors((4, 2), blocks, tokens, torch.bfloat16)
    found = with_gradients("by blocks", given, blocks, kernel)
    assert {x.dtype for x in found} == {torch.bfloat16}
    exact = [x.double() for x in given]
    assert_close(found, with_gradients("masked", exact, blocks, kernel), 0.02)


@pytest.mark.parametrize("size", [30.0, 100.0])
def test_scores_too_large_for_exponentials_are_joined_all_the_same(size: float) -> None:
    blocks, tokens = blocks_of(20, [10, 12], last=False)
    query, key, value, grad = tensors((4, 2), blocks, tokens, torch.float64)
    given = [query * size, key * size, value, grad]
    found = with_gradients("by blocks", given, blocks, CPU_FLASH)
    assert_close(found, with_gradients("masked", given, blocks, CPU_FLASH), 1e-9)


def test_gradcheck_agrees_with_finite_differences() -> None:
    blocks, tokens = blocks_of(6, [4, 3], last=True)
    query, key, value, _ = tensors((2, 1), blocks, tokens, torch.float64, head_dim=3)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    for kernel in (CPU_FLASH, TILED, BY_SPANS):
        assert torch.autograd.gradcheck(
            lambda *x, kernel=kernel: packed_attention(*x, blocks, kernel=kernel), leaves
        )


def test_the_output_lies_as_the_output_projection_reads_it() -> None:
    blocks, tokens = blocks_of(20, [10, 12], last=False)
    query, key, value, _ = tensors((4, 2), blocks, tokens, torch.float32)
    out = packed_attention(query, key, value, blocks, kernel=CPU_FLASH)
    assert out.shape == (1, tokens, 4, HEAD_DIM)
    assert out.is_contiguous()


def test_the_kernel_follows_device_type_and_size_of_heads() -> None:
    assert kernel_for(torch.zeros(1, 1, 1, 7, dtype=torch.float64)) is CPU_FLASH
    assert kernel_for(torch.zeros(1, 1, 1, 8, device="meta")) is TILED


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(CUDA_FLASH, torch.bfloat16), (CUDA_EFFICIENT, torch.float32)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_kernels_for_cuda_are_called_as_torch_declares_them(
    kernel: Kernel, dtype: torch.dtype
) -> None:
    """Without a device, torch still checks the arguments and infers the shapes."""
    blocks, tokens = blocks_of(40, [10, 12], last=False)
    given = [x.to("meta") for x in tensors((4, 2), blocks, tokens, dtype)]
    found = with_gradients("by blocks", given, blocks, kernel)
    assert [x.shape for x in found] == [given[3].shape, *(x.shape for x in given[:3])]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (CUDA_FLASH, torch.bfloat16),
        (CUDA_FLASH, torch.float16),
        (CUDA_EFFICIENT, torch.float32),
        (CUDA_EFFICIENT, torch.float16),
        (TILED, torch.float64),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("last", [False, True])
def test_kernels_for_cuda_equal_attention_with_a_mask(
    kernel: Kernel, dtype: torch.dtype, last: bool
) -> None:
    blocks, tokens = blocks_of(700, [530, 300, 45], last=last)
    given = [x.cuda() for x in tensors((8, 2), blocks, tokens, dtype, head_dim=64)]
    found = with_gradients("by blocks", given, blocks, kernel)
    exact = with_gradients("masked", [x.double() for x in given], blocks, kernel)
    assert_close(found, exact, 1e-5 if dtype in (torch.float32, torch.float64) else 0.02)
