"""Rows of a micro-batch become one packed sequence in which every shared prefix stands once.

The rows' token trie is written down depth first: `[prefix][suffix 1][suffix 2]..`, and where some
of the suffixes share a long beginning of their own, `[prefix][shared][suffix 1][suffix 2]..`. Each
segment attends itself causally and all its ancestors wholly, which is what every row alone would
do, so no row changes. `attention.py` computes that, `forward.py` the loss. Of an optimizer step's
rows, `pack_step` lets several micro-batches share one prefix, which `step.py` computes once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinyagent_fast.errors import DataError
from tinyagent_fast.prompts.tokens import IGNORED

if TYPE_CHECKING:
    import torch

SMALLEST_SHARED_TOKENS = 32
"""A shorter beginning is repeated: computing it again costs less than one more attention call."""


@dataclass(frozen=True)
class Block:
    """A range of queries that attends a range of keys, wholly or causally.

    A causal block is square: its first query attends its first key alone. Every query is in
    exactly one causal block, and in any number of others.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    causal: bool

    @property
    def queries(self) -> slice:
        """The range of queries."""
        return slice(self.query_start, self.query_stop)

    @property
    def keys(self) -> slice:
        """The range of keys."""
        return slice(self.key_start, self.key_stop)


@dataclass(frozen=True, kw_only=True)
class PackedSequence:
    """One micro-batch as a sequence of tokens, and where its losses are.

    The last layer is asked for `last_positions` only, so its queries are numbered anew: its blocks
    and the target positions count within them. Where a prefix is computed elsewhere, keys are
    numbered from its first one.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    blocks: tuple[Block, ...]
    last_positions: torch.Tensor
    last_blocks: tuple[Block, ...]
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    prefix_tokens: int
    """Tokens that all rows share; what only some of them share is not counted here."""
    plain_tokens: int
    """What a padded batch of the same rows computes."""
    longest_tokens: int
    """Tokens of the longest row; all positions are below."""
    behind_tokens: int = 0
    """Tokens before all rows that are computed elsewhere."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model computes for this micro-batch, those elsewhere apart."""
        return len(self.input_ids)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.target_ids)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedSequence:
        """Give the sequence with each of its tensors changed, as by a move to a device."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            last_positions=change(self.last_positions),
            target_positions=change(self.target_positions),
            target_ids=change(self.target_ids),
        )


@dataclass(frozen=True)
class PackedGroup:
    """Micro-batches whose rows all begin alike, or those that share nothing with others."""

    prefix_ids: torch.Tensor
    """The beginning that is computed once for all of them; none where each has its own."""
    parts: tuple[PackedSequence, ...]


@dataclass(frozen=True)
class PackedStep:
    """The rows of an optimizer step, as micro-batches that are computed one after another."""

    groups: tuple[PackedGroup, ...]

    @property
    def parts(self) -> list[PackedSequence]:
        """All micro-batches."""
        return [part for group in self.groups for part in group.parts]

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model computes for this step."""
        prefixes = sum(len(group.prefix_ids) for group in self.groups)
        return prefixes + sum(part.computed_tokens for part in self.parts)

    @property
    def largest_tokens(self) -> int:
        """Tokens of the largest micro-batch and its prefix, whose activations are there at once."""
        return max(part.behind_tokens + part.computed_tokens for part in self.parts)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(part.supervised_tokens for part in self.parts)

    def pin_memory(self) -> PackedStep:
        """Give the step in memory that a GPU reads by itself; a data loader asks for this."""
        return self.each(lambda tensor: tensor.pin_memory())

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedStep:
        """Give the step with each of its tensors changed, as by a move to a device."""
        groups = (
            PackedGroup(change(group.prefix_ids), tuple(part.each(change) for part in group.parts))
            for group in self.groups
        )
        return PackedStep(tuple(groups))


_Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Row:
    """What is computed of a row: nothing behind its last supervised token feeds the loss."""

    ids: _Ids
    predicting: _Ids
    """Indices of the tokens that predict a supervised one."""
    targets: _Ids
    """The ids that they predict."""
    tokens: int
    """Of the whole row."""

    @property
    def in_order(self) -> bytes:
        """Bytes that compare as the ids do."""
        return self.ids.astype(">i8").tobytes()


@dataclass
class _Draft:
    """The sequence while segments are appended to it."""

    rows: Sequence[_Row]
    shares: Sequence[int]
    smallest: int
    ids: list[_Ids] = field(default_factory=list)
    positions: list[_Ids] = field(default_factory=list)
    tokens: int = 0
    blocks: list[Block] = field(default_factory=list)
    last: list[_Ids] = field(default_factory=list)
    last_tokens: int = 0
    last_blocks: list[Block] = field(default_factory=list)
    predicting: list[_Ids] = field(default_factory=list)

    def place(self, first: int, stop: int, depth: int) -> None:
        """Append rows first..stop, of which `depth` tokens are in the sequence already."""
        start = first
        for row in range(first, stop):
            if row + 1 < stop and self.shares[row] - depth >= self.smallest:
                continue
            if row == start:
                self._append_suffix(self.rows[row], depth)
            else:
                self._append_shared(start, row + 1, depth)
            start = row + 1

    def _append_shared(self, first: int, stop: int, depth: int) -> None:
        """Append what rows first..stop share, then what they do not."""
        shared = min(self.shares[first : stop - 1])
        start, end = self._append(self.rows[first].ids, depth, shared)
        last_before = self.last_tokens
        self.place(first, stop, shared)
        self.blocks.append(Block(end, self.tokens, start, end, causal=False))
        self.last_blocks.append(Block(last_before, self.last_tokens, start, end, causal=False))

    def _append_suffix(self, row: _Row, depth: int) -> None:
        """Append what is left of one row, with its targets."""
        start, end = self._append(row.ids, depth, len(row.ids))
        first = int(row.predicting[0])
        tail, before = start + first - depth, self.last_tokens
        self.last.append(np.arange(tail, end))
        self.last_tokens += end - tail
        self.last_blocks.append(Block(before, self.last_tokens, tail, end, causal=True))
        if tail > start:
            self.last_blocks.append(Block(before, self.last_tokens, start, tail, causal=False))
        self.predicting.append(row.predicting - first + before)

    def _append(self, ids: _Ids, depth: int, stop: int) -> tuple[int, int]:
        start = self.tokens
        self.ids.append(ids[depth:stop])
        self.positions.append(np.arange(depth, stop))
        self.tokens += stop - depth
        self.blocks.append(Block(start, self.tokens, start, self.tokens, causal=True))
        return start, self.tokens


def pack(
    rows: Sequence[Mapping[str, ArrayLike]],
    *,
    smallest_shared_tokens: int | None = SMALLEST_SHARED_TOKENS,
) -> PackedSequence:
    """Write the rows of a micro-batch as one packed sequence.

    A prefix is cut at least one token before the first token in which its rows differ and before
    the first supervised one, so that each row predicts its own targets from its own tokens.

    Args:
        rows: With input_ids and labels; the order does not matter, as losses are summed.
        smallest_shared_tokens: A shorter beginning is repeated; None shares nothing at all.

    Returns:
        The sequence, on the CPU.

    Raises:
        DataError: A row has no supervised token.
    """
    kept = sorted((_row(row, at) for at, row in enumerate(rows)), key=lambda row: row.in_order)
    return _packed(kept, _shares(kept), smallest_shared_tokens)


def _packed(
    rows: Sequence[_Row], shares: Sequence[int], smallest: int | None, behind_tokens: int = 0
) -> PackedSequence:
    """Write ordered rows, of which each shares so many tokens with the next, as one sequence.

    The first `behind_tokens`, shared by all rows, are left out and attended elsewhere.
    """
    import torch

    if smallest is None:
        shares = [0] * len(shares)
    draft = _Draft(rows, shares, max(1, smallest or 1))
    draft.place(0, len(rows), behind_tokens)
    common, longest = min(shares, default=0), max(row.tokens for row in rows)

    def joined(parts: list[_Ids]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts))

    return PackedSequence(
        input_ids=joined(draft.ids),
        position_ids=joined(draft.positions),
        blocks=_behind(draft.blocks, draft.tokens, behind_tokens),
        last_positions=joined(draft.last),
        last_blocks=_behind(draft.last_blocks, draft.last_tokens, behind_tokens),
        target_positions=joined(draft.predicting),
        target_ids=joined([row.targets for row in rows]),
        prefix_tokens=common if common >= draft.smallest else 0,
        plain_tokens=longest * len(rows),
        longest_tokens=longest,
        behind_tokens=behind_tokens,
    )


def pack_step(
    rows: Sequence[Mapping[str, ArrayLike]],
    most_rows: int,
    *,
    most_tokens: float = math.inf,
    prefix_once: bool = True,
    smallest_shared_tokens: int = SMALLEST_SHARED_TOKENS,
) -> PackedStep:
    """Cut the rows of an optimizer step into micro-batches, those that begin alike together.

    Which rows meet in a micro-batch changes nothing, as gradients are summed over the step.

    Args:
        rows: With input_ids and labels, in any order.
        most_rows: Rows of a micro-batch.
        most_tokens: Tokens of a micro-batch with its prefix; only a longer row alone has more.
        prefix_once: Whether micro-batches share a prefix that is computed once for all of them.
        smallest_shared_tokens: A shorter beginning is repeated.

    Returns:
        The step, on the CPU.

    Raises:
        DataError: A row has no supervised token.
    """
    import torch

    kept = sorted((_row(row, at) for at, row in enumerate(rows)), key=lambda row: row.in_order)
    shares = _shares(kept)
    useful = [share if share >= smallest_shared_tokens else 0 for share in shares]
    groups: list[tuple[int, list[tuple[int, int]]]] = []

    def fits(part: tuple[int, int], prefix: int) -> bool:
        behind = _tokens(kept, shares, smallest_shared_tokens, part, prefix)
        return part[1] - part[0] == 1 or prefix + behind <= most_tokens

    for first, stop in _cut(kept, shares, smallest_shared_tokens, most_rows, most_tokens):
        shared = min(useful[first : stop - 1], default=_shared(kept[first], kept[first]))
        if groups and prefix_once:
            before, parts = groups[-1]
            joined = min(before, useful[first - 1], shared)
            together = [*parts, (first, stop)]
            # What the parts save so far, and what all would save by what they share.
            saves = joined and len(parts) * joined >= (len(parts) - 1) * before
            # Behind a shorter prefix, rows of a part can have too little in common to share it.
            if saves and all(fits(part, joined) for part in together):
                groups[-1] = (joined, together)
                continue
        groups.append((shared, [(first, stop)]))
    packed, apart = [], list[PackedSequence]()
    for shared, parts in groups:
        behind = shared if len(parts) > 1 else 0
        sequences = (
            _packed(kept[first:stop], shares[first : stop - 1], smallest_shared_tokens, behind)
            for first, stop in parts
        )
        if not behind:
            apart += sequences
            continue
        prefix = torch.from_numpy(kept[parts[0][0]].ids[:behind].copy())
        packed.append(PackedGroup(prefix, tuple(sequences)))
    if apart:
        packed.append(PackedGroup(torch.tensor([], dtype=torch.long), tuple(apart)))
    return PackedStep(tuple(packed))


def _cut(
    rows: list[_Row], shares: list[int], smallest: int, most_rows: int, most_tokens: float
) -> list[tuple[int, int]]:
    """Cut ordered rows into ranges of about as many rows, none of more tokens than allowed."""
    size = math.ceil(len(rows) / math.ceil(len(rows) / most_rows))
    ranges, start = [], 0
    for at in range(1, len(rows)):
        if at - start == size or _tokens(rows, shares, smallest, (start, at + 1)) > most_tokens:
            ranges.append((start, at))
            start = at
    return [*ranges, (start, len(rows))]


def _tokens(
    rows: Sequence[_Row],
    shares: Sequence[int],
    smallest: int,
    part: tuple[int, int],
    depth: int = 0,
) -> int:
    """Count the tokens of a part behind `depth` tokens, as `_Draft.place` will lay them out."""
    start, stop = part
    count = 0
    for row in range(start, stop):
        if row + 1 < stop and shares[row] - depth >= smallest:
            continue
        shared = min(shares[start:row], default=depth)
        if row == start:
            count += len(rows[row].ids) - depth
        else:
            inside = _tokens(rows, shares, smallest, (start, row + 1), shared)
            count += shared - depth + inside
        start = row + 1
    return count


def mean_shared_tokens(rows: Sequence[Mapping[str, Sequence[int]]], batch: int) -> float:
    """Count the tokens that stand once among several rows instead of once a row, on average.

    Args:
        rows: A sample of the training rows, with input_ids and labels.
        batch: How many rows share; those that begin alike come together.

    Returns:
        Their number; 0 with micro-batches of one row.
    """
    ordered = sorted(rows, key=lambda row: list(row["input_ids"]))
    groups = [ordered[at : at + batch] for at in range(0, len(ordered), batch)]
    repeated = sum(len(group) - 1 for group in groups)
    computed = sum(pack(group).computed_tokens for group in groups)
    return (sum(len(row["input_ids"]) for row in rows) - computed) / max(1, repeated)


def _behind(blocks: list[Block], queries: int, tokens: int) -> tuple[Block, ...]:
    """Put so many keys before all others, and order blocks.

    The first block of every query is the causal one, which writes; the others add to it.
    """
    if tokens:
        blocks = [
            replace(b, key_start=b.key_start + tokens, key_stop=b.key_stop + tokens) for b in blocks
        ]
        blocks.append(Block(0, queries, 0, tokens, causal=False))
    return tuple(sorted(blocks, key=lambda block: not block.causal))


def _row(row: Mapping[str, ArrayLike], at: int) -> _Row:
    ids, labels = (np.asarray(row[name], dtype=np.int64) for name in ("input_ids", "labels"))
    predicting = np.flatnonzero(labels[1:] != IGNORED)
    if not len(predicting):
        raise DataError(
            f"row {at} of a micro-batch has no supervised token",
            "it would be computed without teaching anything",
            "encode rows with `prompts.rows.encode_examples`, which supervises every completion",
        )
    end = int(predicting[-1]) + 1
    return _Row(ids[:end], predicting, labels[predicting + 1], len(ids))


def _shares(rows: Sequence[_Row]) -> list[int]:
    """Count the tokens that each row may share with the next."""
    return [_shared(a, b) for a, b in pairwise(rows)]


def _shared(a: _Row, b: _Row) -> int:
    size = min(len(a.ids), len(b.ids))
    other = np.flatnonzero(a.ids[:size] != b.ids[:size])
    same = int(other[0]) if len(other) else size
    return max(0, min(same - 1, int(a.predicting[0]), int(b.predicting[0])))
