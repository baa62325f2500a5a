"""The sizes of `bench`: models, lengths of rows, batches; all of them, and those of `--quick`."""

from __future__ import annotations

from dataclasses import dataclass, replace

_HEAD_NUMBERS = 64


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a random Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 32000

    @classmethod
    def of(cls, hidden: int, layers: int) -> Shape:
        """Choose the other sizes: heads of 64 numbers, four to a key, TinyLlama's ratio of the MLP.

        Args:
            hidden: A multiple of 64.
            layers: Number of layers.

        Returns:
            The shape.
        """
        heads = hidden // _HEAD_NUMBERS
        kv_heads = heads // 4 if heads % 4 == 0 else heads
        return cls(
            hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=hidden * 11 // 4
        )


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of rows in tokens; every number is drawn within three deviations."""

    shared: int
    """Tokens with which all rows begin."""
    mean: int
    deviation: int
    supervised: int

    def longest(self) -> int:
        """Give a length that no row exceeds."""
        return self.mean + 3 * self.deviation


# Source: prefix, mean and supervised tokens as counted by the public re-training
# (github.com/SamvelMinasyan/TinyAgent); the deviation is that of prompts built as published.
PLANS = Lengths(shared=1865, mean=3490, deviation=240, supervised=88)
TEST_PROMPTS = Lengths(shared=40, mean=1757, deviation=300, supervised=0)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the training and the evaluation part."""

    shape: Shape
    training_rows: Lengths
    test_prompts: Lengths
    batch: int
    eval_batch: int
    new_tokens: int
    singles: int
    """Prompts that go one at a time."""
    rounds: int


FULL = Sizes(
    shape=Shape.of(1024, 6),
    training_rows=PLANS,
    test_prompts=TEST_PROMPTS,
    batch=8,
    eval_batch=16,
    new_tokens=88,
    singles=4,
    rounds=3,
)
QUICK = Sizes(
    shape=replace(Shape.of(64, 1), vocab=1000),
    training_rows=Lengths(shared=100, mean=180, deviation=20, supervised=9),
    test_prompts=Lengths(shared=8, mean=90, deviation=10, supervised=0),
    batch=3,
    eval_batch=4,
    new_tokens=6,
    singles=2,
    rounds=2,
)
