"""What the benchmarks measure on: random Llamas, generated or real rows, the machine."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyagent_fast.models.families import ModelShape

if TYPE_CHECKING:
    from tinyagent_fast.prompts.tokens import PromptTokenizer

REAL_DATA = "TINYAGENT_FAST_REAL_DATA"
TRAINING_FILE, TESTING_FILE = "training_data.json", "testing_data.json"
TOKENIZER_FILE = "llama_tokenizer.model"

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


def llama_shape(hidden: int, layers: int, vocab: int) -> ModelShape:
    """Give a Llama of these sizes TinyLlama's proportions."""
    heads = hidden // 64
    return ModelShape(
        hidden=hidden,
        intermediate=hidden * 11 // 4,
        layers=layers,
        heads=heads,
        kv_heads=heads // 4 or heads,
        head_dim=64,
        vocab=vocab,
        tied=False,
    )


def random_llama(shape: ModelShape, positions: int, **settings: Any) -> Any:
    """Build a Llama of random fp32 weights, always the same ones, for so many positions."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **shape.to_config(), max_position_embeddings=positions, **settings
    )
    return LlamaForCausalLM(config)


def generated_rows(lengths: Lengths, count: int, vocab: int) -> list[Row]:
    """Draw rows of random tokens that begin alike: lengths decide the time, not words."""
    from tinyagent_fast.prompts.tokens import IGNORED

    rng = random.Random("bench/0")
    beginning = [rng.randrange(3, vocab) for _ in range(lengths.shared)]
    rows = []
    for _ in range(count):
        off = max(-3.0, min(3.0, rng.gauss(0, 1))) * lengths.deviation
        own = max(2, lengths.mean + round(off) - lengths.shared)
        ids = beginning + [rng.randrange(3, vocab) for _ in range(own)]
        prompt = len(ids) - lengths.supervised
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


def word_tokenizer(vocab: int) -> Any:
    """Make a tokenizer whose every id is a word, so that any ids are a text and back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def add_real_flag(parser: argparse.ArgumentParser, *files: str) -> None:
    """Add `--real`, a folder that holds the tokenizer and files in the dataset's schema."""
    wanted = (*files, TOKENIZER_FILE)
    parser.add_argument(
        "--real",
        type=partial(_folder_with, wanted),
        default=os.environ.get(REAL_DATA),
        help=f"folder with {', '.join(wanted)} (or ${REAL_DATA}); without it rows are generated",
    )


def _folder_with(wanted: Sequence[str], given: str) -> Path:
    folder = Path(given)
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise argparse.ArgumentTypeError(f"{folder}: it holds no {', '.join(missing)}")
    return folder


def tokenizer_for(real: Path | None, vocab: int) -> PromptTokenizer:
    """Give the Llama tokenizer beside real data, or one whose every id is a word."""
    from tinyagent_fast.prompts.loading import tokenizer_from_sentencepiece
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    if real is None:
        return PromptTokenizer(word_tokenizer(vocab), "flat")
    loaded = tokenizer_from_sentencepiece(real / TOKENIZER_FILE)
    loaded.pad_token = loaded.unk_token
    return PromptTokenizer(loaded, "alpaca")


def plan_examples(path: Path, count: int) -> list[Any]:
    """Read plans of a file in the published schema, chosen at random among its first entries."""
    from tinyagent_fast.data.reading import read_entries

    entries = islice(read_entries(path, on_bad_entry="skip"), max(400, count))
    found = [e for entry in entries for e in entry.examples if e.kind == "plan"]
    return random.Random("bench/0").sample(found, min(count, len(found)))


def rows_of(real: Path | None, file: str, count: int, lengths: Lengths, vocab: int) -> list[Row]:
    """Give rows of a real file, or generated ones of such lengths."""
    if real is None:
        return generated_rows(lengths, count, vocab)
    rows = tokenizer_for(real, vocab).training_rows(plan_examples(real / file, count))
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


def prompt_of(row: Row) -> list[int]:
    """Give what stands before the supervised tokens."""
    from tinyagent_fast.prompts.tokens import IGNORED

    return row["input_ids"][: row["labels"].count(IGNORED)]


def machine() -> dict[str, Any]:
    """Describe the machine, without the command and folders of it."""
    from tinyagent_fast.runs import environment

    return {k: v for k, v in environment().items() if k not in ("command", "folder")}
