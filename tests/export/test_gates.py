"""The rules of an export: each passes on what is right and fails on what it is there for."""

from __future__ import annotations

import numpy as np
import pytest

from tinyagent_fast.evaluation.comparison import compare_plans
from tinyagent_fast.evaluation.scoring import Prediction, ScoredPlan, score_all
from tinyagent_fast.export import gates

PLAN = '1. get_email_address("Sid")\n2. join()'
OTHER = '1. get_phone_number("Sid")\n2. join()'


def logprobs(seed: int, noise: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(20, 50)) * 3 + noise * np.random.default_rng(9).normal(
        size=(20, 50)
    )
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def test_equal_answers_pass_and_say_their_figures() -> None:
    gate = gates.same_answers("a = b", "F32", (1.0, 1.00001), 2, [], 0.0)
    assert gate.passed
    assert "same plans 2 of 2" in gate.sentence()


def test_spelling_of_a_plan_does_not_count_but_its_calls_do() -> None:
    spelled = PLAN.replace('"', "'")
    assert gates.different_plans([PLAN, PLAN], [spelled, OTHER]) == [1]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("plans", [1, 2, 9, 16, 200])
def test_a_plan_may_part_at_a_near_tie_and_nowhere_else(dtype: str, plans: int) -> None:
    near = gates.same_answers("x", dtype, (1, 1), plans, [0.019], noise=0.01)
    assert near.passed
    assert near.figures["same plans"] == f"{plans - 1} of {plans}"
    assert "0.019" in near.sentence()
    assert not gates.same_answers("x", dtype, (1, 1), plans, [0.021], noise=0.01).passed
    assert not gates.same_answers("x", dtype, (1, 1), plans, [float("inf")], noise=0.01).passed
    # Even if no plan is the same.
    assert gates.same_answers("x", dtype, (1, 1), plans, [0.019] * plans, noise=0.01).passed


def test_models_that_are_far_apart_make_no_tie_of_what_is_none() -> None:
    for dtype, most in gates.MOST_TIE.items():
        assert gates.same_answers("x", dtype, (1, 1), 2, [0.9 * most], noise=15.0).passed
        assert not gates.same_answers("x", dtype, (1, 1), 2, [1.1 * most], noise=15.0).passed


def test_equal_models_may_part_by_the_order_of_their_sums() -> None:
    assert gates.same_answers("x", "F32", (1, 1), 2, [5e-5], noise=0.0).passed


@pytest.mark.parametrize(("dtype", "difference"), [("F32", 3e-4), ("F16", 5e-3), ("BF16", 2e-2)])
def test_another_loss_fails_by_what_the_dtype_allows(dtype: str, difference: float) -> None:
    assert not gates.same_answers("x", dtype, (1.0, 1.0 + difference), 1, [], 0.0).passed
    assert gates.same_answers("x", dtype, (1.0, 1.0 + difference / 10), 1, [], 0.0).passed


def test_one_different_id_fails_and_the_text_is_named() -> None:
    pairs = [("Hello", [1, 2], [1, 2]), (" Hello", [3, 2], [4, 2])]
    gate = gates.same_ids("ids", pairs, None)
    assert not gate.passed
    assert "' Hello'" in gate.sentence()
    assert gates.same_ids("ids", pairs[:1], None).passed


@pytest.mark.parametrize("ids", [[5, 6], [1, 1, 5], [5, 1]])
def test_bos_must_stand_once_and_first(ids: list[int]) -> None:
    assert not gates.same_ids("ids", [("x", ids, ids)], 1).passed
    assert gates.same_ids("ids", [("x", [1, 5], [1, 5])], 1).passed


def test_a_chat_template_may_begin_turns_with_bos_but_never_twice_at_the_beginning() -> None:
    turns, twice = [1, 5, 1, 6], [1, 1, 5]
    assert gates.same_ids("ids", [("x", turns, turns)], 1, begins_turns=True).passed
    assert not gates.same_ids("ids", [("x", turns, turns)], 1).passed
    assert not gates.same_ids("ids", [("x", twice, twice)], 1, begins_turns=True).passed


def test_a_template_that_differs_by_one_line_break_fails() -> None:
    assert gates.same_texts("template", [("a\nb", "a\nb")]).passed
    assert not gates.same_texts("template", [("a\nb", "a\n\nb")]).passed


def test_logits_must_be_equal_up_to_the_limit() -> None:
    expected = logprobs(1)
    same = gates.distribution_difference(expected, expected)
    assert same.max_abs == 0
    assert same.top1 == 1
    assert same.mean_kl == pytest.approx(0, abs=1e-7)
    assert gates.same_logits(same).passed
    # As large as what a wrong epsilon of the norms causes.
    wrong = gates.distribution_difference(expected, logprobs(1, noise=0.01))
    assert not gates.same_logits(wrong).passed
    assert gates.near_logits(wrong).passed
    far = gates.distribution_difference(expected, logprobs(1, noise=0.5))
    assert not gates.near_logits(far).passed


def test_values_that_are_not_finite_fail() -> None:
    expected = logprobs(1)
    broken = expected.copy()
    broken[3, 4] = np.nan
    found = gates.distribution_difference(expected, broken)
    assert not gates.same_logits(found).passed
    assert not gates.near_logits(found).passed


def plans(right: int, n: int) -> tuple[ScoredPlan, ...]:
    return score_all(
        Prediction(
            key=str(at),
            query="q",
            label=PLAN,
            prediction=PLAN if at < right else OTHER,
            stop_reason="stop",
            new_tokens=9,
            seconds=0.1,
        )
        for at in range(n)
    )


@pytest.mark.parametrize(("right", "passes"), [(80, True), (78, True), (60, False), (30, False)])
def test_a_file_that_surely_loses_too_much_fails(right: int, passes: bool) -> None:
    paired = compare_plans(plans(80, 100), plans(right, 100))
    gate = gates.no_great_loss("q4", paired, 5.0)
    assert gate.passed is passes
    assert gate.figures["difference in points"] == pytest.approx(right - 80)


def test_a_sentence_gives_shares_in_percent_and_no_lists() -> None:
    lost = gates.no_great_loss("q4", compare_plans(plans(80, 100), plans(78, 100)), 5.0).sentence()
    for text in ("success of f16 80.0 %", "success 78.0 %"):
        assert text in lost
    losses = gates.same_answers("a = b", "F32", (0.25, 0.25), 2, [], 0.0).sentence()
    assert "loss 0.25 and 0.25" in losses
    distributions = gates.near_logits(gates.distribution_difference(logprobs(1), logprobs(1)))
    assert not set("[]_") & set(lost + losses + distributions.sentence())


def test_a_reference_without_success_is_said_to_prove_nothing() -> None:
    paired = compare_plans(plans(0, 20), plans(0, 20))
    gate = gates.no_great_loss("q4", paired, 5.0)
    assert "nothing could be lost" in gate.sentence()
