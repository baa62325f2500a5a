"""The comparison of batches: agreement is said, a difference is counted and lowers the batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.inference.engine import Completion, Limits, Prompt
from tinyagent_fast.inference.parity import ParityReport, compare_batches
from tinyagent_fast.plans.grammar import END_OF_PLAN


class Writer:
    """An engine whose texts depend on the batch, and on nothing but the prompt otherwise."""

    def __init__(self, text: Callable[[Prompt, int], str], compute_dtype: str = "float32") -> None:
        self.text = text
        self.compute_dtype = compute_dtype
        self.asked: list[tuple[int, Sequence[Prompt]]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: Any = None,
    ) -> Iterator[tuple[int, Completion]]:
        assert (limits.stop, limits.max_new_tokens) == (END_OF_PLAN, 6)
        batch = limits.batch
        self.asked.append((batch, prompts))
        for index, prompt in reversed(list(enumerate(prompts))):
            yield (
                index,
                Completion(
                    text=self.text(prompt, batch), stop_reason="stop", new_tokens=3, prompt_tokens=9
                ),
            )


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(system="note " * (1 + n), user=str(n)) for n in range(count)]


def compare(engine: Any, count: int, batch: int, sample: int = 8) -> ParityReport:
    return compare_batches(
        engine,
        make_prompts(count),
        Limits(stop=END_OF_PLAN, max_new_tokens=6, batch=batch),
        sample=sample,
    )


def spoiled_from(rows: int, **how: Any) -> Writer:
    """An engine that says something else as soon as a batch has so many rows."""
    return Writer(lambda prompt, batch: "other" if batch >= rows else prompt.user, **how)


def differing(plans: int, **how: Any) -> Writer:
    """An engine that writes so many of its plans otherwise in every batch."""
    return Writer(
        lambda prompt, batch: prompt.user + "!" * (batch > 1 and int(prompt.user) < plans), **how
    )


def test_an_engine_that_gives_the_same_plans_may_use_the_batch_asked_for() -> None:
    report = compare(Writer(lambda prompt, _: prompt.user), count=9, batch=6)
    assert (report.prompts, report.safe_batch, report.tried) == (8, 6, ((6, 0),))
    assert report.agrees
    assert report.sentence() == "batch 6 = batch 1 on 8 prompts"


def test_other_plans_in_a_batch_are_counted_and_the_next_smaller_batch_is_tried() -> None:
    report = compare(spoiled_from(4), count=8, batch=8)
    assert not report.agrees
    assert report.tried == ((8, 8), (4, 8), (2, 0))
    assert report.safe_batch == 2
    assert "8 of 8 at batch 8" in report.sentence()
    assert "batch 2" in report.sentence()


def test_an_engine_that_differs_in_every_batch_falls_back_to_one_prompt_at_a_time() -> None:
    report = compare(spoiled_from(2), count=8, batch=8)
    assert report.safe_batch == 1
    assert [size for size, _ in report.tried] == [8, 4, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("plans", [1, 4])
def test_few_other_plans_in_16_bits_are_reported_and_the_batch_is_kept(
    dtype: str, plans: int
) -> None:
    report = compare(differing(plans, compute_dtype=dtype), count=8, batch=8)
    assert (report.safe_batch, report.near_ties) == (8, plans)
    assert f"{plans} of 8 plans differ" in report.sentence()
    assert dtype in report.sentence()
    written = asdict(report)
    assert (written["near_ties"], written["compute_dtype"]) == (plans, dtype)


def test_many_other_plans_in_16_bits_are_no_near_ties() -> None:
    report = compare(differing(5, compute_dtype="bfloat16"), count=8, batch=8)
    assert (report.safe_batch, report.near_ties) == (1, 0)
    assert compare(differing(2, compute_dtype="bfloat16"), count=3, batch=8).safe_batch == 1


def test_in_32_bits_a_single_other_plan_lowers_the_batch() -> None:
    report = compare(differing(1, compute_dtype="float32"), count=8, batch=8)
    assert (report.safe_batch, report.near_ties) == (1, 0)


def test_a_batch_larger_than_the_sample_is_filled_by_repeating_prompts() -> None:
    engine = spoiled_from(32)
    report = compare(engine, count=100, batch=64)
    assert [size for size, _ in report.tried] == [64, 32, 16]
    assert report.safe_batch == 16
    assert [len(prompts) for _, prompts in engine.asked] == [8, 64, 32, 16]


def test_a_batch_larger_than_all_prompts_is_compared_by_as_many_as_they_are() -> None:
    engine = spoiled_from(32)
    report = compare(engine, count=20, batch=100_000)
    assert report.tried == ((20, 0),)
    assert report.safe_batch == 100_000


@pytest.mark.parametrize(
    ("count", "batch", "sample"), [(5, 4, 0), (5, 1, 8), (0, 4, 8)], ids=["off", "one", "empty"]
)
def test_nothing_is_generated_where_there_is_nothing_to_compare(
    count: int, batch: int, sample: int
) -> None:
    engine = spoiled_from(1)
    report = compare(engine, count=count, batch=batch, sample=sample)
    assert report.safe_batch == batch
    assert report.sentence() == f"batch {batch}: not compared with batch 1"
    assert engine.asked == []


def test_plans_are_compared_and_not_their_spelling() -> None:
    spellings = {1: '1. open_note("a", "")\n2. join()', 4: "1. open_note('a', '')\n\n2. join()\n"}
    assert compare(Writer(lambda _, batch: spellings[batch]), count=4, batch=4).agrees


def test_texts_that_are_no_plans_are_compared_as_they_are() -> None:
    engine = Writer(lambda _, batch: "no plan" + "!" * (batch > 1))
    assert compare(engine, count=4, batch=4).tried == ((4, 4), (2, 4))


def test_the_sample_spreads_over_all_lengths() -> None:
    engine = Writer(lambda prompt, _: prompt.user)
    compare(engine, count=40, batch=4, sample=5)
    chosen = [int(prompt.user) for prompt in engine.asked[0][1]]
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 39, 5)
    assert chosen == sorted(chosen)


def test_a_report_can_be_written_as_json() -> None:
    report = compare(Writer(lambda prompt, _: prompt.user), count=3, batch=2)
    assert json.loads(json.dumps(asdict(report))) == {
        "prompts": 3,
        "asked_batch": 2,
        "safe_batch": 2,
        "tried": [[2, 0]],
        "near_ties": 0,
        "compute_dtype": "float32",
    }


def test_torch_gives_the_same_plans_one_by_one_and_together(tiny_base: Path) -> None:
    from torch_runs import load_plainly

    from tinyagent_fast.inference.torch_engine import TorchEngine

    engine = TorchEngine(load_plainly(tiny_base))
    assert compare(engine, count=9, batch=6).tried == ((6, 0),)
