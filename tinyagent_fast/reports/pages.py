"""A run, or two planners compared, as pages: one HTML file without network or script, or Markdown.

The templates escape every text by themselves; only drawings, which escape their own texts, come
in as markup.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tinyagent_fast import __version__
from tinyagent_fast.config import dump_config
from tinyagent_fast.errors import ConfigError, printable
from tinyagent_fast.evaluation.report import (
    FactTable,
    cell_text,
    explain_failure,
    failing_plan,
    headline,
    plain,
)
from tinyagent_fast.evaluation.scoring import ScoredPlan
from tinyagent_fast.plans.drawing import draw_plan, mark_differences
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.reports.charts import run_charts
from tinyagent_fast.reports.flips import FlippedPlans, chosen_flips
from tinyagent_fast.reports.reading import RunContents
from tinyagent_fast.reports.tables import (
    GALLERY_CASES,
    duration,
    gallery,
    other_tables,
    result_tables,
    training_gain,
)

_MARKDOWN_PLANS = 10
_BACKTICKS = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Case:
    """One failing plan beside its label."""

    plan: ScoredPlan
    tools: Mapping[str, Tool] | None
    names: tuple[str, str] = ("label", "prediction")
    tag: str = ""
    """Stands before the cause."""

    @property
    def reason(self) -> str:
        """Why the plan fails, in one sentence."""
        return explain_failure(self.plan.prediction, self.tools)

    def drawings(self) -> Iterator[tuple[str, Markup]]:
        """Draw both plans with their differences marked; gives names and `svg` elements."""
        row = self.plan.prediction
        label, prediction = (draw_plan(text, self.tools) for text in (row.label, row.prediction))
        for name, plan in zip(self.names, mark_differences(label, prediction), strict=True):
            yield name, Markup(plan.to_svg(name))


def checked_page(path: Path) -> Path:
    """Give a path back to which a page can be written.

    Raises:
        ConfigError: A browser would not take a file of that name for a page.
    """
    if path.suffix not in (".html", ".htm"):
        named = path / "page.html" if path.is_dir() else f"{path}.html"
        raise ConfigError(f"--out {path}", "a page's name ends in .html", f"--out {named}")
    return path


def run_page(contents: RunContents) -> str:
    """Write the HTML report of a run; one with nothing but its config gives one too."""
    failing = gallery(contents.main.plans if contents.main else ())
    template = _templates().get_template("run.html.j2")
    return template.render(
        contents=contents,
        gain=training_gain(contents),
        results=list(result_tables(contents)),
        charts=list(run_charts(contents.steps, contents.validations)),
        cases=[Case(plan, contents.tools) for plan in failing],
        causes=Counter(plan.score.failure for plan in failing),
        others=list(other_tables(contents)),
        config=dump_config(contents.config),
    )


def run_markdown(contents: RunContents) -> str:
    """Write the report of a run as Markdown, for terminals and pull requests."""
    results = list(result_tables(contents))
    if contents.validations:
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
        results.append(FactTable(title="During training", head=head, rows=rows))
    lines = [f"# Run {plain(contents.name)}\n", f"**{run_headline(contents)}**\n"]
    if contents.notes:
        lines += ["Not in this report, or to be taken with care:\n"]
        lines += [*(f"- {plain(note)}" for note in contents.notes), ""]
    lines += [table.to_markdown() for table in results]
    if plans := gallery(contents.main.plans if contents.main else (), _MARKDOWN_PLANS):
        told = f"{len(plans)} of them, taken in turn from every cause; report.html has more."
        lines += ["## Failing plans\n", f"{told}\n"]
        lines += [failing_plan(plan, contents.tools) for plan in plans]
    return "\n".join((*lines, *(table.to_markdown() for table in other_tables(contents))))


def run_headline(contents: RunContents) -> str:
    """Say a run's result in one line."""
    if contents.main is None:
        return "no plan success on test queries yet"
    return f"{headline(contents.main.metrics)} ({contents.main.name})"


def compare_page(compared: FlippedPlans) -> str:
    """Write the comparison of two planners as an HTML page."""
    *groups, every = compared.tables()
    paired = compared.paired
    success = FactTable(
        title="Plan success",
        head=("", "planner", "success"),
        rows=(
            ("A", compared.a.name, paired.success_a),
            ("B", compared.b.name, paired.success_b),
        ),
    )
    cases = [
        Case(
            plan=flip.loser,
            tools=compared.tools,
            names=("label", f"plan of {'B' if flip.winner == 'A' else 'A'}"),
            tag=f"right in {flip.winner} only: ",
        )
        for flip in chosen_flips(compared.flips, GALLERY_CASES)
    ]
    template = _templates().get_template("compare.html.j2")
    tables = [success, *groups]
    return template.render(compared=compared, tables=tables, every=every, cases=cases)


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("tinyagent_fast.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    templates.globals |= {"version": __version__}
    templates.filters |= {
        "anchor": _anchor,
        "cell": cell_text,
        "code": _code,
        "duration": duration,
    }
    return templates


def _code(text: str) -> Markup:
    """Show what stands between backticks as code."""
    shown = str(escape(printable(text)))
    return Markup(_BACKTICKS.sub(r"<code>\1</code>", shown))


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
