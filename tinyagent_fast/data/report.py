"""Describes a dataset file in figures: what is in it, how long it is, what is wrong with it.

Side branch of the data flow, behind `tinyagent-fast data check`: one streaming pass through
`reading`, with counts kept instead of rows.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tinyagent_fast.data.reading import Progress, ReadReport, read_entries
from tinyagent_fast.data.schema import Example, entry_examples, plan_steps
from tinyagent_fast.data.splits import LeakReport, leak_report

Encode = Callable[[list[str]], list[list[int]]]
Render = Callable[[Example], tuple[str, str]]

_PARTS = ("system", "user", "output", "total")
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
            self._render_counts(),
            *(self._render_lengths(kind) for kind in self.lengths),
            self._render_leaks(),
            self._render_problems(),
        ]
        return "\n\n".join("\n".join(lines) for lines in sections)

    def _render_counts(self) -> list[str]:
        read = self.read
        points = ", ".join(f"{count:,} {kind}" for kind, count in self.point_counts.items())
        steps = [f"  {steps:>4}  {count:>8,}" for steps, count in self.steps_per_plan.items()]
        tools = [f"  {count:>8,}  {tool}" for tool, count in self.tool_counts.items()]
        return [
            f"{self.path}: {read.size_bytes / 1e6:,.1f} MB, sha256 {read.file_sha256}",
            f"entries: {read.entries:,} usable, {read.skipped:,} not; points: {points}",
            "steps per plan (without join):",
            *steps,
            "calls per tool:",
            *tools,
        ]

    def _render_lengths(self, kind: str) -> list[str]:
        lengths = self.lengths[kind]
        columns = ("min", "mean", "p50", "p90", "p99", "max")
        lines = [
            f"{self.unit} per {kind} row:",
            f"  {'':8}" + "".join(f"{column:>9}" for column in columns),
        ]
        for part, summary in lengths.parts.items():
            values = (summary.minimum, round(summary.mean), summary.p50, summary.p90)
            figures = "".join(f"{value:>9,}" for value in (*values, summary.p99, summary.maximum))
            lines.append(f"  {part:8}{figures}")
        for start, end, rows in lengths.parts["total"].bins:
            lines.append(f"  {start:>7,} to {end:>7,}  {rows:>8,} rows")
        lines += [
            f"  supervised: {lengths.supervised_share:.1%} of all {self.unit}",
            f"  shared by all {kind} rows at the start: {lengths.shared_prefix:,} {self.unit}",
        ]
        if lengths.over_long_rows is not None:
            rows = lengths.over_long_rows
            lines.append(f"  rows over {self.max_length_tokens:,} tokens: {rows:,}")
        elif self.max_length_tokens is not None:
            lines.append(f"  rows over {self.max_length_tokens:,} tokens: unknown, no tokenizer")
        return lines

    def _render_leaks(self) -> list[str]:
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

    def _render_problems(self) -> list[str]:
        read = self.read
        if not read.problem_count:
            return ["problems: none"]
        shown = read.problems[:_PROBLEMS_SHOWN]
        lines = [f"problems: {read.problem_count:,} in {read.skipped:,} entries"]
        lines += [f"  {item.key} {item.field or 'entry'}: {item.reason}" for item in shown]
        if read.problem_count > len(shown):
            lines.append(f"  and {read.problem_count - len(shown):,} more")
        return lines


def default_render(example: Example) -> tuple[str, str]:
    """Give prompt and completion without any template.

    Args:
        example: The row.

    Returns:
        System and user text with an empty line between, and the output.
    """
    prompt = example.user if example.system is None else f"{example.system}\n\n{example.user}"
    return prompt, example.output


@dataclass
class _KindTally:
    """Lengths of one kind of rows, and the beginning that all of them share so far."""

    lengths: dict[str, array[int]] = field(
        default_factory=lambda: {part: array("q") for part in _PARTS}
    )
    prefix: Sequence[object] | None = None

    def add(self, prompt: Sequence[object], user: int, output: int) -> None:
        for part, length in zip(
            _PARTS, (len(prompt) - user, user, output, len(prompt) + output), strict=True
        ):
            self.lengths[part].append(max(0, length))
        self.prefix = prompt if self.prefix is None else _common(self.prefix, prompt)


class _Tally:
    """Folds rows into counts, a batch at a time."""

    def __init__(self, encode: Callable[[list[str]], Sequence[Sequence[object]]]) -> None:
        self.kinds: dict[str, _KindTally] = {}
        self.steps: Counter[int] = Counter()
        self.tools: Counter[str] = Counter()
        self._encode = encode
        self._waiting: list[tuple[str, str, str, str]] = []

    def add(self, example: Example, prompt: str, completion: str) -> None:
        if example.kind != "join":
            tools = [step.tool for step in plan_steps(example.output) if step.tool != "join"]
            self.steps[len(tools)] += 1
            self.tools.update(tools)
        self._waiting.append((example.kind, prompt, example.user, completion))
        if len(self._waiting) >= _ROWS_PER_CALL:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        kinds, prompts, users, completions = zip(*self._waiting, strict=True)
        encoded = self._encode([*prompts, *users, *completions])
        rows = len(kinds)
        for at, kind in enumerate(kinds):
            user, output = encoded[rows + at], encoded[2 * rows + at]
            self.kinds.setdefault(kind, _KindTally()).add(encoded[at], len(user), len(output))
        self._waiting.clear()


def check_file(
    path: str | Path,
    *,
    encode: Encode | None,
    max_length_tokens: int | None = None,
    others: Mapping[str, str | Path] | None = None,
    render: Render = default_render,
    progress: Progress | None = None,
) -> DataCheck:
    """Read a dataset file once and describe it; unusable entries are listed, not raised.

    Args:
        path: The JSON data file.
        encode: Gives the token ids of texts; without it, words and punctuation marks are counted
            and labelled so.
        max_length_tokens: Rows with more tokens in all are counted as over-long.
        others: More data files by name (not "this file"), to look for the same queries in them.
        render: Gives the prompt and completion of a row as the model sees them.
        progress: Called with (bytes read, bytes in all).

    Returns:
        The figures.

    Raises:
        DataError: A file is no dataset file at all, or has no usable entry.
    """
    tally = _Tally(_words if encode is None else encode)
    points: Counter[str] = Counter()
    queries: list[str] = []
    reports: list[ReadReport] = []
    for entry in read_entries(
        path, on_bad_entry="skip", progress=progress, on_report=reports.append
    ):
        queries.append(entry.query)
        for example in entry_examples(entry):
            points[example.kind] += 1
            tally.add(example, *render(example))
    tally.flush()
    splits = {_THIS_FILE: queries}
    skipped: dict[str, int] = {}
    for name, other in (others or {}).items():
        seen: list[ReadReport] = []
        entries = read_entries(other, on_bad_entry="skip", on_report=seen.append)
        splits[name] = [entry.query for entry in entries]
        skipped[name] = seen[0].skipped
    limit = max_length_tokens if encode is not None else None
    return DataCheck(
        path=str(path),
        unit="words" if encode is None else "tokens",
        max_length_tokens=max_length_tokens,
        read=reports[0],
        point_counts=dict(points),
        steps_per_plan=dict(sorted(tally.steps.items())),
        tool_counts=dict(tally.tools.most_common()),
        lengths={kind: _kind_lengths(item, limit) for kind, item in tally.kinds.items()},
        leaks=leak_report(splits),
        other_skipped=skipped,
    )


def _words(texts: list[str]) -> list[list[str]]:
    return [_WORD.findall(text) for text in texts]


def _kind_lengths(tally: _KindTally, limit: int | None) -> KindLengths:
    totals = tally.lengths["total"]
    return KindLengths(
        parts={part: summarise_lengths(lengths) for part, lengths in tally.lengths.items()},
        supervised_share=sum(tally.lengths["output"]) / max(1, sum(totals)),
        shared_prefix=len(tally.prefix or ()),
        over_long_rows=None if limit is None else sum(total > limit for total in totals),
    )


def summarise_lengths(lengths: Sequence[int]) -> LengthSummary:
    """Summarise how lengths are distributed.

    Args:
        lengths: At least one length.

    Returns:
        The figures; a percentile is the smallest length that at least that share does not exceed.
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


def _common(first: Sequence[object], second: Sequence[object]) -> Sequence[object]:
    if second[: len(first)] == first:
        return first
    for at, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return first[:at]
    return first[: min(len(first), len(second))]
