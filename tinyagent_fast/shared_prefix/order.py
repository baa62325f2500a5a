"""Which rows share a micro-batch: those whose beginnings agree, in a new order every epoch.

Rows are put into pools along their token trie. A pool is split into those of its branches only
where that saves a noticeable share of its tokens, so that within a pool, rows meet at random.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tinyagent_fast.shared_prefix.packing import SMALLEST_SHARED_TOKENS

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


class PrefixGroupedOrder:
    """Every row once, in micro-batches that share long prefixes, shuffled by seed and epoch.

    Micro-batches of all pools are mixed, so an optimizer step that accumulates several of them
    sees several kinds of rows. What is left of the pools comes together; an incomplete micro-batch
    comes last.
    """

    def __init__(self, rows: Iterable[Sequence[int]], batch: int, seed: int) -> None:
        """Sort rows into pools, which reads each of them once.

        Args:
            rows: Token ids of each row.
            batch: Rows of a micro-batch.
            seed: With the epoch it decides the order, also when training is resumed.
        """
        checksums, lengths = [], []
        for ids in rows:
            checksums.append(_checksums(ids))
            lengths.append(len(ids))
        self.rows = len(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = 0
        everything = list(range(self.rows))
        self.pools, _ = _Beginnings(checksums, lengths, batch).pools(everything, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the rows."""
        return self.rows

    def __iter__(self) -> Iterator[int]:
        """Yield every row's index once, one micro-batch after another."""
        import torch

        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)

        def shuffled(count: int) -> list[int]:
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            return order

        batches: list[list[int]] = []
        left: list[int] = []
        for pool in self.pools:
            members = [pool[at] for at in shuffled(len(pool))]
            full = len(members) - len(members) % self.batch
            batches += [members[at : at + self.batch] for at in range(0, full, self.batch)]
            left += members[full:]
        full = len(left) - len(left) % self.batch
        batches += [left[at : at + self.batch] for at in range(0, full, self.batch)]
        for at in shuffled(len(batches)):
            yield from batches[at]
        yield from left[full:]


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
