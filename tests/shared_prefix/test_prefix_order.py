"""The order of rows: each once, reproducible, and with prefixes in common."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.shared_prefix.order import EpochOrder, prefix_grouped, prefix_pools
from tinyagent_fast.shared_prefix.packing import pack


def family(rng: random.Random, stem_tokens: int, rows: int) -> list[list[int]]:
    stem = [rng.randrange(50) for _ in range(stem_tokens)]
    return [stem + [rng.randrange(50) for _ in range(20 + rng.randrange(20))] for _ in range(rows)]


def micro_batches(order: EpochOrder) -> list[list[int]]:
    indices = list(order)
    return [indices[at : at + 8] for at in range(0, len(indices), 8)]


def computed(rows: list[list[int]], batches: list[list[int]]) -> int:
    def labelled(ids: list[int]) -> dict[str, list[int]]:
        return {"input_ids": ids, "labels": [*[-100] * (len(ids) - 1), ids[-1]]}

    return sum(pack([labelled(rows[n]) for n in batch]).computed_tokens for batch in batches)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=4),
    batch=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_row_comes_once_whatever_the_families(
    sizes: list[tuple[int, int]], batch: int, epoch: int
) -> None:
    rng = random.Random(len(sizes))
    rows = [ids for stem, count in sizes for ids in family(rng, stem, count)]
    order = prefix_grouped(rows, batch, seed=1)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(len(rows)))
    assert len(order) == len(rows)


def test_seed_and_epoch_decide_the_order() -> None:
    rows = family(random.Random(0), 100, 64)

    def order(seed: int, epoch: int) -> list[int]:
        made = prefix_grouped(rows, 8, seed)
        made.set_epoch(epoch)
        return list(made)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_rows_of_a_family_meet_different_rows_in_every_epoch() -> None:
    order = prefix_grouped(family(random.Random(0), 100, 64), 8, seed=0)
    first = {frozenset(batch) for batch in micro_batches(order)}
    order.set_epoch(1)
    assert not first & {frozenset(batch) for batch in micro_batches(order)}


def test_families_do_not_share_a_micro_batch_but_are_mixed_over_an_epoch() -> None:
    rng = random.Random(0)
    rows = family(rng, 300, 64) + family(rng, 150, 64)
    rng.shuffle(indices := list(range(len(rows))))
    order = prefix_grouped([rows[n] for n in indices], 8, seed=0)
    of_first = [[indices[n] < 64 for n in batch] for batch in micro_batches(order)]
    assert all(all(batch) or not any(batch) for batch in of_first)
    firsts = [batch[0] for batch in of_first]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


def test_what_is_left_of_the_families_comes_together_and_the_incomplete_batch_last() -> None:
    rng = random.Random(0)
    rows = family(rng, 300, 20) + family(rng, 300, 21)
    batches = micro_batches(prefix_grouped(rows, 8, seed=0))
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 1]
    mixed = [batch for batch in batches if len({n < 20 for n in batch}) == 2]
    assert len(mixed) == 1


def test_branches_of_a_family_are_kept_apart_only_where_that_saves_enough() -> None:
    rng = random.Random(0)
    stem = [rng.randrange(50) for _ in range(640)]
    long_branches = [stem + ids for _ in range(3) for ids in family(rng, 320, 24)]
    assert sorted(map(len, prefix_pools(long_branches, 8))) == [24, 24, 24]
    no_branches = [stem + ids for ids in family(rng, 0, 72)]
    assert [len(pool) for pool in prefix_pools(no_branches, 8)] == [72]


def test_long_branches_far_down_are_found_behind_short_ones() -> None:
    rng = random.Random(0)
    rows = [
        short + ids
        for short in ([1] * 32, [2] * 32)
        for _ in range(2)
        for ids in family(rng, 640, 24)
    ]
    assert sorted(map(len, prefix_pools(rows, 8))) == [24, 24, 24, 24]


def test_the_order_saves_tokens_against_a_random_one() -> None:
    rng = random.Random(0)
    rows = [ids for _ in range(4) for ids in family(rng, 200, 32)]
    rng.shuffle(rows)
    order = prefix_grouped(rows, 8, seed=0)
    plain = [list(range(at, at + 8)) for at in range(0, len(rows), 8)]
    assert computed(rows, micro_batches(order)) < 0.7 * computed(rows, plain)


def test_no_rows_give_an_empty_order() -> None:
    assert list(prefix_grouped([], 8, seed=0)) == []
