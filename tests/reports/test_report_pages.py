"""`report` writes one page that needs nothing else, and Markdown that says the same."""

from __future__ import annotations

import json
import re
from dataclasses import field, make_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import show_as
from hypothesis import given
from hypothesis import strategies as st
from selenium.webdriver import Chrome

from tinyagent_fast.cli import main
from tinyagent_fast.errors import printable
from tinyagent_fast.evaluation import scoring
from tinyagent_fast.evaluation.scoring import Prediction
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.reports.flips import ComparedPlanner, flipped_plans
from tinyagent_fast.reports.pages import compare_page, run_markdown, run_page
from tinyagent_fast.reports.reading import read_run
from tinyagent_fast.reports.tables import result_tables
from tinyagent_fast.runs import Run

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Reads a page and fails on tags that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data


def assert_self_contained(source: str, page: Page) -> None:
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src", "srcset", "action", "data", "xlink:href"):
            assert value.startswith("#"), value
        assert "url(" not in value or value.startswith("url(#"), value
    styles = re.findall(r"<style>(.*?)</style>", source, flags=re.S)
    assert len(styles) == 1
    assert not re.search(r"url\(|@import|http", styles[0])
    assert {"script", "link", "img", "iframe", "object", "base", "form"}.isdisjoint(page.tags)


def test_a_run_with_nothing_but_its_config_gives_a_report(
    bare_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report"]) == 0
    out = capsys.readouterr().out
    assert "no plan success on test queries yet" in out
    assert "note: history.jsonl is missing" in out
    source = (bare_run.path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert_self_contained(source, page)
    assert "history.jsonl is missing" in page.words
    assert "history.jsonl is missing" in (bare_run.path / "report.md").read_text(encoding="utf-8")


def test_the_page_needs_no_network_and_no_script_and_shows_texts_as_they_are(
    full_run: Run,
) -> None:
    source = run_page(read_run(full_run))
    page = Page(source)
    assert_self_contained(source, page)
    query = '</script><b onclick="x">note & "quotes" `ticks` | pipe \\u202e\n# heading'
    assert page.words.count(query) >= 7
    assert "b" not in page.tags
    source.encode("utf-8")


TEXTS = st.text(max_size=40) | st.sampled_from(
    [
        "</script><b>x",
        "</title></style><script>alert(1)</script>",
        "<!--",
        "]]>",
        '" onload="x',
        "&lt;b&gt;",
        "{{ 1 + 1 }}",
        '1. <b>("<i>")\n2. join()',
    ]
)


@given(TEXTS)
def test_no_text_of_a_model_or_dataset_becomes_markup(value: str) -> None:
    def planner(name: str, prediction: str) -> ComparedPlanner:
        row = Prediction(
            key="k",
            query=value,
            label='1. open_note("n", "")\n2. join()',
            prediction=prediction,
            stop_reason="stop",
            new_tokens=1,
        )
        return ComparedPlanner(name=name, folder=Path("x"), predictions=(row,))

    a, b = planner(f"a{value}", value), planner("b", '1. open_note("n", "")\n2. join()')
    usual = Page(compare_page(flipped_plans(planner("a", "x"), b, None)))
    source = compare_page(flipped_plans(a, b, None))
    page = Page(source)
    assert_self_contained(source, page)
    of_drawings = {"g", "rect", "svg", "text", "tspan", "path"}
    assert {*page.tags} - of_drawings == {*usual.tags} - of_drawings
    shown = printable(value).replace("\r\n", "\n").replace("\r", "\n")
    assert shown in page.words or not flipped_plans(a, b, None).flips
    source.encode("utf-8")


def test_a_metric_that_is_added_is_shown_everywhere(
    full_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As CONTRIBUTING.md says: a field of both dataclasses and a row of the table."""
    added: dict[type, tuple[str, Any, Any]] = {
        scoring.PairScore: ("brief", bool, field(default=True)),
        scoring.Metrics: ("brief", Proportion, field()),
    }
    for known, new in added.items():
        more = make_dataclass(known.__name__, [new], bases=(known,), frozen=True, kw_only=True)
        monkeypatch.setattr(scoring, known.__name__, more)
    row = replace(scoring.METRICS["success"], title="brevity", meaning="of a test")
    monkeypatch.setitem(scoring.METRICS, "brief", row)
    pairs = full_run.path / "pairs.json"
    pairs.write_text(json.dumps([{"label": "1. join()", "prediction": "1. join()"}]))
    outputs = {"page": run_page(read_run(full_run)), "report": run_markdown(read_run(full_run))}
    for words in (
        f"score {full_run.path}/test/after",
        f"score {full_run.path}/test/after --json",
        f"score --pairs {pairs}",
        f"score --pairs {pairs} --json",
        f"score --pairs {pairs} --json --summary",
    ):
        assert main(words.split()) == 0
        outputs[words] = capsys.readouterr().out
    for name, text in outputs.items():
        assert ("brief" if "--json" in name else "brevity") in text, name


def test_what_stands_between_backticks_is_shown_as_code(bare_run: Run) -> None:
    source = run_page(read_run(bare_run))
    assert "<code>tinyagent-fast export --run" in source
    assert "`" not in Page(source).words


def test_a_tool_that_a_plan_invents_is_marked_among_the_others(full_run: Run) -> None:
    rows = [row for table in result_tables(read_run(full_run)) for row in table.rows]
    marked = {str(row[0]) for row in rows if "unknown tool" in str(row[0])}
    assert marked == {"fly (unknown tool)"}


def test_the_page_has_every_part(full_run: Run) -> None:
    page = Page(run_page(read_run(full_run)))
    for words in (
        "20.0 %",
        "2 of 10 test queries (test/after)",
        "before training 0.0 %",
        "Not comparable with the published results",
        "TinyAgent-7B with ToolRAG",
        "84.95 %",
        "Plan success on 4 validation queries",
        "success_dag",
        "Success by number of calls",
        "Success by tool",
        "Why plans fail",
        "8 of 8 failing plans",
        "gguf/a-q4_k_m.gguf",
        "75.0 % (30.1 - 95.4)",
        "All 1 gates passed.",
        "+10.0 (",
        "no GPU, 2 CPU cores",
        "2 min 10 s",
    ):
        assert words in page.words, words
    anchors = {value for name, value in page.attributes if name == "id"}
    links = [value[1:] for name, value in page.attributes if name == "href"]
    assert set(links) <= anchors
    assert len(set(links)) == len(links) == page.tags.count("h2")
    assert page.tags.count("article") == 8


def test_markdown_has_the_same_figures_and_no_text_breaks_out(full_run: Run) -> None:
    text = run_markdown(read_run(full_run))
    assert "**plan success 20.0 % (5.7 - 51.0), n = 10 (test/after)**" in text
    assert "| TinyAgent-7B with ToolRAG | 84.95 % |" in text
    assert "Not comparable" in text
    assert "\n# heading" not in text
    assert "### \\</script\\>\\<b onclick" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 20


def test_the_page_and_the_markdown_go_where_out_says(full_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    assert main(["report", full_run.path.name, "--out", str(out)]) == 0
    assert out.exists()
    assert out.with_suffix(".md").exists()
    assert not (full_run.path / "report.html").exists()


def test_errors_say_what_to_do(bare_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run", "none"]) == 2
    assert "there is no such run" in capsys.readouterr().err
    assert main(["report", "--out", "x.pdf"]) == 2
    assert "ends in .html" in capsys.readouterr().err


def test_texts_that_no_file_can_hold_are_written_with_a_mark(full_run: Run) -> None:
    path = full_run.path / "test" / "after" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["query"] = "lone \ud800 surrogate"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert main(["report"]) == 0
    assert r"lone \ud800" in (full_run.path / "report.html").read_text(encoding="utf-8")
    assert r"lone \\ud800" in (full_run.path / "report.md").read_text(encoding="utf-8")


def test_a_phone_shows_the_page_without_scrolling_sideways(full_run: Run, browser: Chrome) -> None:
    assert main(["report"]) == 0
    show_as(browser, width=390)
    browser.get((full_run.path / "report.html").resolve().as_uri())

    def value(script: str) -> Any:
        return browser.execute_script(f"return {script}")

    assert value("document.documentElement.scrollWidth") == value("window.innerWidth") == 390
    assert value("document.querySelectorAll('article svg.plan-graph g.step').length") > 10
    assert value("document.querySelector('.big').textContent") == "20.0 %"
    assert value("document.querySelector('svg.plot').getBoundingClientRect().height") > 100
