"""Rows as one packed: every row can be read back, and every query attends what its row has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.errors import DataError
from tinyagent_fast.shared_prefix.packing import Block, PackedSequence, pack, pack_step

IGNORED = -100


def row(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    return {
        "input_ids": [*prompt, *completion],
        "labels": [*[IGNORED] * len(prompt), *completion],
    }


@st.composite
def batches(draw: st.DrawFn) -> list[dict[str, list[int]]]:
    """Rows of few different tokens, so that they agree here and there, and some wholly."""
    token = st.integers(0, 2)
    stem = draw(st.lists(token, max_size=30))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        ids = stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(token, max_size=12))
        ids += draw(st.lists(token, min_size=2, max_size=4))
        supervised = draw(st.sets(st.integers(1, len(ids) - 1), min_size=1, max_size=4))
        labels = [(3 + n if n in supervised else IGNORED) for n in range(len(ids))]
        rows.append({"input_ids": ids, "labels": labels})
    if draw(st.booleans()):
        rows.append(dict(rows[0]))
    return rows


def seen_by(blocks: tuple[Block, ...], query: int) -> list[int]:
    """Give the keys that a query attends, in the order of the packed."""
    keys: list[int] = []
    for block in blocks:
        if block.query_start <= query < block.query_stop:
            stop = block.key_stop
            if block.causal:
                stop = block.key_start + query - block.query_start + 1
            keys += range(block.key_start, stop)
    assert len(keys) == len(set(keys)), "no key counts twice"
    return sorted(keys)


def predictions(packed: PackedSequence) -> list[tuple[tuple[int, ...], int]]:
    """Give what each target's position sees, itself included, and the target."""
    found = []
    for at, target in zip(
        packed.target_positions.tolist(), packed.target_ids.tolist(), strict=True
    ):
        keys = seen_by(packed.last_blocks, at)
        assert keys[-1] == packed.last_positions[at]
        assert packed.position_ids[keys].tolist() == list(range(len(keys)))
        found.append((tuple(packed.input_ids[keys].tolist()), target))
    return sorted(found)


def expected(rows: list[dict[str, list[int]]]) -> list[tuple[tuple[int, ...], int]]:
    return sorted(
        (tuple(r["input_ids"][:n]), label)
        for r in rows
        for n, label in enumerate(r["labels"])
        if n and label != IGNORED
    )


@given(rows=batches(), smallest=st.sampled_from([None, 1, 2, 5, 32]))
@settings(deadline=None, max_examples=150)
def test_every_target_is_predicted_from_exactly_its_own_row(
    rows: list[dict[str, list[int]]], smallest: int | None
) -> None:
    packed = pack(rows, smallest_shared_tokens=smallest)
    assert predictions(packed) == expected(rows)


@given(rows=batches(), smallest=st.sampled_from([None, 1, 3]))
@settings(deadline=None, max_examples=100)
def test_every_token_attends_the_beginning_of_its_row_up_to_itself(
    rows: list[dict[str, list[int]]], smallest: int | None
) -> None:
    packed = pack(rows, smallest_shared_tokens=smallest)
    beginnings = {tuple(r["input_ids"][:n]) for r in rows for n in range(len(r["input_ids"]) + 1)}
    for at, position in enumerate(packed.position_ids.tolist()):
        keys = seen_by(packed.blocks, at)
        assert keys[-1] == at
        assert packed.position_ids[keys].tolist() == list(range(position + 1))
        assert tuple(packed.input_ids[keys].tolist()) in beginnings


@given(rows=batches(), smallest=st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=100)
def test_every_query_is_written_by_one_causal_block_before_others_add_to_it(
    rows: list[dict[str, list[int]]], smallest: int
) -> None:
    packed = pack(rows, smallest_shared_tokens=smallest)
    for blocks, queries in (
        (packed.blocks, packed.computed_tokens),
        (packed.last_blocks, len(packed.last_positions)),
    ):
        written = [q for b in blocks if b.causal for q in range(b.query_start, b.query_stop)]
        assert sorted(written) == list(range(queries))
        assert [b.causal for b in blocks] == sorted((b.causal for b in blocks), reverse=True)
        for block in blocks:
            assert block.query_start < block.query_stop
            assert block.key_start < block.key_stop


@given(rows=batches())
@settings(deadline=None, max_examples=100)
def test_sharing_never_adds_tokens_and_what_it_saves_is_counted(
    rows: list[dict[str, list[int]]],
) -> None:
    alone = pack(rows, smallest_shared_tokens=None)
    shared = pack(rows, smallest_shared_tokens=1)
    assert shared.computed_tokens <= alone.computed_tokens <= alone.plain_tokens
    assert alone.prefix_tokens == 0
    assert shared.plain_tokens == len(rows) * max(len(r["input_ids"]) for r in rows)
    assert shared.supervised_tokens == len(expected(rows))


def test_the_prefix_ends_one_token_before_the_first_difference() -> None:
    stem = list(range(100, 150))
    rows = [row([*stem, 1, 7], [8, 9]), row([*stem, 2, 7, 7], [8, 9])]
    packed = pack(rows)
    assert packed.prefix_tokens == 49
    # The last token of a row predicts nothing, so it is not computed.
    assert packed.input_ids.tolist() == [*stem[:49], stem[49], 1, 7, 8, stem[49], 2, 7, 7, 8]
    assert packed.computed_tokens == 49 + 4 + 5
    assert packed.plain_tokens == 2 * 55


def test_the_prefix_ends_one_token_before_the_first_supervised_token() -> None:
    prompt = list(range(40))
    packed = pack([row(prompt, [1, 2, 3]), row(prompt, [1, 2, 4])])
    assert packed.prefix_tokens == 39
    assert packed.computed_tokens == 39 + 3 + 3


def test_rows_that_are_the_same_count_twice() -> None:
    one = row(list(range(40)), [1, 2])
    packed = pack([one, one])
    assert packed.supervised_tokens == 4
    assert packed.computed_tokens == 39 + 2 * 2


def test_what_only_some_rows_share_is_computed_once_too() -> None:
    stem, branch = list(range(40)), list(range(50, 90))
    rows = [row([*stem, *branch, n], [5, 6]) for n in range(3)] + [row([*stem, 99], [5, 6])]
    packed = pack(rows)
    assert packed.prefix_tokens == 39
    # The branch begins with the last token of the stem and is cut one token early itself.
    assert packed.computed_tokens == 39 + 40 + 3 * 3 + 3
    assert len([b for b in packed.blocks if not b.causal]) == 2


def test_families_with_nothing_in_common_are_shared_each_for_itself() -> None:
    families = [list(range(40)), list(range(60, 100))]
    rows = [row([*family, 7, n], [1, 2]) for family in families for n in range(2)]
    packed = pack(rows)
    assert packed.prefix_tokens == 0
    assert packed.computed_tokens == 2 * 40 + 4 * 3


def test_short_beginnings_are_repeated_rather_than_shared() -> None:
    rows = [row([*range(31), n], [1, 2]) for n in range(3)]
    assert pack(rows).prefix_tokens == 0
    assert pack(rows, smallest_shared_tokens=30).prefix_tokens == 30


def test_nothing_behind_the_last_supervised_token_is_computed() -> None:
    one: dict[str, Any] = {"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORED, 2, 3, IGNORED, 5]}
    one["labels"][4] = IGNORED
    packed = pack([one])
    assert packed.input_ids.tolist() == [1, 2]
    assert packed.target_ids.tolist() == [2, 3]


def test_a_label_of_the_first_token_has_nothing_that_predicts_it() -> None:
    packed = pack([{"input_ids": [1, 2], "labels": [1, 2]}])
    assert packed.target_ids.tolist() == [2]


def test_a_row_without_supervised_tokens_is_refused() -> None:
    rows = [row([1, 2], [3]), {"input_ids": [1, 2], "labels": [1, IGNORED]}]
    with pytest.raises(DataError, match=r"row 1 .* no supervised token"):
        pack(rows)


def test_a_step_moves_with_all_its_tensors() -> None:
    import torch

    step = pack_step([row([1, 2], [3]), row([1, 2], [4])], 1, smallest_shared_tokens=1)
    moved = step.each(lambda tensor: tensor.to("meta"))
    tensors = [group.prefix_ids for group in moved.groups]
    for part in moved.parts:
        tensors += [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 1 + 2 * 5
    assert {tensor.device.type for tensor in tensors} == {"meta"}
