"""What the benchmarks measure on: Llamas of random weights, rows of random tokens, the machine."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tinyagent_fast.models.families import ModelShape

Row = dict[str, list[int]]
"""input_ids and labels."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of rows in tokens."""

    shared: int
    """Tokens with which all rows begin."""
    mean: int
    deviation: int
    """Lengths are drawn within three of it."""
    supervised: int


# Source: prefix, mean and supervised tokens as counted by the public re-training
# (github.com/SamvelMinasyan/TinyAgent); the deviation is that of prompts built as published.
TRAINING_ROWS = Lengths(shared=1865, mean=3490, deviation=240, supervised=88)
TEST_PROMPTS = Lengths(shared=40, mean=1757, deviation=300, supervised=0)


def random_llama(shape: ModelShape, positions: int, **settings: Any) -> Any:
    """Build a Llama of random fp32 weights, always the same ones, for so many positions."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **shape.to_config(), max_position_embeddings=positions, **settings
    )
    return LlamaForCausalLM(config)


def generated_rows(lengths: Lengths, count: int, vocab: int, seed: int = 0) -> list[Row]:
    """Draw rows of random tokens that begin alike: lengths decide the time, not words."""
    from tinyagent_fast.prompts.tokens import IGNORED

    rng = random.Random(f"bench/{seed}")
    beginning = [rng.randrange(3, vocab) for _ in range(lengths.shared)]
    rows = []
    for _ in range(count):
        off = max(-3.0, min(3.0, rng.gauss(0, 1))) * lengths.deviation
        own = max(2, lengths.mean + round(off) - lengths.shared)
        ids = beginning + [rng.randrange(3, vocab) for _ in range(own)]
        prompt = len(ids) - lengths.supervised
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


def machine() -> dict[str, Any]:
    """Describe the machine, without the command and folders of it."""
    from tinyagent_fast.runs import environment

    return {k: v for k, v in environment().items() if k not in ("command", "folder")}
