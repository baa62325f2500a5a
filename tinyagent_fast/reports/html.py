"""A run as one HTML file that needs no network and no script."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinyagent_fast import __version__
from tinyagent_fast.config import dump_config
from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.comparison import compare_predictions
from tinyagent_fast.evaluation.report import percent
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.reports.breakdown import gallery
from tinyagent_fast.reports.cases import case_card, legend
from tinyagent_fast.reports.markup import NOTHING, Markup, element, table, text
from tinyagent_fast.reports.reading import RunContents
from tinyagent_fast.reports.style import STYLE
from tinyagent_fast.reports.svg_plots import Axes, Band, Line, line_chart, share_bar
from tinyagent_fast.reports.tables import (
    Cell,
    FactTable,
    Share,
    cell_text,
    duration,
    other_tables,
    result_tables,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, *content: Markup) -> str:
    """Put content into a whole page.

    Args:
        title: Of the window.
        content: What the body shows.

    Returns:
        The HTML file's text.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Should markup ever slip in with a text, the browser still loads and runs nothing.
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", text(title)),
        element("style", Markup(STYLE)),
    )
    made_by = element("p", text(f"written by tinyagent-fast {__version__}"), class_="dim")
    body = element("body", *content, element("footer", made_by))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def run_page(contents: RunContents) -> str:
    """Write the report of a run.

    Args:
        contents: What the run's folder holds.

    Returns:
        The HTML file's text; a run with nothing but its config gives one too.
    """
    results = [section_of(facts) for facts in result_tables(contents)]
    sections = [
        *results[:1],
        *_charts(contents),
        *results[1:],
        *_gallery(contents),
        *(section_of(facts) for facts in other_tables(contents)),
        _config(contents),
    ]
    head = (_header(contents), _headline(contents), _notes(contents), _contents(sections))
    return page(f"tinyagent-fast run {contents.name}", *head, *(one.markup() for one in sections))


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading that can be linked to."""

    title: str
    content: tuple[Markup, ...]

    @property
    def anchor(self) -> str:
        """Name of the place in the page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def markup(self) -> Markup:
        """Write the section.

        Returns:
            A `section` with its heading.
        """
        heading = element("h2", text(self.title))
        return element("section", heading, *self.content, id=self.anchor)


def _contents(sections: Sequence[Section]) -> Markup:
    links = (element("a", text(one.title), href=f"#{one.anchor}") for one in sections)
    return element("nav", *links)


def _header(contents: RunContents) -> Markup:
    config = contents.config
    facts = [f"preset {config.preset}", f"base {config.model.base}"]
    if contents.steps:
        facts.append(f"{contents.steps[-1].step:,} steps")
    if "all" in contents.timings_s:
        facts.append(duration(contents.timings_s["all"]))
    return element(
        "header",
        element("h1", text(f"Run {contents.name}")),
        element("p", text(" \u00b7 ".join(facts)), class_="dim"),
    )


def _headline(contents: RunContents) -> Markup:
    main = contents.main
    if main is None:
        told = text("No plan success on test queries yet.")
        last = contents.validations[-1] if contents.validations else None
        if last is not None:
            told = text(
                f"No plan success on test queries yet; on {last.success.total} validation queries "
                f"at step {last.step}: {percent(last.success)}."
            )
        return element("p", told)
    success = main.metrics.success
    low, high = success.interval
    lines = [
        element("p", text(f"{100 * success.share:.1f} %"), class_="big"),
        element(
            "p",
            text(
                f"plan success, 95 % Wilson interval {100 * low:.1f} to {100 * high:.1f} %: "
                f"{success.count} of {success.total} test queries ({main.name})"
            ),
        ),
    ]
    before = contents.evaluations.get("test/before")
    if before is not None:
        lines.append(element("p", text(_gain(contents)), class_="dim"))
    return element("section", *lines)


def _gain(contents: RunContents) -> str:
    """Say what training changed, where the same queries were planned before it."""
    main, before = contents.main, contents.evaluations["test/before"]
    assert main is not None
    told = f"before training {percent(before.metrics.success)}"
    try:
        compared = compare_predictions(before.predictions, main.predictions, contents.tools)
    except DataError:
        return f"{told}, on other queries"
    return f"{told}; change {compared.points()} points, McNemar p = {compared.mcnemar_p:.2g}"


def _notes(contents: RunContents) -> Markup:
    if not contents.notes:
        return NOTHING
    items = (element("li", text(note)) for note in contents.notes)
    heading = element("strong", text("Not in this report, or to be taken with care"))
    return element("div", heading, element("ul", *items), class_="callout")


def section_of(facts: FactTable) -> Section:
    """Write a table with its heading; shares get a bar.

    Args:
        facts: The table.

    Returns:
        A section.
    """
    notes = [element("p", text(facts.note), class_="dim")] if facts.note else []
    rows = ([_cell(cell) for cell in row] for row in facts.rows)
    return Section(facts.title, (*notes, table(facts.head, rows, facts.marked)))


def _cell(cell: Cell) -> Markup:
    words = text(cell_text(cell))
    if isinstance(cell, Share):
        return _with_bar(words, share_bar(cell.share))
    if isinstance(cell, Proportion) and cell.total:
        return _with_bar(words, share_bar(cell.share, cell.interval))
    return words


def _with_bar(words: Markup, bar: Markup) -> Markup:
    return element("div", words, bar, class_="bars")


def _charts(contents: RunContents) -> list[Section]:
    if not contents.steps and not contents.validations:
        return []
    return [Section("Training", (element("div", *_curves(contents), class_="charts"),))]


def _curves(contents: RunContents) -> Iterator[Markup]:
    steps, checks = contents.steps, contents.validations
    x = "optimizer step"
    loss = [(s.step, s.loss) for s in steps if s.loss is not None]
    checked = [(v.step, v.loss) for v in checks if v.loss is not None]
    lines = [Line(name="training", points=loss, style="a")]
    lines.append(Line(name="validation", points=checked, style="b", markers=True))
    yield line_chart(Axes(title="Loss", x=x, y="nats per token", log_y=True), lines)
    success = [(v.step, 100 * v.success.share) for v in checks]
    bounds = [(v.step, 100 * low, 100 * high) for v in checks for low, high in [v.success.interval]]
    queries = checks[-1].success.total if checks else 0
    yield line_chart(
        Axes(title=f"Plan success on {queries} validation queries", x=x, y="%", y_range=(0, 100)),
        [
            Line(name="success", points=success, style="a", markers=True),
            Line(
                name="best, kept as the adapter",
                points=[(v.step, 100 * v.success.share) for v in checks if v.best][-1:],
                style="b",
                markers=True,
            ),
        ],
        Band(name="95 % Wilson interval", points=bounds, style="a") if bounds else None,
    )
    others = (
        ("Learning rate", "", [(s.step, s.learning_rate) for s in steps]),
        ("Speed", "tokens/s", [(s.step, s.tokens_per_s) for s in steps]),
        ("Memory", "GiB", [(s.step, s.memory_gib) for s in steps]),
    )
    for title, unit, values in others:
        points = [(step, value) for step, value in values if value is not None]
        if points:
            yield line_chart(
                Axes(title=title, x=x, y=unit), [Line(name=title.lower(), points=points, style="a")]
            )


def _gallery(contents: RunContents) -> list[Section]:
    main = contents.main
    chosen = gallery(main.plans) if main is not None else []
    if main is None or not chosen:
        return []
    failed = main.metrics.n - main.metrics.success.count
    of_each = Counter(plan.score.failure for plan in chosen)
    shares = ", ".join(f"{n} {code}" for code, n in of_each.items())
    note = f"{len(chosen)} of {failed} failing plans, taken in turn from every cause: {shares}."
    cards = (
        case_card(
            query=plan.prediction.query,
            tag=plan.score.failure or "",
            label=plan.prediction.label,
            prediction=plan.prediction.prediction,
            tools=contents.tools,
        )
        for plan in chosen
    )
    return [Section("Failing plans", (element("p", text(note)), legend(), *cards))]


def _config(contents: RunContents) -> Section:
    written = element("pre", text(dump_config(contents.config)))
    shown = element("details", element("summary", text("config.yaml")), written)
    return Section("Config", (shown,))
