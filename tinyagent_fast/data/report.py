"""Describes a dataset file in figures: what is in it, how long it is, what is wrong with it.

Behind `tinyagent-fast data check`: one streaming pass, with counts kept instead of rows.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from tinyagent_fast.data.reading import ReadReport, read_entries
from tinyagent_fast.data.schema import Example, plan_steps
from tinyagent_fast.data.splits import LeakReport, leak_report

Encode = Callable[[list[str]], list[list[int]]]
Render = Callable[[Example], tuple[str, str]]
"""Gives the prompt and completion of an example as the model sees them."""
Judge = Callable[[str], str | None]
"""Says why a plan, taken as its own prediction, would not count as right; None where it would."""

_WORD = re.compile(r"\w+|[^\w\s]")
_ROWS_PER_CALL = 64
_THIS_FILE = "this file"
_COLUMNS = ("minimum", "mean", "p50", "p90", "p99", "maximum")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """How a length is distributed; a percentile is a length that at least that share is within."""

    rows: int
    minimum: int
    mean: float
    p50: int
    p90: int
    p99: int
    maximum: int


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
    hopeless_labels: Mapping[str, tuple[int, str]]
    """Plans that no prediction can match: by reason their number, and the key of the first."""
    unknown_tools: Mapping[str, int]
    """Calls of tools that the catalogue does not know; plans with them cannot be scored."""
    plans_with_unknown_tools: int

    @property
    def problem_count(self) -> int:
        """Count what makes entries, or their labels, unusable."""
        return self.read.problem_count + self.plans_with_unknown_tools

    def render_text(self) -> str:
        """Return the figures as plain text for the terminal."""
        from tinyagent_fast.display import size_text

        read = self.read
        points = ", ".join(f"{count:,} {kind}" for kind, count in self.point_counts.items())
        json_lines = (
            "note: it is read as JSON Lines",
            "  why: it has an object on each line, where the published files are one object",
            "  fix: nothing; every command reads JSON Lines too",
        )
        lines = [
            f"{self.path}: {size_text(read.size_bytes)}, sha256 {read.file_sha256}",
            *(json_lines if read.json_lines else ()),
            f"entries: {read.entries:,} usable, {read.skipped:,} not; points: {points}",
            "steps per plan (without join):",
            *(f"  {steps:>4}  {count:>8,}" for steps, count in self.steps_per_plan.items()),
            "calls per tool:",
            *(f"  {count:>8,}  {tool}" for tool, count in self.tool_counts.items()),
            "",
        ]
        for kind, lengths in self.lengths.items():
            lines += [*self._lengths_text(kind, lengths), ""]
        for reason, (count, key) in self.hopeless_labels.items():
            lines.append(
                f"labels that can never succeed: {count:,}, the first in {key}: {reason} (they are "
                "trained on, and count as failures wherever they are tested)"
            )
        lines += [*self._leaks_text(), ""]
        if read.problem_count:
            lines.append(f"problems: {read.problem_count:,} in {read.skipped:,} entries")
            lines += [f"  {line}" for line in read.problem_lines()]
        if self.plans_with_unknown_tools:
            lines += [
                f"problems: {self.plans_with_unknown_tools:,} labels call tools outside the "
                f"catalogue: {', '.join(self.unknown_tools)}",
                "  why: such labels cannot be scored, so `train` and `eval` refuse them in a test "
                "file",
                "  fix: name the catalogue of these tools: --catalogue FILE here, "
                "--data.catalogue FILE for `train`",
            ]
        if not self.problem_count:
            lines.append("problems: none")
        return "\n".join(lines)

    def _lengths_text(self, kind: str, lengths: KindLengths) -> Iterator[str]:
        yield f"{self.unit} per {kind} row:"
        yield f"  {'':8}" + "".join(f"{column:>9}" for column in _COLUMNS)
        for part, summary in lengths.parts.items():
            values = (round(getattr(summary, column)) for column in _COLUMNS)
            yield f"  {part:8}" + "".join(f"{value:>9,}" for value in values)
        yield f"  supervised: {lengths.supervised_share:.1%} of all {self.unit}"
        yield f"  shared by all {kind} rows at the start: {lengths.shared_prefix:,} {self.unit}"
        if self.max_length_tokens is not None:
            over = lengths.over_long_rows
            known = "unknown, no tokenizer" if over is None else f"{over:,}"
            yield f"  rows over {self.max_length_tokens:,} tokens: {known}"

    def _leaks_text(self) -> Iterator[str]:
        yield "repeated queries (exact / ignoring case and punctuation):"
        for split in self.leaks.within:
            yield f"  within {split.name}: {split.exact:,} / {split.normalised:,} of {split.rows:,}"
        for pair in self.leaks.between:
            yield (
                f"  {pair.first} and {pair.second} share: {pair.exact:,} / {pair.normalised:,} "
                f"({pair.rows_in_first:,} entries of {pair.first}, "
                f"{pair.rows_in_second:,} of {pair.second})"
            )
            if pair.first == _THIS_FILE and pair.rows_in_first:
                yield (
                    f"    training leaves out these {pair.rows_in_first:,} entries if "
                    f"{pair.second} is its test file (--data.leaks drop, the default)"
                )
        for name, skipped in self.other_skipped.items():
            if skipped:
                yield f"  {name}: {skipped:,} unusable entries were not compared"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How rows become lengths."""

    render: Render
    encode: Encode | None = None
    """Gives the token ids of texts; without it, words and punctuation marks are counted."""
    max_length_tokens: int | None = None
    """Rows with more tokens in all are counted as over-long."""

    @property
    def unit(self) -> str:
        """What is counted: tokens or words."""
        return "words" if self.encode is None else "tokens"

    def rows(self, examples: Iterator[Example]) -> Iterator[tuple[Example, list[Any], int, int]]:
        """Give each example with its prompt in units, and the units of user text and completion."""
        count: Callable[[list[str]], Sequence[list[Any]]] = self.encode or _words
        while batch := list(islice(examples, _ROWS_PER_CALL)):
            prompts, completions = zip(*map(self.render, batch), strict=True)
            encoded = iter(count([*prompts, *(example.user for example in batch), *completions]))
            parts = [list(islice(encoded, len(batch))) for _ in range(3)]
            for example, prompt, user, output in zip(batch, *parts, strict=True):
                yield example, prompt, len(user), len(output)


class _Lengths:
    """Lengths of the rows of one kind, and the beginning that all their prompts share so far."""

    def __init__(self, first_prompt: list[Any]) -> None:
        self.parts = {part: array("q") for part in ("system", "user", "output", "total")}
        self.prefix = first_prompt

    def add(self, prompt: list[Any], user: int, output: int) -> None:
        """Count one row in."""
        lengths = (max(0, len(prompt) - user), user, output, len(prompt) + output)
        for part, length in zip(self.parts.values(), lengths, strict=True):
            part.append(length)
        if prompt[: len(self.prefix)] != self.prefix:
            pairs = zip(self.prefix, prompt, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self.prefix = prompt[:same]

    @property
    def rows(self) -> int:
        """Count the rows."""
        return len(self.parts["total"])

    def summary(self, measure: Measure) -> KindLengths:
        """Sum up all rows."""
        totals = self.parts["total"]
        limit = measure.max_length_tokens if measure.encode is not None else None
        return KindLengths(
            parts={part: summarise_lengths(lengths) for part, lengths in self.parts.items()},
            supervised_share=sum(self.parts["output"]) / max(1, sum(totals)),
            shared_prefix=len(self.prefix),
            over_long_rows=None if limit is None else sum(total > limit for total in totals),
        )


class _Plans:
    """What plans call so far, and what is wrong with them."""

    def __init__(self, judge: Judge, known_tools: Collection[str] | None) -> None:
        self.judge, self.known_tools = judge, known_tools
        self.steps: Counter[int] = Counter()
        self.tools: Counter[str] = Counter()
        self.hopeless: dict[str, tuple[int, str]] = {}
        self.with_unknown_tools = 0

    def add(self, example: Example) -> None:
        """Count one plan in."""
        called = [step.tool for step in plan_steps(example.output) if step.tool != "join"]
        self.steps[len(called)] += 1
        self.tools.update(called)
        self.with_unknown_tools += any(map(self.is_unknown, called))
        if reason := self.judge(example.output):
            number, first = self.hopeless.get(reason, (0, example.key))
            self.hopeless[reason] = (number + 1, first)

    def is_unknown(self, tool: str) -> bool:
        """Say whether the catalogue, if one was given, lacks a tool."""
        return self.known_tools is not None and tool not in self.known_tools


def check_file(
    path: str | Path,
    measure: Measure,
    *,
    others: Mapping[str, str | Path] | None = None,
    judge: Judge = lambda _label: None,
    known_tools: Collection[str] | None = None,
    on_progress: Callable[[int], None] = lambda _entries: None,
) -> DataCheck:
    """Read a dataset file once and describe it; unusable entries are listed, not raised.

    Args:
        path: The JSON data file.
        measure: Gives the lengths of rows.
        others: More data files by name (not "this file"), to look for the same queries in them.
        judge: Finds labels that can never succeed.
        known_tools: Names of the tools that plans may call; None looks for no others.
        on_progress: Called with the entries of this file that were read.

    Raises:
        DataError: A file is no dataset file at all, or has no usable entry.
    """
    queries: list[str] = []
    reports: list[ReadReport] = []

    def examples() -> Iterator[Example]:
        for entry in read_entries(path, on_bad_entry="skip", on_report=reports.append):
            queries.append(entry.query)
            on_progress(len(queries))
            yield from entry.examples

    kinds: dict[str, _Lengths] = {}
    plans = _Plans(judge, known_tools)
    for example, prompt, user, output in measure.rows(examples()):
        kinds.setdefault(example.kind, _Lengths(prompt)).add(prompt, user, output)
        if example.kind != "join":
            plans.add(example)
    splits = {_THIS_FILE: queries}
    skipped: dict[str, int] = {}
    for name, other in (others or {}).items():
        entries = read_entries(other, on_bad_entry="skip", on_report=reports.append)
        splits[name] = [entry.query for entry in entries]
        skipped[name] = reports[-1].skipped
    calls = dict(plans.tools.most_common())
    return DataCheck(
        path=str(path),
        unit=measure.unit,
        max_length_tokens=measure.max_length_tokens,
        read=reports[0],
        point_counts={kind: lengths.rows for kind, lengths in kinds.items()},
        steps_per_plan=dict(sorted(plans.steps.items())),
        tool_counts=calls,
        lengths={kind: lengths.summary(measure) for kind, lengths in kinds.items()},
        leaks=leak_report(splits),
        other_skipped=skipped,
        hopeless_labels=dict(sorted(plans.hopeless.items(), key=lambda item: -item[1][0])),
        unknown_tools={name: count for name, count in calls.items() if plans.is_unknown(name)},
        plans_with_unknown_tools=plans.with_unknown_tools,
    )


def _words(texts: list[str]) -> list[list[str]]:
    return [_WORD.findall(text) for text in texts]


def summarise_lengths(lengths: Sequence[int]) -> LengthSummary:
    """Summarise at least one length."""
    import numpy

    shares = numpy.percentile(lengths, (0, 50, 90, 99, 100), method="inverted_cdf")
    minimum, p50, p90, p99, maximum = map(int, shares)
    return LengthSummary(
        rows=len(lengths),
        minimum=minimum,
        mean=sum(lengths) / len(lengths),
        p50=p50,
        p90=p90,
        p99=p99,
        maximum=maximum,
    )
