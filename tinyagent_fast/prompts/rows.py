"""Examples to a file of proved rows: tokenised in bounded memory, over-long rows never cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tinyagent_fast.data.cache import cached_table
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import DataError
from tinyagent_fast.prompts.tokens import PromptTokenizer

CHUNK_ROWS = 256
"""Rows that are encoded together."""
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
    """Encoded rows in a cache folder, with columns key, input_ids, labels, length."""

    folder: Path
    statistics: RowStatistics

    def dataset(self) -> Any:
        """Open the rows memory-mapped, as a `datasets.Dataset`."""
        from datasets import Dataset

        return Dataset.from_file(str(self.folder / "rows.arrow"))


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PromptTokenizer,
    folder: Path,
    *,
    max_length_tokens: int,
    over_long: Literal["error", "drop"] = "error",
    on_progress: Callable[[int], None] = lambda _: None,
) -> RowFile:
    """Encode examples into a cache folder, or open the one that is there.

    The folder's name must stand for examples, tokenizer and limits, because an existing folder is
    used as it is. Progress is the number of rows done.

    Raises:
        DataError: Rows are over-long (with `error`), all were dropped, or a row cannot be proved.
    """
    from datasets import List, Value

    def fill(write: Callable[[Any], None]) -> dict[str, Any]:
        lengths: list[int] = []
        supervised_tokens = 0
        dropped: list[tuple[str, int]] = []
        for start in range(0, len(examples), CHUNK_ROWS):
            chunk = [examples[i] for i in range(start, min(start + CHUNK_ROWS, len(examples)))]
            for row in tokenizer.training_rows(chunk):
                length = len(row.input_ids)
                if length > max_length_tokens:
                    dropped.append((row.key, length))
                    continue
                lengths.append(length)
                supervised_tokens += row.supervised_tokens
                columns = {"key": row.key, "input_ids": row.input_ids, "labels": row.labels}
                write({**columns, "length": length})
            on_progress(start + len(chunk))
        if dropped and over_long == "error":
            raise _over_long(dropped, len(examples), max_length_tokens)
        if not lengths:
            raise DataError(
                f"no row is left of {len(examples)}",
                f"all have more than {max_length_tokens} tokens"
                if dropped
                else "there were no examples of the points asked for",
                "raise --model.max-length-tokens, or choose other --data.points",
            )
        statistics = RowStatistics(
            rows=len(lengths),
            tokens=sum(lengths),
            supervised_tokens=supervised_tokens,
            longest_tokens=max(lengths),
            dropped=tuple(dropped),
        )
        return asdict(statistics)

    ids = List(Value("int32"))
    columns = {"key": Value("string"), "input_ids": ids, "labels": ids, "length": Value("int32")}
    _, facts = cached_table(folder, columns, fill)
    dropped = tuple((key, tokens) for key, tokens in facts.pop("dropped"))
    return RowFile(folder, RowStatistics(dropped=dropped, **facts))


def _over_long(dropped: list[tuple[str, int]], examples: int, max_length_tokens: int) -> DataError:
    listed = ", ".join(f"{key} ({tokens})" for key, tokens in dropped[:_LISTED])
    more = f" and {len(dropped) - _LISTED} more" if len(dropped) > _LISTED else ""
    return DataError(
        f"{len(dropped)} of {examples} rows have more than {max_length_tokens} "
        f"tokens: {listed}{more}",
        "rows are never cut, because a cut plan teaches the model to stop in its middle",
        f"raise --model.max-length-tokens to {max(tokens for _, tokens in dropped)}, or leave "
        "them out with --data.over-long drop",
    )
