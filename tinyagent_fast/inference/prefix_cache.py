"""Keys and values in two parts: those of a prefix, held once, and those of each row's own tokens.

`RowBatch` gives the most likely next tokens of rows that share a prefix; `torch_engine` asks for
them, `grouping` chooses the rows, `shared_prefix` runs the layers and joins attention to the parts.

Letters in names of shapes: B rows, N new tokens of a row, L columns of the cache, T tokens of a
packed sequence, H heads, K heads of keys and values, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinyagent_fast.shared_prefix.attention import (
    join,
    kernel_for,
    packed_attention,
    rows_attention,
)
from tinyagent_fast.shared_prefix.forward import DecoderForward
from tinyagent_fast.shared_prefix.prefix import Prefix, blocks_behind

_PREFILL_TOKENS = {"cpu": 4096}
"""Tokens whose rows are prefilled together, by device; more would only need more memory."""
_PREFILL_TOKENS_ELSEWHERE = 16384


def best_of(logits_V: Tensor, allowed_V: np.ndarray) -> int:
    """Give the most likely token of a mask, which may be shorter or longer than the logits."""
    size = min(len(logits_V), len(allowed_V))
    hidden_V = torch.from_numpy(~allowed_V[:size]).to(logits_V.device)
    return int(logits_V[:size].masked_fill(hidden_V, float("-inf")).argmax())


class RowBatch:
    """Rows that are decoded together behind one prefix; rows that are done leave it."""

    def __init__(
        self,
        forward: DecoderForward,
        prefix: Prefix,
        suffixes: Sequence[Sequence[int]],
        *,
        room_tokens: int,
    ) -> None:
        """Run the prompts' own tokens.

        Args:
            forward: The model.
            prefix: What all prompts begin with.
            suffixes: What follows it in each prompt, a token or more.
            room_tokens: How many tokens a row may be given in `step`, guesses included.
        """
        self.forward = forward
        self.prefix = prefix
        self.lengths = [len(suffix) for suffix in suffixes]
        self.columns = max(self.lengths) + room_tokens
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values BKLD of each layer, made when a layer first runs."""
        self._logits_WV = torch.empty(0)
        """Those of the last tokens that were run, row by row."""
        self.next_ids = self._prefill(suffixes)
        """The token that follows each prompt."""

    def _prefill(self, suffixes: Sequence[Sequence[int]]) -> list[int]:
        most = _PREFILL_TOKENS.get(self.forward.device.type, _PREFILL_TOKENS_ELSEWHERE)
        first, hidden = 0, []
        while first < len(suffixes):
            end = first + 1
            while end < len(suffixes) and sum(self.lengths[first : end + 1]) <= most:
                end += 1
            hidden.append(self._prefill_rows(first, suffixes[first:end]))
            first = end
        return self._most_likely(torch.cat(hidden))

    def _most_likely(self, hidden_WE: Tensor) -> list[int]:
        """Give the token that each state makes most likely; of equals what `argmax` names."""
        self._logits_WV = self.forward.lm_head(hidden_WE[None])[0].float()
        ids: list[int] = self._logits_WV.argmax(-1).tolist()
        return ids

    def best_of(self, row: int, at: int, allowed_V: np.ndarray) -> int:
        """Give the most likely token of a mask behind a row's token `at` of those run last.

        No row may have been dropped since then.
        """
        width = len(self._logits_WV) // len(self.lengths)
        return best_of(self._logits_WV[row * width + at], allowed_V)

    def _prefill_rows(self, first: int, suffixes: Sequence[Sequence[int]]) -> Tensor:
        """Run whole suffixes, one behind the other, and give the states of their last tokens."""
        device, lengths = self.forward.device, [len(suffix) for suffix in suffixes]
        blocks = blocks_behind(lengths, self.prefix.tokens)
        lengths_B = torch.tensor(lengths, device=device)
        last_tokens = _NewTokens(self, first, lengths_B[:, None] - 1, max(lengths))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            for stored, new in zip(self._layer(layer, key), (key, value), strict=True):
                for row, part in enumerate(torch.split(new[0], lengths, dim=1), start=first):
                    stored[row, :, : part.shape[1]] = part
            if layer == len(self.forward.layers) - 1:
                return last_tokens.read(layer, query)
            both = self.prefix.followed_by(layer, key, value)
            return packed_attention(query, *both, blocks, kernel=kernel_for(query))

        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        return self.forward.hidden_states(
            torch.tensor([token for suffix in suffixes for token in suffix], device=device),
            positions + self.prefix.tokens,
            attend,
            wanted_W=lengths_B.cumsum(0) - 1,
            positions_end=self.prefix.tokens + max(lengths),
        )

    def step(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Run one new token or more of every row, and give the token that follows each.

        `keep` says afterwards how many of them stay.
        """
        width = max(map(len, tokens))
        filled = [[*row, *[0] * (width - len(row))] for row in tokens]
        device = self.forward.device
        columns_BN = torch.tensor(self.lengths, device=device)[:, None]
        columns_BN = columns_BN + torch.arange(width, device=device)
        new = _NewTokens(self, 0, columns_BN, max(self.lengths) + width)
        hidden = self.forward.hidden_states(
            torch.tensor(filled, device=device).flatten(),
            (columns_BN + self.prefix.tokens).flatten(),
            new.attend,
            positions_end=self.prefix.tokens + max(self.lengths) + width,
        )
        ids = self._most_likely(hidden)
        return [ids[at * width : at * width + len(row)] for at, row in enumerate(tokens)]

    def keep(self, row: int, count: int) -> None:
        """Keep the first tokens that the last `step` was given for a row, and forget the others."""
        self.lengths[row] += count

    def drop(self, row: int) -> None:
        """Take a row out; the last row takes its place."""
        last = len(self.lengths) - 1
        used = self.lengths[last]
        if row != last:
            for stored in (stored for layer in self.layers for stored in layer):
                stored[row, :, :used] = stored[last, :, :used]
        self.lengths[row] = used
        self.lengths.pop()

    def as_prefix(self, row: int) -> Prefix:
        """Copy the batch's prefix and a row's tokens, for prompts that begin like it."""
        used = self.lengths[row]
        layers = [
            self.prefix.followed_by(at, *(stored[row, None, :, :used] for stored in layer))
            for at, layer in enumerate(self.layers)
        ]
        return Prefix(self.prefix.tokens + used, tuple(layers))

    def _layer(self, at: int, like_1KTD: Tensor) -> tuple[Tensor, Tensor]:
        if at == len(self.layers):
            _, heads, _, size = like_1KTD.shape
            shape = (len(self.lengths), heads, self.columns, size)
            # Zeros, since masked columns are multiplied too and must be no NaN.
            self.layers.append((like_1KTD.new_zeros(shape), like_1KTD.new_zeros(shape)))
        return self.layers[at]


class _NewTokens:
    """A few tokens of every row: each sees the prefix and the row's columns up to its own."""

    def __init__(self, batch: RowBatch, first: int, columns_BN: Tensor, seen: int) -> None:
        self.batch = batch
        self.rows = slice(first, first + len(columns_BN))
        self.columns_BN = columns_BN
        self.seen = seen
        """Columns that hold tokens of any row."""
        hidden_BNL = torch.arange(seen, device=columns_BN.device) > columns_BN[..., None]
        self.hidden_BNL = hidden_BNL if bool(hidden_BNL.any()) else None
        self.mask: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the keys and values of the tokens and let these read."""
        count, width = self.columns_BN.shape
        row_B1 = torch.arange(count, device=self.columns_BN.device)[:, None]
        for stored, new in zip(self.batch._layer(layer, key), (key, value), strict=True):
            heads, _, size = new.shape[1:]
            stored[row_B1, :, self.columns_BN] = (
                new[0].transpose(0, 1).view(count, width, heads, size)
            )
        return self.read(layer, query)

    def read(self, layer: int, query_1HTD: Tensor) -> Tensor:
        """Let the tokens read what is stored."""
        keys, values = (x[self.rows, :, : self.seen] for x in self.batch.layers[layer])
        count, width = self.columns_BN.shape
        heads, size = keys.shape[1], keys.shape[3]
        # Queries that share a head of keys stand together, so that no keys are copied.
        query = query_1HTD.view(heads, -1, count, width, size).permute(2, 0, 1, 3, 4).flatten(2, 3)
        out, total = rows_attention(query, keys, values, self._mask(query))
        if self.batch.prefix.tokens:
            together = query.transpose(0, 1).flatten(1, 2)[None]
            outside, outside_total = (
                x.view(heads, count, *query.shape[2:3], *x.shape[3:]).transpose(0, 1)
                for x in rows_attention(together, *self.batch.prefix.layers[layer])
            )
            join(out, total, outside, outside_total)
        out = out.view(count, heads, -1, width, size).permute(0, 3, 1, 2, 4)
        return out.reshape(1, count * width, -1, size).to(query.dtype)

    def _mask(self, query_BKQD: Tensor) -> Tensor | None:
        """Hide what stands behind each token; a row of one token has one mask for all heads."""
        if self.hidden_BNL is None:
            return None
        if self.mask is None:
            width = self.columns_BN.shape[1]
            hidden = self.hidden_BNL[:, None]
            if width > 1:
                hidden = hidden.repeat(1, 1, query_BKQD.shape[2] // width, 1)
            self.mask = torch.zeros_like(hidden, dtype=query_BKQD.dtype)
            self.mask.masked_fill_(hidden, float("-inf"))
        return self.mask
