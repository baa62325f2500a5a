"""Time what happens before training and after generating: reading, tokenising, scoring."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench_inputs import TRAINING_FILE, plan_examples, real_tokenizer
from bench_rounds import in_turns, spread

from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.evaluation.scoring import score_pair
from tinyagent_fast.models.nano import train_bpe_tokenizer
from tinyagent_fast.prompts.templates import RenderedExample, render
from tinyagent_fast.prompts.tokens import PromptTokenizer

READ, PLAIN_READ = "read and validate", "json.load alone"
TOKENISE, PLAIN_TOKENISE = "tokenise and prove", "tokenise alone"
SCORE = "score"
_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class DataSizes:
    """How much is measured."""

    entries: int = 1500
    """Entries of a generated file."""
    rows: int = 800
    pairs: int = 1500
    tokenizer_pieces: int = 4000


FULL = DataSizes()
QUICK = DataSizes(entries=60, rows=40, pairs=60, tokenizer_pieces=600)


def measure_data(
    sizes: DataSizes,
    real: Path | None,
    work: Path,
    rounds: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time reading, tokenising and scoring on one core.

    Args:
        sizes: How much.
        real: Folder of real data; none generates a file with prompts of the published build.
        work: Folder for that file.
        rounds: How often each way runs.
        tell: Called with a way's name before it runs.

    Returns:
        The figures.
    """
    path = real / TRAINING_FILE if real else _generated(sizes, work)
    examples = list(islice(plan_examples(path), max(sizes.rows, sizes.pairs)))
    texts = [(e.key, render(e, "alpaca")) for e in examples[: sizes.rows]]
    tokenizer = _tokenizer(real, [r for _, r in texts], sizes.tokenizer_pieces)
    pairs = _pairs([e.output for e in examples], sizes.pairs)
    ways: dict[str, Callable[[], float]] = {
        READ: lambda: sum(1 for _ in read_entries(path, on_bad_entry="skip")),
        PLAIN_READ: lambda: len(json.loads(path.read_bytes())),
        TOKENISE: lambda: _encode(tokenizer, texts),
        PLAIN_TOKENISE: lambda: _encode_alone(tokenizer, texts),
        SCORE: lambda: sum(score_pair(label, found).success for label, found in pairs),
    }
    timed = in_turns(ways, rounds, tell)
    entries, size_mb = int(timed.results[READ]), path.stat().st_size / 1e6
    return {
        "what": "one process; the file is in the system's cache after the first round",
        "entries": entries,
        "size_mb": round(size_mb, 2),
        "rows": len(texts),
        "tokens": int(timed.results[TOKENISE]),
        "pairs": len(pairs),
        "pairs_right": int(timed.results[SCORE]),
        "ways": _rates(
            timed.seconds,
            {
                READ: entries,
                PLAIN_READ: entries,
                TOKENISE: len(texts),
                PLAIN_TOKENISE: len(texts),
                SCORE: len(pairs),
            },
        ),
        "read_mb_per_s": spread([size_mb / s for s in timed.seconds[READ]]),
        "ratios": {
            f"{READ} : {PLAIN_READ}": _over(timed.seconds, PLAIN_READ, READ),
            f"{TOKENISE} : {PLAIN_TOKENISE}": _over(timed.seconds, PLAIN_TOKENISE, TOKENISE),
        },
    }


def _generated(sizes: DataSizes, work: Path) -> Path:
    """Write a file with prompts of the published build and length."""
    spec = GenerationSpec(train_entries=sizes.entries, test_entries=1, prompt_style="full")
    return generate_dataset(spec, work / "bench-data").train


def _rates(seconds: Mapping[str, list[float]], counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        name: {"seconds": spread(taken), "per_s": spread([counts[name] / s for s in taken])}
        for name, taken in seconds.items()
    }


def _over(seconds: Mapping[str, list[float]], plain: str, mine: str) -> dict[str, Any]:
    return spread([a / b for a, b in zip(seconds[plain], seconds[mine], strict=True)])


def _tokenizer(real: Path | None, texts: Sequence[RenderedExample], pieces: int) -> PromptTokenizer:
    if real is not None:
        return real_tokenizer(real)
    sample = [text.prompt + text.completion for text in texts[:200]]
    return PromptTokenizer(train_bpe_tokenizer(sample, pieces))


def _encode(tokenizer: PromptTokenizer, texts: Sequence[tuple[str, RenderedExample]]) -> int:
    """Encode rows as training does, in chunks, and count their tokens."""
    starts = range(0, len(texts), _CHUNK_ROWS)
    chunks = (tokenizer.encode_rows(texts[start : start + _CHUNK_ROWS]) for start in starts)
    return sum(len(row.input_ids) for chunk in chunks for row in chunk)


def _encode_alone(tokenizer: PromptTokenizer, texts: Sequence[tuple[str, RenderedExample]]) -> int:
    """Encode the same texts without labels and proofs."""
    starts = range(0, len(texts), _CHUNK_ROWS)
    whole = [text.prompt + text.completion for _, text in texts]
    chunks = (tokenizer.encode_texts(whole[start : start + _CHUNK_ROWS]) for start in starts)
    return sum(len(ids) for chunk in chunks for ids in chunk)


def _pairs(plans: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Pair half of the plans with themselves and half with another plan."""
    rng = random.Random("bench/pairs")
    pairs = []
    for index in range(count):
        label = plans[index % len(plans)]
        pairs.append((label, label if index % 2 else plans[rng.randrange(len(plans))]))
    return pairs
