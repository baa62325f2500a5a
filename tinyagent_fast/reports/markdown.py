"""A run as Markdown, for terminals and pull requests: the tables of the page, and a few plans."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tinyagent_fast.evaluation.report import explain_failure, headline
from tinyagent_fast.reports.breakdown import gallery
from tinyagent_fast.reports.markup import printable
from tinyagent_fast.reports.reading import RunContents
from tinyagent_fast.reports.tables import FactTable, cell_text, other_tables, result_tables

_SHOWN_PLANS = 10
_MARKS = re.compile(r"([\\`*\[\]<>|#~&$]|(?<!\w)_|_(?!\w))")
_BACKTICKS = re.compile(r"`{3,}")


def run_markdown(contents: RunContents) -> str:
    """Write the report of a run.

    Args:
        contents: What the run's folder holds.

    Returns:
        Markdown.
    """
    return "\n".join(_lines(contents)) + "\n"


def run_headline(contents: RunContents) -> str:
    """Say a run's result in one line.

    Args:
        contents: What the run's folder holds.

    Returns:
        For the terminal.
    """
    if contents.main is None:
        return "no plan success on test queries yet"
    return f"{headline(contents.main.metrics)} ({contents.main.name})"


def _lines(contents: RunContents) -> Iterator[str]:
    yield from (f"# Run {plain(contents.name)}", "", f"**{run_headline(contents)}**", "")
    if contents.notes:
        yield from ("Not in this report, or to be taken with care:", "")
        yield from (f"- {plain(note)}" for note in contents.notes)
        yield ""
    for facts in result_tables(contents):
        yield from _table(facts)
    yield from _training(contents)
    yield from _plans(contents)
    for facts in other_tables(contents):
        yield from _table(facts)


def _table(facts: FactTable) -> Iterator[str]:
    yield from (f"## {facts.title}", "")
    if facts.note:
        yield from (plain(facts.note), "")
    yield f"| {' | '.join(facts.head)} |"
    yield f"|{'---|' * len(facts.head)}"
    for row in facts.rows:
        yield f"| {' | '.join(plain(cell_text(cell)) for cell in row)} |"
    yield ""


def _training(contents: RunContents) -> Iterator[str]:
    if not contents.validations:
        return
    best = [v.step for v in contents.validations if v.best][-1:]
    rows = tuple(
        (
            f"{v.step}{' (best)' if v.step in best else ''}",
            v.success,
            "" if v.loss is None else f"{v.loss:.4f}",
        )
        for v in contents.validations
    )
    head = ("step", "success on validation queries", "validation loss")
    yield from _table(FactTable(title="During training", head=head, rows=rows))


def _plans(contents: RunContents) -> Iterator[str]:
    chosen = gallery(contents.main.plans, _SHOWN_PLANS) if contents.main else []
    if not chosen:
        return
    yield from ("## Failing plans", "")
    yield from (f"{len(chosen)} of them, taken in turn from every cause; report.html has more.", "")
    for plan in chosen:
        row = plan.prediction
        reason = explain_failure(row.label, row.prediction, contents.tools)
        yield from (f"### {plain(row.query)}", "", f"{plan.score.failure}: {plain(reason)}", "")
        yield from fenced(f"{row.label}\n--- predicted\n{row.prediction}")


def plain(value: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line.

    Args:
        value: The text.

    Returns:
        The text with its marks escaped and its line breaks as spaces.
    """
    return _MARKS.sub(r"\\\1", " ".join(printable(value).split()))


def fenced(value: str) -> Iterator[str]:
    """Write a text as a block that no text can end early.

    Args:
        value: The text.

    Yields:
        Lines.
    """
    shown = printable(value)
    longest = max((len(found) for found in _BACKTICKS.findall(shown)), default=2)
    fence = "`" * (longest + 1)
    yield from (f"{fence}text", shown, fence, "")
