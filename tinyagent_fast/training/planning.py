"""What `plan` knows of a base model and of rows without a GPU, a network or torch.

Shapes come from a folder's config.json or are known by name; lengths are given, counted in the data
where it and a tokenizer are there, or the published ones. `sizing` predicts from both.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import BASE_MODEL, Config
from tinyagent_fast.errors import ConfigError, ModelError
from tinyagent_fast.presets import REAL_TRAIN
from tinyagent_fast.training.footprint import ModelShape
from tinyagent_fast.training.sizing import RowLengths

if TYPE_CHECKING:
    from tinyagent_fast.prompts.tokens import EncodedRow

_TINYLLAMA_32K = ModelShape(
    hidden=2048,
    intermediate=5632,
    layers=22,
    heads=32,
    kv_heads=4,
    head_dim=64,
    vocab=32000,
    tied=False,
)
"""Source: config.json of models derived from Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct."""


def base_shape(base: str) -> ModelShape:
    """Find a base model's sizes without loading it or asking a network.

    Args:
        base: A folder, `nano`, `random`, or the default base's name.

    Returns:
        Its shape.

    Raises:
        ModelError: It is none of these.
    """
    if base == BASE_MODEL:
        return _TINYLLAMA_32K
    if base in ("nano", "random"):
        from tinyagent_fast.models.bases import RANDOM_SHAPE
        from tinyagent_fast.models.nano import NanoShape

        made = NanoShape() if base == "nano" else RANDOM_SHAPE
        return ModelShape(
            hidden=made.hidden,
            intermediate=made.intermediate,
            layers=made.layers,
            heads=made.heads,
            kv_heads=made.kv_heads,
            head_dim=made.hidden // made.heads,
            vocab=made.vocab_pieces,
            tied=True,
        )
    path = Path(base) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base model {base!r}",
            f"its sizes are not known: {error}",
            f"put its config.json into a folder and name that with --model.base; known by name are "
            f"{BASE_MODEL}, nano and random",
        ) from error
    return ModelShape.from_config(raw if isinstance(raw, dict) else {}, str(path))


_PUBLISHED = RowLengths(rows=39_030, mean_tokens=3490, longest_tokens=4608, supervised_tokens=88)
"""Plans of the published training file. Source: counts of its public re-training
(github.com/SamvelMinasyan/TinyAgent), mean and supervised tokens partly inferred."""
_SAMPLE_ROWS = 256
_LONGEST_ROWS = 64


def row_lengths(config: Config, given: str | None) -> tuple[RowLengths, str]:
    """Find the lengths of a config's rows: as given, counted in its data, or as published.

    Args:
        config: The config.
        given: `MEAN,LONGEST`, or none.

    Returns:
        The lengths, and where they come from.

    Raises:
        ConfigError: What was given are not two lengths.
    """
    data, allowed = config.data, config.model.max_length_tokens
    rows = _PUBLISHED.rows
    if data.train is None:
        rows = max(1, data.generated_entries - data.validation_entries)
    rows = min(rows, data.limit_entries or rows)
    share = _PUBLISHED.supervised_tokens / _PUBLISHED.mean_tokens
    if given is not None:
        mean, longest = _parsed(given)
        lengths = RowLengths(
            rows=rows, mean_tokens=mean, longest_tokens=longest, supervised_tokens=share * mean
        )
        return lengths, "as given"
    if data.train is not None and data.train.exists() and _has_tokenizer(config.model.base):
        return _counted(config), f"a sample and the longest texts of {data.train}"
    if config.model.base == BASE_MODEL or data.train == REAL_TRAIN:
        most = min(_PUBLISHED.longest_tokens, allowed)
        mean_tokens = min(_PUBLISHED.mean_tokens, most)
        lengths = replace(_PUBLISHED, rows=rows, mean_tokens=mean_tokens, longest_tokens=most)
        return lengths, "as published for plans; --lengths MEAN,LONGEST gives others"
    lengths = RowLengths(
        rows=rows, mean_tokens=allowed, longest_tokens=allowed, supervised_tokens=share * allowed
    )
    return lengths, "the longest allowed, not counted; --lengths MEAN,LONGEST gives others"


def _has_tokenizer(base: str) -> bool:
    """Say whether tokens can be counted here, without asking a network."""
    names = ("tokenizer.json", "tokenizer.model")
    there = any((Path(base) / name).exists() for name in names)
    return there and find_spec("transformers") is not None


def _parsed(given: str) -> tuple[int, int]:
    try:
        mean, longest = (int(word) for word in given.split(","))
    except ValueError:
        mean = longest = 0
    if not 0 < mean <= longest:
        raise ConfigError(
            f"--lengths {given}",
            "it must be two whole numbers, the mean and the longest",
            "such as --lengths 3490,4608",
        )
    return mean, longest


def _counted(config: Config) -> RowLengths:
    """Count tokens of a seeded sample, and of the rows with the longest texts."""
    from tinyagent_fast.data.cache import cache_folder, load_examples
    from tinyagent_fast.prompts.templates import render
    from tinyagent_fast.prompts.tokenizers import load_tokenizer
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    data, prompt_format = config.data, config.model.prompt_format
    assert data.train is not None, "the caller has looked"
    table = load_examples(
        data.train, on_bad_entry=data.on_bad_entry, cache_dir=cache_folder(), points=data.points
    )
    tokenizer = PromptTokenizer(load_tokenizer(Path(config.model.base)), prompt_format)
    chat = tokenizer.chat if prompt_format == "chat" else None

    def encode(indices: Iterable[int]) -> list[EncodedRow]:
        examples = (table[index] for index in indices)
        return tokenizer.encode_rows([(e.key, render(e, prompt_format, chat)) for e in examples])

    sizes = [len(e.system or "") + len(e.user) + len(e.output) for e in table]
    longest = encode(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:_LONGEST_ROWS])
    picked = random.Random(data.seed).sample(range(len(sizes)), min(len(sizes), _SAMPLE_ROWS))
    sample = encode(picked)
    tokens = max(len(row.input_ids) for row in (*longest, *sample))
    entries = len(set(table.entry_keys()))
    kept = max(0, entries - data.validation_entries)
    kept = min(kept, data.limit_entries or kept)
    return RowLengths(
        rows=max(1, round(len(table) * kept / entries)),
        mean_tokens=statistics.fmean(len(row.input_ids) for row in sample),
        longest_tokens=min(tokens, config.model.max_length_tokens),
        supervised_tokens=statistics.fmean(row.supervised_tokens for row in sample),
    )
