"""Keys and values in two parts: those of a prefix, held once, and those of each row's own tokens.

`RowBatch` gives the most likely next tokens of rows that share a prefix; `decoding` asks for them,
`grouping` chooses the rows, `shared_llama` runs the layers.

Letters in names of shapes: B rows, N new tokens of a row, L columns of the cache, T tokens of a
stream of rows, H heads, K heads of keys and values, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from tinyagent_fast.shared_prefix.shared_llama import (
    LayerRunner,
    causal_attention,
    cpu_attention,
    joined,
)

if TYPE_CHECKING:
    from torch import Tensor

_STREAM_TOKENS = {"cpu": 4096}
"""Tokens whose rows are prefilled together, by device; more would only need more memory."""
_STREAM_TOKENS_ELSEWHERE = 16384


@dataclass(frozen=True)
class Prefix:
    """The keys and values of tokens that several prompts begin with, one pair a layer."""

    tokens: int
    keys_1KTD: tuple[Tensor, ...] = ()
    values_1KTD: tuple[Tensor, ...] = ()

    def layer(self, at: int) -> tuple[Tensor, Tensor] | None:
        """Give a layer's keys and values.

        Args:
            at: Which layer.

        Returns:
            Both, or none for an empty prefix.
        """
        return (self.keys_1KTD[at], self.values_1KTD[at]) if self.tokens else None

    def first(self, tokens: int) -> Prefix:
        """Give the beginning.

        Args:
            tokens: Of how many tokens.

        Returns:
            A prefix of so many tokens, or of all if there are fewer.
        """
        if tokens >= self.tokens:
            return self
        keys, values = (
            tuple(x[:, :, :tokens] for x in layers) if tokens else ()
            for layers in (self.keys_1KTD, self.values_1KTD)
        )
        return Prefix(tokens, keys, values)


def compute_prefix(llama: LayerRunner, ids: Sequence[int], *, behind: Prefix = Prefix(0)) -> Prefix:
    """Compute the keys and values of tokens that several prompts begin with.

    Args:
        llama: The model.
        ids: The tokens.
        behind: What stands before them.

    Returns:
        Both together, which is what `RowBatch` attends to.
    """
    import torch

    if not ids:
        return behind
    through = _PrefixPass(llama, behind)
    positions = torch.arange(len(ids), device=llama.device)
    llama.run(
        torch.tensor(ids, device=llama.device),
        positions + behind.tokens,
        through,
        positions[:0],
    )
    return Prefix(behind.tokens + len(ids), tuple(through.keys), tuple(through.values))


class RowBatch:
    """Rows that are decoded together behind one prefix; rows that are done leave it."""

    def __init__(
        self,
        llama: LayerRunner,
        prefix: Prefix,
        suffixes: Sequence[Sequence[int]],
        *,
        room_tokens: int,
    ) -> None:
        """Run the prompts' own tokens.

        Args:
            llama: The model.
            prefix: What all prompts begin with.
            suffixes: What follows it in each prompt, a token or more.
            room_tokens: How many tokens a row may be given in `step`, guesses included.
        """
        self.llama = llama
        self.prefix = prefix
        self.lengths = [len(suffix) for suffix in suffixes]
        self.columns = max(self.lengths) + room_tokens
        self.keys_BKTD: list[Tensor] = []
        self.values_BKTD: list[Tensor] = []
        self.next_ids = self._prefill(suffixes)
        """The token that follows each prompt."""

    def __len__(self) -> int:
        return len(self.lengths)

    def _prefill(self, suffixes: Sequence[Sequence[int]]) -> list[int]:
        import torch

        most = _STREAM_TOKENS.get(self.llama.device.type, _STREAM_TOKENS_ELSEWHERE)
        first, hidden = 0, []
        while first < len(suffixes):
            end = first + 1
            while end < len(suffixes) and sum(self.lengths[first : end + 1]) <= most:
                end += 1
            hidden.append(self._prefill_rows(first, suffixes[first:end]))
            first = end
        return self.llama.most_likely(torch.cat(hidden))

    def _prefill_rows(self, first: int, suffixes: Sequence[Sequence[int]]) -> Tensor:
        import torch

        device = self.llama.device
        ids = torch.tensor([token for suffix in suffixes for token in suffix], device=device)
        positions = torch.cat([torch.arange(len(suffix), device=device) for suffix in suffixes])
        through = _PrefillPass(self, first, [len(suffix) for suffix in suffixes])
        return self.llama.run(ids, positions + self.prefix.tokens, through, through.ends - 1)

    def step(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Run new tokens of every row; `keep` says afterwards how many of them stay.

        Args:
            tokens: One or more for each row.

        Returns:
            For each of them the token that follows it.
        """
        import torch

        width = max(map(len, tokens))
        filled = [[*row, *[0] * (width - len(row))] for row in tokens]
        device = self.llama.device
        columns_BN = torch.tensor(self.lengths, device=device)[:, None]
        columns_BN = columns_BN + torch.arange(width, device=device)
        hidden = self.llama.run(
            torch.tensor(filled, device=device).flatten(),
            (columns_BN + self.prefix.tokens).flatten(),
            _StepPass(self, 0, columns_BN, max(self.lengths) + width),
        )
        ids = self.llama.most_likely(hidden)
        return [ids[at * width : at * width + len(row)] for at, row in enumerate(tokens)]

    def keep(self, row: int, count: int) -> None:
        """Keep the first tokens that the last `step` was given for a row, and forget the others.

        Args:
            row: Which.
            count: How many.
        """
        self.lengths[row] += count

    def drop(self, row: int) -> None:
        """Take a row out; the last row takes its place.

        Args:
            row: Which.
        """
        last = len(self.lengths) - 1
        used = self.lengths[last]
        if row != last:
            for stored in (*self.keys_BKTD, *self.values_BKTD):
                stored[row, :, :used] = stored[last, :, :used]
        self.lengths[row] = used
        self.lengths.pop()

    def as_prefix(self, row: int) -> Prefix:
        """Copy what is known of a row, for prompts that begin like it.

        Args:
            row: Which.

        Returns:
            The batch's prefix and the row's tokens.
        """
        import torch

        used = self.lengths[row]

        def whole(before: Sequence[Tensor], stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
            own = [x[row, None, :, :used] for x in stored]
            if not before:
                return tuple(x.clone() for x in own)
            return tuple(torch.cat(both, 2) for both in zip(before, own, strict=True))

        prefix = self.prefix
        keys = whole(prefix.keys_1KTD, self.keys_BKTD)
        values = whole(prefix.values_1KTD, self.values_BKTD)
        return Prefix(prefix.tokens + used, keys, values)

    def layer(self, at: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give a layer's keys and values, made when they are first asked for.

        Args:
            at: Which layer.
            like: Some keys, for their type and heads.

        Returns:
            Keys and values of all rows.
        """
        import torch

        if at == len(self.keys_BKTD):
            shape = (len(self), like.shape[-2], self.columns, like.shape[-1])
            for stored in (self.keys_BKTD, self.values_BKTD):
                # Zeros, since masked columns are multiplied too and must be no NaN.
                stored.append(torch.zeros(shape, dtype=like.dtype, device=like.device))
        return self.keys_BKTD[at], self.values_BKTD[at]


class _PrefixPass:
    """The prefix: causal in itself."""

    def __init__(self, llama: LayerRunner, behind: Prefix) -> None:
        self.llama = llama
        self.behind = behind
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def store(self, layer: int, keys_1TKD: Tensor, values_1TKD: Tensor) -> None:
        import torch

        before = self.behind.layer(layer)
        new = keys_1TKD.transpose(1, 2), values_1TKD.transpose(1, 2)
        for at, (stored, added) in enumerate(zip((self.keys, self.values), new, strict=True)):
            parts = [added] if before is None else [before[at], added]
            stored.append(torch.cat(parts, dim=2).contiguous())

    def attend(self, layer: int, queries_1THD: Tensor) -> Tensor:
        queries = queries_1THD.transpose(1, 2)
        read = causal_attention(queries, self.keys[layer], self.values[layer], self.llama.scale)
        return read.transpose(1, 2)


class _PrefillPass:
    """Whole suffixes, one behind the other: each sees the prefix and, causally, itself."""

    def __init__(self, rows: RowBatch, first: int, lengths: Sequence[int]) -> None:
        import torch

        self.rows = rows
        self.first = first
        lengths_B = torch.tensor(lengths, device=rows.llama.device)
        self.ends = lengths_B.cumsum(0)
        bounds = [0, *self.ends.tolist()]
        self.parts = [slice(start, end) for start, end in pairwise(bounds)]
        # In the last layer only the last token of each row asks, as in a step.
        self.last = _StepPass(rows, first, lengths_B[:, None] - 1, max(lengths))

    def store(self, layer: int, keys_1TKD: Tensor, values_1TKD: Tensor) -> None:
        new = keys_1TKD[0].transpose(0, 1), values_1TKD[0].transpose(0, 1)
        for stored, added in zip(self.rows.layer(layer, keys_1TKD), new, strict=True):
            for row, part in enumerate(self.parts, start=self.first):
                stored[row, :, : part.stop - part.start] = added[:, part]

    def attend(self, layer: int, queries_1THD: Tensor) -> Tensor:
        import torch

        if queries_1THD.shape[1] == len(self.parts):
            return self.last.attend(layer, queries_1THD)
        llama, before = self.rows.llama, self.rows.prefix.layer(layer)
        # Tokens of one head side by side: the kernel is slower over strides.
        queries = queries_1THD.transpose(1, 2).contiguous()
        keys, values = self.rows.layer(layer, queries_1THD)
        own = []
        for row, part in enumerate(self.parts, start=self.first):
            seen = part.stop - part.start
            own.append(
                (queries[:, :, part], keys[row, None, :, :seen], values[row, None, :, :seen])
            )
        if not llama.by_blocks:
            return torch.cat([_read_in_one(*part, before, llama.scale) for part in own], dim=1)
        found = [cpu_attention(*part, scale=llama.scale, causal=True) for part in own]
        read, lse = (
            torch.cat([x.transpose(1, 2) for x in each], dim=1) for each in zip(*found, strict=True)
        )
        if before is None:
            return read
        outside = cpu_attention(queries, *before, scale=llama.scale)
        return joined(read, lse, *(x.transpose(1, 2) for x in outside))


def _read_in_one(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    before: tuple[Tensor, Tensor] | None,
    scale: float,
) -> Tensor:
    """Attend from one row's tokens to the prefix and themselves, put into one tensor for it."""
    import torch

    if before is not None:
        keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
    return causal_attention(queries, keys, values, scale).transpose(1, 2)


class _StepPass:
    """A few tokens of every row: each sees the prefix and the row's columns up to its own."""

    def __init__(self, rows: RowBatch, first: int, columns_BN: Tensor, seen: int) -> None:
        import torch

        self.rows = rows
        self.row_B = slice(first, first + len(columns_BN))
        self.columns_BN = columns_BN
        self.seen = seen
        """Columns that hold tokens of any row."""
        hidden_BNL = torch.arange(seen, device=columns_BN.device) > columns_BN[..., None]
        self.hidden_BNL = hidden_BNL if bool(hidden_BNL.any()) else None
        self.mask: Tensor | None = None

    def store(self, layer: int, keys_1TKD: Tensor, values_1TKD: Tensor) -> None:
        import torch

        shape = self.columns_BN.shape
        row_B1 = torch.arange(shape[0], device=self.columns_BN.device)[:, None]
        new = [x.view(*shape, *x.shape[2:]) for x in (keys_1TKD, values_1TKD)]
        for stored, added in zip(self.rows.layer(layer, keys_1TKD), new, strict=True):
            stored[row_B1, :, self.columns_BN] = added

    def attend(self, layer: int, queries_1THD: Tensor) -> Tensor:
        llama, prefix = self.rows.llama, self.rows.prefix
        keys, values = (x[self.row_B, :, : self.seen] for x in self.rows.layer(layer, queries_1THD))
        count, width = self.columns_BN.shape
        heads = keys.shape[1]
        # Queries that share a head of keys stand together, so that no keys are copied.
        queries = queries_1THD.view(count, width, heads, -1, llama.head_size)
        queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)
        read, lse = llama.attention(queries, keys, values, self._mask(queries))
        before = prefix.layer(layer)
        if before is not None:
            together = queries.transpose(0, 1).flatten(1, 2)[None]
            outside = [
                x[0].reshape(heads, count, *queries.shape[2:3], *x.shape[3:]).transpose(0, 1)
                for x in llama.attention(together, *before)
            ]
            read = joined(read, lse, *outside)
        read = read.reshape(count, heads, -1, width, llama.head_size).permute(0, 3, 1, 2, 4)
        return read.reshape(1, count * width, -1, llama.head_size)

    def _mask(self, queries_BKQD: Tensor) -> Tensor | None:
        """Hide what stands behind each token; a row of one token has one mask for all heads."""
        import torch

        if self.hidden_BNL is None:
            return None
        if self.mask is None:
            width = self.columns_BN.shape[1]
            hidden = self.hidden_BNL[:, None]
            if width > 1:
                hidden = hidden.repeat(1, 1, queries_BKQD.shape[2] // width, 1)
            self.mask = torch.zeros_like(hidden, dtype=queries_BKQD.dtype)
            self.mask.masked_fill_(hidden, float("-inf"))
        return self.mask
