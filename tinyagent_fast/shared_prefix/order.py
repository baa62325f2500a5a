"""Which rows meet: those whose beginnings or lengths agree, in a new order every epoch.

By beginnings, rows are put into pools along their token trie. A pool is split into those of its
branches only where that saves a noticeable share of its tokens, so that within a pool, rows meet at
random.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tinyagent_fast.shared_prefix.packing import SMALLEST_SHARED_TOKENS

Shuffled = Callable[[int], list[int]]
"""Gives so many numbers from 0 in an order by chance."""

_SMALLEST_SAVING = 0.02
"""Of a pool's tokens: less is not worth that the same rows meet more often."""


@dataclass(frozen=True)
class _Beginnings:
    """What the trie is made from: of each row a checksum of every chunk and all before it."""

    checksums: list[array[int]]
    lengths: list[int]
    batch: int

    def pools(self, members: list[int], depth: int) -> tuple[list[list[int]], float]:
        """Split rows that agree in `depth` chunks; give the pools and the tokens that they save."""
        branches = self._branches(members, depth)
        while len(branches) == 1 and None not in branches:
            depth += 1
            branches = self._branches(members, depth)
        pools: list[list[int]] = []
        saved = 0.0
        rest = branches.pop(None, [])
        for branch in branches.values():
            # Of a smaller branch, the same rows would meet in every epoch.
            if len(branch) < 2 * self.batch:
                rest += branch
                continue
            below, saved_below = self.pools(branch, depth + 1)
            pools += below
            saved += saved_below + self._saved(branch, self._agreed(branch, depth + 1) - depth)
        if saved < _SMALLEST_SAVING * sum(self.lengths[row] for row in members):
            return [members], 0.0
        return [*pools, rest] if rest else pools, saved

    def _branches(self, members: list[int], depth: int) -> dict[int | None, list[int]]:
        """Group rows by their next chunk; those that have none are under None."""
        branches: dict[int | None, list[int]] = {}
        for row in members:
            checksums = self.checksums[row]
            key = checksums[depth] if depth < len(checksums) else None
            branches.setdefault(key, []).append(row)
        return branches

    def _agreed(self, members: list[int], depth: int) -> int:
        """Count the chunks in which rows agree, of which `depth` are known."""
        first = self.checksums[members[0]]
        while depth < len(first) and all(
            len(self.checksums[row]) > depth and self.checksums[row][depth] == first[depth]
            for row in members
        ):
            depth += 1
        return depth

    def _saved(self, members: list[int], chunks: int) -> float:
        """Count the tokens saved if batches share so many chunks more."""
        return len(members) * chunks * SMALLEST_SHARED_TOKENS * (1 - 1 / self.batch)


class EpochOrder:
    """Every row once, in an order that depends on seed and epoch alone, also in a resumed run."""

    def __init__(self, rows: int, seed: int, arrange: Callable[[Shuffled], Iterator[int]]) -> None:
        """Keep what makes an order of so many rows, with an epoch's shuffling."""
        self.rows, self.seed, self.arrange = rows, seed, arrange
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the rows."""
        return self.rows

    def __iter__(self) -> Iterator[int]:
        """Yield every row's index once."""
        import torch

        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)

        def shuffled(count: int) -> list[int]:
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            return order

        return self.arrange(shuffled)


def length_grouped(lengths: Sequence[int], group_rows: int, seed: int) -> EpochOrder:
    """Put rows of similar length together, as many as an optimizer step takes."""

    def arrange(shuffled: Shuffled) -> Iterator[int]:
        # Stable, so that rows of equal length come in another order in every epoch.
        order = sorted(shuffled(len(lengths)), key=lambda row: lengths[row] // 8)
        groups = _cut(order, group_rows)
        for at in shuffled(len(groups)):
            yield from groups[at]

    return EpochOrder(len(lengths), seed, arrange)


def prefix_grouped(rows: Iterable[Sequence[int]], batch: int, seed: int) -> EpochOrder:
    """Put rows that share long prefixes into micro-batches of `batch` rows.

    Micro-batches of all pools are mixed, so an optimizer step that accumulates several of them
    sees several kinds of rows. What is left of the pools comes together; an incomplete micro-batch
    comes last.

    Args:
        rows: Token ids of each row, which are read once.
        batch: Rows of a micro-batch.
        seed: With the epoch it decides the order.
    """
    pools = prefix_pools(rows, batch)

    def arrange(shuffled: Shuffled) -> Iterator[int]:
        batches: list[list[int]] = []
        left: list[int] = []
        for pool in pools:
            members = [pool[at] for at in shuffled(len(pool))]
            full = len(members) - len(members) % batch
            batches += _cut(members[:full], batch)
            left += members[full:]
        full = len(left) - len(left) % batch
        batches += _cut(left[:full], batch)
        for at in shuffled(len(batches)):
            yield from batches[at]
        yield from left[full:]

    return EpochOrder(sum(map(len, pools)), seed, arrange)


def prefix_pools(rows: Iterable[Sequence[int]], batch: int) -> list[list[int]]:
    """Group rows, as token ids, that shall meet in micro-batches of `batch` rows."""
    checksums, lengths = [], []
    for ids in rows:
        checksums.append(_checksums(ids))
        lengths.append(len(ids))
    pools, _ = _Beginnings(checksums, lengths, batch).pools(list(range(len(lengths))), 0)
    return pools


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _checksums(ids: Sequence[int]) -> array[int]:
    """Give a running checksum at the end of every whole chunk; what is left counts as different.

    Rows that agree by chance of 1 in 2^32 only meet in a micro-batch; nothing is computed from it.
    """
    data = array("q", ids).tobytes()
    size = SMALLEST_SHARED_TOKENS * 8
    found = array("L")
    running = 0
    for start in range(0, len(data) - size + 1, size):
        running = zlib.crc32(data[start : start + size], running)
        found.append(running)
    return found
