"""Describes a dataset file in figures: what is in it, how long it is, what is wrong with it.

Behind `tinyagent-fast data check`: one streaming pass, with counts kept instead of rows.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path

from tinyagent_fast.data.reading import ReadReport, read_entries
from tinyagent_fast.data.schema import Example, plan_steps
from tinyagent_fast.data.splits import LeakReport, leak_report

Encode = Callable[[list[str]], list[list[int]]]
Render = Callable[[Example], tuple[str, str]]
"""Gives the prompt and completion of an example as the model sees them."""

_WORD = re.compile(r"\w+|[^\w\s]")
_ROWS_PER_CALL = 64
_BINS = 10
_PROBLEMS_SHOWN = 20
_THIS_FILE = "this file"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """How a length is distributed; `bins` holds (from, to, rows) with both ends included."""

    rows: int
    minimum: int
    mean: float
    p50: int
    p90: int
    p99: int
    maximum: int
    bins: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindLengths:
    """Lengths of all rows of one kind, in the unit of the check.

    `parts` has "user" and "output" as encoded alone, "total" for prompt and completion, and
    "system" for the rest: the system text with what the template adds.
    """

    parts: Mapping[str, LengthSummary]
    supervised_share: float
    shared_prefix: int
    over_long_rows: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """All figures of one file; `unit` is "tokens", or "words" where no tokenizer was given."""

    path: str
    unit: str
    max_length_tokens: int | None
    read: ReadReport
    point_counts: Mapping[str, int]
    steps_per_plan: Mapping[int, int]
    tool_counts: Mapping[str, int]
    lengths: Mapping[str, KindLengths]
    leaks: LeakReport
    other_skipped: Mapping[str, int]

    def to_json(self) -> dict[str, object]:
        """Return the figures as values that `json.dumps` takes."""
        return asdict(self)

    def render_text(self) -> str:
        """Return the figures as plain text for the terminal."""
        sections = [
            self._counts_text(),
            *(self._lengths_text(kind, lengths) for kind, lengths in self.lengths.items()),
            self._leaks_text(),
            self._problems_text(),
        ]
        return "\n\n".join("\n".join(lines) for lines in sections)

    def _counts_text(self) -> list[str]:
        read = self.read
        points = ", ".join(f"{count:,} {kind}" for kind, count in self.point_counts.items())
        return [
            f"{self.path}: {read.size_bytes / 1e6:,.1f} MB, sha256 {read.file_sha256}",
            f"entries: {read.entries:,} usable, {read.skipped:,} not; points: {points}",
            "steps per plan (without join):",
            *(f"  {steps:>4}  {count:>8,}" for steps, count in self.steps_per_plan.items()),
            "calls per tool:",
            *(f"  {count:>8,}  {tool}" for tool, count in self.tool_counts.items()),
        ]

    def _lengths_text(self, kind: str, lengths: KindLengths) -> list[str]:
        columns = ("min", "mean", "p50", "p90", "p99", "max")
        lines = [
            f"{self.unit} per {kind} row:",
            f"  {'':8}" + "".join(f"{column:>9}" for column in columns),
        ]
        for part, summary in lengths.parts.items():
            low = (summary.minimum, round(summary.mean), summary.p50)
            values = (*low, summary.p90, summary.p99, summary.maximum)
            lines.append(f"  {part:8}" + "".join(f"{value:>9,}" for value in values))
        for start, end, rows in lengths.parts["total"].bins:
            lines.append(f"  {start:>7,} to {end:>7,}  {rows:>8,} rows")
        lines += [
            f"  supervised: {lengths.supervised_share:.1%} of all {self.unit}",
            f"  shared by all {kind} rows at the start: {lengths.shared_prefix:,} {self.unit}",
        ]
        if self.max_length_tokens is not None:
            over = lengths.over_long_rows
            known = "unknown, no tokenizer" if over is None else f"{over:,}"
            lines.append(f"  rows over {self.max_length_tokens:,} tokens: {known}")
        return lines

    def _leaks_text(self) -> list[str]:
        lines = ["repeated queries (exact / ignoring case and punctuation):"]
        for split in self.leaks.within:
            lines.append(
                f"  within {split.name}: {split.exact:,} / {split.normalised:,} of {split.rows:,}"
            )
        for pair in self.leaks.between:
            lines.append(
                f"  {pair.first} and {pair.second} share: {pair.exact:,} / {pair.normalised:,} "
                f"({pair.rows_in_first:,} entries of {pair.first}, "
                f"{pair.rows_in_second:,} of {pair.second})"
            )
            if pair.first == _THIS_FILE and pair.rows_in_first:
                lines.append(
                    f"    training leaves out these {pair.rows_in_first:,} entries if "
                    f"{pair.second} is its test file (--data.leaks drop, the default)"
                )
        for name, skipped in self.other_skipped.items():
            if skipped:
                lines.append(f"  {name}: {skipped:,} unusable entries were not compared")
        return lines

    def _problems_text(self) -> list[str]:
        read = self.read
        if not read.problem_count:
            return ["problems: none"]
        shown = read.problems[:_PROBLEMS_SHOWN]
        lines = [f"problems: {read.problem_count:,} in {read.skipped:,} entries"]
        lines += [f"  {item.key} {item.field or 'entry'}: {item.reason}" for item in shown]
        if read.problem_count > len(shown):
            lines.append(f"  and {read.problem_count - len(shown):,} more")
        return lines


class _Lengths:
    """Lengths of the rows of one kind, and the beginning that all their prompts share so far."""

    def __init__(self) -> None:
        self.parts = {part: array("q") for part in ("system", "user", "output", "total")}
        self.prefix: Sequence[object] | None = None

    def add(self, prompt: Sequence[object], user: int, output: int) -> None:
        system = max(0, len(prompt) - user)
        for part, length in zip(
            self.parts.values(), (system, user, output, len(prompt) + output), strict=True
        ):
            part.append(length)
        if self.prefix is None:
            self.prefix = prompt
        elif prompt[: len(self.prefix)] != self.prefix:
            pairs = zip(self.prefix, prompt, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self.prefix = prompt[:same]

    def summary(self, limit: int | None) -> KindLengths:
        totals = self.parts["total"]
        return KindLengths(
            parts={part: summarise_lengths(lengths) for part, lengths in self.parts.items()},
            supervised_share=sum(self.parts["output"]) / max(1, sum(totals)),
            shared_prefix=len(self.prefix or ()),
            over_long_rows=None if limit is None else sum(total > limit for total in totals),
        )


def check_file(
    path: str | Path,
    *,
    encode: Encode | None,
    render: Render,
    max_length_tokens: int | None = None,
    others: Mapping[str, str | Path] | None = None,
) -> DataCheck:
    """Read a dataset file once and describe it; unusable entries are listed, not raised.

    Args:
        path: The JSON data file.
        encode: Gives the token ids of texts; without it, words and punctuation marks are counted
            and labelled so.
        render: Gives the prompt and completion of an example.
        max_length_tokens: Rows with more tokens in all are counted as over-long.
        others: More data files by name (not "this file"), to look for the same queries in them.

    Returns:
        The figures.

    Raises:
        DataError: A file is no dataset file at all, or has no usable entry.
    """
    count: Callable[[list[str]], Sequence[Sequence[object]]] = encode or _words
    points: Counter[str] = Counter()
    steps: Counter[int] = Counter()
    tools: Counter[str] = Counter()
    kinds: dict[str, _Lengths] = {}
    queries: list[str] = []
    reports: list[ReadReport] = []

    def examples() -> Iterator[Example]:
        for entry in read_entries(path, on_bad_entry="skip", on_report=reports.append):
            queries.append(entry.query)
            yield from entry.examples

    rows = examples()
    while batch := list(islice(rows, _ROWS_PER_CALL)):
        prompts, completions = zip(*map(render, batch), strict=True)
        encoded = iter(count([*prompts, *(example.user for example in batch), *completions]))
        parts = [list(islice(encoded, len(batch))) for _ in range(3)]
        for example, prompt, user, output in zip(batch, *parts, strict=True):
            kinds.setdefault(example.kind, _Lengths()).add(prompt, len(user), len(output))
            points[example.kind] += 1
            if example.kind != "join":
                called = [step.tool for step in plan_steps(example.output) if step.tool != "join"]
                steps[len(called)] += 1
                tools.update(called)
    splits = {_THIS_FILE: queries}
    skipped: dict[str, int] = {}
    for name, other in (others or {}).items():
        entries = read_entries(other, on_bad_entry="skip", on_report=reports.append)
        splits[name] = [entry.query for entry in entries]
        skipped[name] = reports[-1].skipped
    limit = max_length_tokens if encode is not None else None
    return DataCheck(
        path=str(path),
        unit="words" if encode is None else "tokens",
        max_length_tokens=max_length_tokens,
        read=reports[0],
        point_counts=dict(points),
        steps_per_plan=dict(sorted(steps.items())),
        tool_counts=dict(tools.most_common()),
        lengths={kind: lengths.summary(limit) for kind, lengths in kinds.items()},
        leaks=leak_report(splits),
        other_skipped=skipped,
    )


def _words(texts: list[str]) -> list[list[str]]:
    return [_WORD.findall(text) for text in texts]


def summarise_lengths(lengths: Sequence[int]) -> LengthSummary:
    """Summarise at least one length.

    A percentile is the smallest length that at least that share does not exceed.
    """
    ordered = sorted(lengths)
    low, high, count = ordered[0], ordered[-1], len(ordered)
    width = (high - low) // _BINS + 1
    binned = Counter((length - low) // width for length in ordered)
    p50, p90, p99 = (ordered[-(-count * percent // 100) - 1] for percent in (50, 90, 99))
    return LengthSummary(
        rows=count,
        minimum=low,
        mean=sum(ordered) / count,
        p50=p50,
        p90=p90,
        p99=p99,
        maximum=high,
        bins=tuple(
            (low + at * width, min(low + (at + 1) * width - 1, high), binned[at])
            for at in range((high - low) // width + 1)
        ),
    )
