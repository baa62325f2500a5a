"""The keys and values of a prefix: computed once, and read by all that stands behind it.

Letters in names of shapes: T tokens, K heads of keys and values, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tinyagent_fast.shared_prefix.attention import kernel_for, packed_attention
from tinyagent_fast.shared_prefix.forward import DecoderForward
from tinyagent_fast.shared_prefix.packing import Block


@dataclass(frozen=True)
class Prefix:
    """The keys and values of tokens that several rows begin with, a pair 1KTD a layer."""

    tokens: int = 0
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    def followed_by(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values 1KTD of further tokens behind those of a layer."""
        if not self.tokens:
            return key.contiguous(), value.contiguous()
        keys, values = self.layers[layer]
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

    def first(self, tokens: int) -> Prefix:
        """Give the first tokens, or all if there are fewer."""
        if tokens >= self.tokens:
            return self
        return Prefix(tokens, tuple((k[:, :, :tokens], v[:, :, :tokens]) for k, v in self.layers))


NO_PREFIX = Prefix()


def compute_prefix(
    forward: DecoderForward, ids: Sequence[int] | Tensor, *, behind: Prefix = NO_PREFIX
) -> Prefix:
    """Compute the keys and values of tokens that several rows begin with.

    Args:
        forward: The model.
        ids: The tokens.
        behind: What stands before them; the result holds both.
    """
    if not len(ids):
        return behind
    blocks = blocks_behind([len(ids)], behind.tokens)
    layers: list[tuple[Tensor, Tensor]] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layers.append(behind.followed_by(layer, key, value))
        if layer == len(forward.layers) - 1:
            return query.transpose(1, 2)  # the state behind it is not used
        return packed_attention(query, *layers[layer], blocks, kernel=kernel_for(query))

    positions = torch.arange(len(ids), device=forward.device)
    forward.hidden_states(
        torch.as_tensor(ids, device=forward.device),
        positions + behind.tokens,
        attend,
        wanted_W=positions[-1:],
        positions_end=behind.tokens + len(ids),
    )
    return Prefix(behind.tokens + len(ids), tuple(layers))


def blocks_behind(lengths: Sequence[int], prefix_tokens: int) -> tuple[Block, ...]:
    """Let rows, one behind the other, attend themselves causally and a prefix wholly."""
    ends = list(accumulate(lengths))
    blocks = [
        Block(end - length, end, prefix_tokens + end - length, prefix_tokens + end, causal=True)
        for length, end in zip(lengths, ends, strict=True)
    ]
    if prefix_tokens:
        blocks.append(Block(0, ends[-1], 0, prefix_tokens, causal=False))
    return tuple(blocks)
