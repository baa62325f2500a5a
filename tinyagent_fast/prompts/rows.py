"""Examples to a file of proved rows: tokenised in bounded memory, over-long rows never cut."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import DataError
from tinyagent_fast.prompts.templates import render
from tinyagent_fast.prompts.tokens import EncodedRow, PromptTokenizer

_CHUNK_ROWS = 256
_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What became of the examples."""

    rows: int
    tokens: int
    supervised_tokens: int
    longest_tokens: int
    dropped: tuple[tuple[str, int], ...]
    """Key and tokens of each over-long row that was left out."""

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a row."""
        return self.tokens / max(1, self.rows)

    @property
    def supervised_share(self) -> float:
        """Share of tokens that carry loss."""
        return self.supervised_tokens / max(1, self.tokens)


@dataclass(frozen=True)
class RowFile:
    """Encoded rows in an Arrow file with columns key, input_ids, labels, length."""

    path: Path
    statistics: RowStatistics

    def dataset(self) -> Any:
        """Open the rows memory-mapped.

        Returns:
            A `datasets.Dataset`.
        """
        from datasets import Dataset

        return Dataset.from_file(str(self.path))


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PromptTokenizer,
    path: Path,
    *,
    max_length_tokens: int,
    over_long: Literal["error", "drop"] = "error",
    on_progress: Callable[[int], None] = lambda _: None,
) -> RowFile:
    """Encode examples into an Arrow file, or open the one that is there.

    Args:
        examples: What to encode.
        tokenizer: Encodes and proves each row.
        path: Target; its name must stand for examples, tokenizer and limits, because an existing
            file is used as it is.
        max_length_tokens: Longest row allowed.
        over_long: What to do with longer rows.
        on_progress: Called with the number of rows done.

    Returns:
        The file and what became of the examples.

    Raises:
        DataError: Rows are over-long (with `error`), all were dropped, or a row cannot be proved.
    """
    sidecar = path.with_suffix(".json")
    if path.exists() and sidecar.exists():
        raw = json.loads(sidecar.read_text(encoding="utf-8"))
        raw["dropped"] = tuple((key, tokens) for key, tokens in raw["dropped"])
        return RowFile(path, RowStatistics(**raw))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, about = (p.with_name(f"{p.name}.{os.getpid()}.part") for p in (path, sidecar))
    try:
        statistics = _write(_rows(examples, tokenizer, on_progress), temporary, max_length_tokens)
        _refuse(statistics, len(examples), max_length_tokens, over_long)
        about.write_text(json.dumps(asdict(statistics)), encoding="utf-8")
        temporary.replace(path)
        about.replace(sidecar)
    finally:
        temporary.unlink(missing_ok=True)
        about.unlink(missing_ok=True)
    return RowFile(path, statistics)


def _rows(
    examples: Sequence[Example], tokenizer: PromptTokenizer, on_progress: Callable[[int], None]
) -> Iterator[list[EncodedRow]]:
    chat = tokenizer.chat if tokenizer.prompt_format == "chat" else None
    for start in range(0, len(examples), _CHUNK_ROWS):
        chunk = [examples[i] for i in range(start, min(start + _CHUNK_ROWS, len(examples)))]
        texts = [(e.key, render(e, tokenizer.prompt_format, chat)) for e in chunk]
        yield tokenizer.encode_rows(texts)
        on_progress(start + len(chunk))


def _write(chunks: Iterator[list[EncodedRow]], path: Path, max_length_tokens: int) -> RowStatistics:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("key", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("length", pa.int32()),
        ]
    )
    rows = tokens = supervised = longest = 0
    dropped: list[tuple[str, int]] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for chunk in chunks:
            dropped += [
                (r.key, len(r.input_ids)) for r in chunk if len(r.input_ids) > max_length_tokens
            ]
            kept = [r for r in chunk if len(r.input_ids) <= max_length_tokens]
            lengths = [len(r.input_ids) for r in kept]
            rows += len(kept)
            tokens += sum(lengths)
            supervised += sum(r.supervised_tokens for r in kept)
            longest = max([longest, *lengths])
            columns = [
                [r.key for r in kept],
                [r.input_ids for r in kept],
                [r.labels for r in kept],
                lengths,
            ]
            arrays = [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return RowStatistics(
        rows=rows,
        tokens=tokens,
        supervised_tokens=supervised,
        longest_tokens=longest,
        dropped=tuple(dropped),
    )


def _refuse(
    statistics: RowStatistics, examples: int, max_length_tokens: int, over_long: str
) -> None:
    if statistics.dropped and over_long == "error":
        listed = ", ".join(f"{key} ({tokens})" for key, tokens in statistics.dropped[:_LISTED])
        more = f" and {len(statistics.dropped) - _LISTED} more"
        longest = max(tokens for _, tokens in statistics.dropped)
        raise DataError(
            f"{len(statistics.dropped)} of {examples} rows have more than {max_length_tokens} "
            f"tokens: {listed}{more if len(statistics.dropped) > _LISTED else ''}",
            "rows are never cut, because a cut plan teaches the model to stop in its middle",
            f"raise --model.max-length-tokens to {longest}, or leave them out with "
            "--data.over-long drop",
        )
    if not statistics.rows:
        raise DataError(
            f"no row is left of {examples}",
            f"all have more than {max_length_tokens} tokens"
            if statistics.dropped
            else "there were no examples of the points asked for",
            "raise --model.max-length-tokens, or choose other --data.points",
        )
