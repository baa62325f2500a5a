"""How the gain of shared prefixes grows: with the share of the prefix, the batch, the row length.

A smaller model than elsewhere, so that it ends in minutes. One of the three changes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench_evaluation import SHARED as SHARED_PROMPTS
from bench_evaluation import STATIC, Decoding, never_stopping, write
from bench_inputs import (
    generated_prompts,
    generated_rows,
    random_llama,
    with_adapter,
    word_tokenizer,
)
from bench_rounds import Timed, in_turns, summary
from bench_sizes import Lengths, Shape
from bench_training import PADDED, TrlWays, ours, step_of
from bench_training import SHARED as SHARED_ROWS

from tinyagent_fast.shared_prefix.packing import pack

AXES = ("share", "batch", "length")
_SUPERVISED_TOKENS = 88


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement's sizes."""

    share: float
    """Of a row's tokens: the prefix."""
    batch: int
    length: int
    """Tokens of a row."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All points: one default, and values for each axis."""

    shape: Shape
    default: Point
    shares: tuple[float, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    batch_of_lengths: int
    """Smaller than elsewhere, because the longest rows are long."""
    new_tokens: int = 32

    def along(self, axis: str) -> list[Point]:
        """Give the points of one axis.

        Args:
            axis: One of `AXES`.

        Returns:
            The default point with that value changed.
        """
        values: dict[str, Sequence[Any]] = {
            "share": self.shares,
            "batch": self.batches,
            "length": self.lengths,
        }
        sizes = vars(self.default)
        if axis == "length":
            sizes = {**sizes, "batch": self.batch_of_lengths}
        return [Point(**{**sizes, axis: value}) for value in values[axis]]


FULL = Grid(
    shape=Shape.of(512, 2),
    default=Point(share=0.53, batch=8, length=1024),
    shares=(0.0, 0.2, 0.4, 0.6, 0.8),
    batches=(1, 2, 4, 8, 16, 32),
    lengths=(512, 1024, 2048, 4096, 8192),
    batch_of_lengths=4,
)
QUICK = Grid(
    shape=replace(Shape.of(64, 1), vocab=1000),
    default=Point(share=0.5, batch=2, length=160),
    shares=(0.0, 0.5),
    batches=(1, 2),
    lengths=(160, 200),
    batch_of_lengths=2,
    new_tokens=4,
)


_WARM_UP = Point(share=0.5, batch=2, length=100)


def measure_scaling(
    grid: Grid, rounds: int, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Time training and evaluation at all points, each against the usual way.

    Args:
        grid: The points.
        rounds: How often each way runs.
        tell: Called with a way's name before it runs.

    Returns:
        For each axis a list of points with their ratios.
    """
    longest = max(point.length for axis in AXES for point in grid.along(axis))
    tokenizer = never_stopping(word_tokenizer(grid.shape.vocab))
    base = random_llama(grid.shape, longest + grid.new_tokens)
    runs = [(axis, point) for axis in AXES for point in grid.along(axis)]

    def told(axis: str, point: Point) -> Callable[[str], None]:
        return lambda way: tell(f"{axis} {vars(point)[axis]}: {way}")

    # Evaluated before the adapter comes, as adapters cost every way the same.
    _evaluate(base.eval(), tokenizer, _WARM_UP, grid, 1, tell)
    evaluated = [_evaluate(base, tokenizer, p, grid, rounds, told(a, p)) for a, p in runs]
    trl = TrlWays(with_adapter(base), tokenizer.hf)
    _train(trl, _WARM_UP, grid, 1, tell)
    trained = [_train(trl, p, grid, rounds, told(a, p)) for a, p in runs]
    found: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES}
    for (axis, point), training, evaluation in zip(runs, trained, evaluated, strict=True):
        found[axis].append({**vars(point), "training": training, "evaluation": evaluation})
    return {
        "what": {
            "training": f"{SHARED_ROWS} against {PADDED}, forward and backward",
            "evaluation": f"{SHARED_PROMPTS} against {STATIC}, {grid.new_tokens} tokens written",
        },
        "model": vars(grid.shape),
        "default": vars(grid.default),
        **found,
    }


def _lengths(point: Point) -> Lengths:
    """Rows of equal length: padding is no part of what is shown."""
    supervised = min(_SUPERVISED_TOKENS, point.length // 10)
    shared = round(point.share * point.length)
    return Lengths(shared=shared, mean=point.length, deviation=0, supervised=supervised)


def _train(
    trl: TrlWays, point: Point, grid: Grid, rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    rows = generated_rows(_lengths(point), point.batch, grid.shape.vocab)
    packed = pack(rows)
    ways = {
        PADDED: step_of(trl.model, trl.padded(rows)),
        SHARED_ROWS: step_of(trl.model, ours(trl.model, packed)),
    }
    timed = in_turns(ways, rounds, tell)
    losses = {name: step.loss for name, step in timed.results.items()}
    return {
        **_pair(timed, PADDED, SHARED_ROWS, point.batch),
        "computed_share": round(packed.computed_tokens / packed.plain_tokens, 4),
        "loss_difference": abs(losses[SHARED_ROWS] - losses[PADDED]) / losses[PADDED],
    }


def _evaluate(
    model: Any,
    tokenizer: Any,
    point: Point,
    grid: Grid,
    rounds: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    prompts = dict(enumerate(generated_prompts(_lengths(point), point.batch, grid.shape.vocab).ids))
    how = Decoding(batch=point.batch, new_tokens=grid.new_tokens)
    ways = {
        STATIC: partial(write, model, tokenizer, prompts, replace(how, shared_prefix=False)),
        SHARED_PROMPTS: partial(write, model, tokenizer, prompts, how),
    }
    timed = in_turns(ways, rounds, tell)
    texts = {name: written.texts for name, written in timed.results.items()}
    equal = sum(text == texts[STATIC][at] for at, text in texts[SHARED_PROMPTS].items())
    return {
        **_pair(timed, STATIC, SHARED_PROMPTS, point.batch),
        "equal_outputs": f"{equal} of {len(prompts)}",
    }


def _pair(timed: Timed[Any], usual: str, new: str, samples: int) -> dict[str, Any]:
    found = summary(timed, {usual: samples, new: samples}, usual)
    return {
        "seconds": {name: found[name]["seconds"] for name in (usual, new)},
        "ratio": found[new]["ratio"],
        "cpu_ratio": found[new]["cpu_ratio"],
    }
