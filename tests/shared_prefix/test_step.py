"""An optimizer step in micro-batches behind one prefix has the gradients of its padded rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_shared_prefix_loss import (
    Rows,
    batches,
    gradients,
    llama,
    of_family,
    padded_loss,
    row,
    some_rows,
    with_adapter,
)

from tinyagent_fast.models.families import FAMILIES
from tinyagent_fast.shared_prefix.packing import PackedStep, pack, pack_step
from tinyagent_fast.shared_prefix.step import step_gradients


@pytest.fixture(scope="module")
def adapted() -> Any:
    return with_adapter(llama())


def pack_small(rows: Rows, most_rows: int, **options: Any) -> PackedStep:
    return pack_step(rows, most_rows, smallest_shared_tokens=4, **options)


def gradients_of(
    model: Any, step: PackedStep, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = step_gradients(model, step, **options)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss, found


def assert_same(
    model: Any, rows: Rows, step: PackedStep, *, loss: float, gradient: float, **options: Any
) -> None:
    wanted, wanted_gradients = gradients(model, lambda: padded_loss(model, rows))
    found, found_gradients = gradients_of(model, step, **options)
    assert not found.requires_grad
    assert abs(found - wanted) <= loss * wanted
    assert found_gradients.keys() == wanted_gradients.keys()
    largest = max(float(g.norm()) for g in wanted_gradients.values())
    for name, want in wanted_gradients.items():
        error = float((found_gradients[name] - want).norm())
        assert error <= gradient * (float(want.norm()) + 0.01 * largest), name


@given(
    rows=st.lists(batches(), min_size=1, max_size=3),
    most_rows=st.integers(1, 4),
    most_tokens=st.sampled_from([1, 60, 100, 10_000]),
    prefix_once=st.booleans(),
    kept_tokens=st.sampled_from([0, 50, 10_000]),
)
@settings(deadline=None, max_examples=60)
def test_loss_and_gradients_equal_those_of_padded_rows(
    adapted: Any,
    rows: list[Rows],
    most_rows: int,
    most_tokens: int,
    prefix_once: bool,
    kept_tokens: int,
) -> None:
    """However rows are cut into micro-batches, and whichever of these compute layers again."""
    flat = [one for some in rows for one in some]
    step = pack_small(flat, most_rows, most_tokens=most_tokens, prefix_once=prefix_once)
    assert_same(adapted, flat, step, loss=1e-6, gradient=1e-4, kept_tokens=kept_tokens)


@given(
    rows=batches(),
    most_rows=st.integers(1, 3),
    most_tokens=st.integers(1, 200),
    prefix_once=st.booleans(),
)
@example(
    # What the last two share behind what all share is too short to stand once.
    rows=[
        {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}
        for ids in ([0] * 51, [0] * 7, [*[0] * 7, 1, 0], [*[0] * 7, 1, 0], [0, 1, 0])
    ],
    most_rows=3,
    most_tokens=53,
    prefix_once=False,
)
@settings(deadline=None, max_examples=100)
def test_every_row_is_in_one_micro_batch_within_the_limits(
    rows: Rows, most_rows: int, most_tokens: int, prefix_once: bool
) -> None:
    step = pack_small(rows, most_rows, most_tokens=most_tokens, prefix_once=prefix_once)
    whole = pack(rows, smallest_shared_tokens=4)
    assert sorted(step_targets(step)) == sorted(whole.target_ids.tolist())
    assert step.supervised_tokens == whole.supervised_tokens
    assert whole.computed_tokens <= step.computed_tokens
    for part in step.parts:
        rows_in_it = sum(block.causal for block in part.last_blocks)
        assert 1 <= rows_in_it <= most_rows
        assert part.behind_tokens + part.computed_tokens <= most_tokens or rows_in_it == 1
    if not prefix_once:
        assert all(len(group.prefix_ids) == 0 for group in step.groups)


def step_targets(step: PackedStep) -> list[int]:
    return [target for part in step.parts for target in part.target_ids.tolist()]


def passes_of(model: Any, step: PackedStep, **options: Any) -> list[int]:
    """Give the tokens of each forward pass of a step, layers computed again included."""
    passes: list[int] = []
    norm = model.get_base_model().model.layers[1].input_layernorm
    hook = norm.register_forward_hook(lambda _, args, out: passes.append(out[..., 0].numel()))
    gradients_of(model, step, **options)
    hook.remove()
    return passes


def test_a_prefix_of_all_rows_is_computed_once_a_step(adapted: Any) -> None:
    step = pack_small(some_rows(suffixes=(9, 14, 5, 23, 8, 30)), 2)
    assert [len(group.parts) for group in step.groups] == [3]
    passes = passes_of(adapted, step)
    assert passes[0] == 39
    assert len(passes) == 4
    assert sum(passes) == step.computed_tokens == 39 + sum((9, 14, 5, 23, 8, 30))


def test_more_tokens_than_allowed_compute_layers_again(adapted: Any) -> None:
    step = pack_small(some_rows(suffixes=(9, 14)), 1)
    assert len(passes_of(adapted, step, kept_tokens=39 + 14)) == 3
    again = passes_of(adapted, step, kept_tokens=39 + 13)
    assert sorted(again) == [9, 14, 14, 39]


def test_rows_that_begin_in_two_ways_have_two_prefixes(adapted: Any) -> None:
    first, second = some_rows(40, (9, 8, 7, 6)), some_rows(50, (9, 8, 7, 6))
    for one in second:
        one["input_ids"][:3] = [1, 2, 3]
    mixed = [one for pair in zip(first, second, strict=True) for one in pair]
    step = pack_small(mixed, 2)
    assert sorted(len(group.prefix_ids) for group in step.groups) == [39, 49]
    assert step.computed_tokens == 39 + 49 + 2 * (9 + 8 + 7 + 6)
    assert_same(adapted, mixed, step, loss=1e-6, gradient=1e-4)


def test_a_longer_prefix_of_some_is_not_given_up_for_a_short_one_of_all() -> None:
    stem = some_rows(40, (1,))[0]["input_ids"]
    long = [row([*stem, n, n + 1, 2], 2) for n in range(4)]
    short = [row([*stem[:8], 60, n, 2], 2) for n in range(2)]
    step = pack_small([*short, *long], 2)
    assert sorted(len(group.prefix_ids) for group in step.groups) == [0, 40]


def test_a_step_of_one_micro_batch_is_one_packed_sequence() -> None:
    rows = some_rows()
    step = pack_small(rows, 8)
    assert len(step.parts) == 1
    assert step.computed_tokens == pack(rows, smallest_shared_tokens=4).computed_tokens


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_in_fp64_they_agree_to_what_norms_in_fp32_leave(kv_heads: int) -> None:
    model = with_adapter(llama(kv_heads=kv_heads)).double()
    step = pack_small(some_rows(), 2)
    assert_same(model, some_rows(), step, loss=2e-7, gradient=1e-6)


@pytest.mark.parametrize("model_type", [n for n in FAMILIES if not FAMILIES[n].whole_rows])
def test_every_family_is_exact(model_type: str) -> None:
    model = with_adapter(of_family(model_type)).double()
    step = pack_small(some_rows(), 2)
    assert_same(model, some_rows(), step, loss=2e-7, gradient=1e-6)


@pytest.mark.parametrize("kept_tokens", [0, 10_000])
def test_four_bit_bases_are_exact(four_bits: Any, kept_tokens: int) -> None:
    step = pack_small(some_rows(), 2)
    assert_same(four_bits, some_rows(), step, loss=1e-5, gradient=1e-3, kept_tokens=kept_tokens)


def test_in_half_precision_the_prefix_s_gradients_are_summed_in_fp32() -> None:
    """The error is no larger than that of one packed sequence of the same rows."""
    model = with_adapter(llama().to(torch.bfloat16))
    rows = some_rows(suffixes=tuple(range(6, 18)))

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    with autocast():
        wanted, plain = gradients(model, lambda: padded_loss(model, rows))
    found, in_parts = gradients_of(model, pack_small(rows, 1), autocast=autocast)
    _, at_once = gradients_of(model, pack_small(rows, 12), autocast=autocast)
    assert abs(found - wanted) < 0.02 * wanted

    def error(of: dict[str, torch.Tensor]) -> float:
        return max(float((of[n] - want).norm() / want.norm()) for n, want in plain.items())

    assert error(in_parts) < max(0.15, 1.5 * error(at_once))


def test_the_backward_pass_may_scale_the_loss(adapted: Any) -> None:
    step = pack_small(some_rows(), 2)
    loss, plain = gradients_of(adapted, step)
    same, scaled = gradients_of(adapted, step, backward=lambda x: (x * 1024).backward())
    assert torch.equal(loss, same)
    for name, want in plain.items():
        torch.testing.assert_close(scaled[name], want * 1024)


def test_the_sum_is_divided_by_the_items_that_are_given(adapted: Any) -> None:
    step = pack_small(some_rows(), 2)
    mean, _ = gradients_of(adapted, step)
    total, _ = gradients_of(adapted, step, num_items=48)
    torch.testing.assert_close(total * 48, mean * step.supervised_tokens)


def test_gradients_are_added_to_those_that_are_there(adapted: Any) -> None:
    step = pack_small(some_rows(), 2)
    _, once = gradients_of(adapted, step)
    adapted.zero_grad(set_to_none=True)
    step_gradients(adapted, step)
    step_gradients(adapted, step)
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * once[name])
    adapted.zero_grad(set_to_none=True)


def bits(found: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: gradient.numpy().tobytes() for name, gradient in found.items()}


@given(
    rows=st.lists(batches(), min_size=1, max_size=2),
    most_rows=st.integers(1, 3),
    prefix_once=st.booleans(),
    workers=st.integers(2, 4),
)
@settings(deadline=None, max_examples=30)
def test_micro_batches_at_once_change_no_digit(
    adapted: Any, rows: list[Rows], most_rows: int, prefix_once: bool, workers: int
) -> None:
    """Summed in their order, whichever ends first."""
    threads = torch.get_num_threads()
    flat = [one for some in rows for one in some]
    step = pack_small(flat, most_rows, prefix_once=prefix_once)
    torch.set_num_threads(1)  # as a worker has here: of an operation, threads may change digits
    try:
        loss, wanted = gradients_of(adapted, step)
        found, gradients_found = gradients_of(adapted, step, workers=workers)
        assert found == loss
        assert bits(gradients_found) == bits(wanted)
    finally:
        torch.set_num_threads(threads)


def test_workers_leave_the_threads_as_they_were(adapted: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        gradients_of(adapted, pack_small(some_rows(suffixes=(9, 14, 5)), 1), workers=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_failing_micro_batch_stops_the_step(adapted: Any) -> None:
    def fails() -> Any:
        raise RuntimeError("out of memory")

    step = pack_small(some_rows(suffixes=(9, 14, 5)), 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        step_gradients(adapted, step, workers=2, autocast=fails)
