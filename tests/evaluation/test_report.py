"""An evaluation as Markdown: the figures, and no text of a model breaks out of its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tinyagent_fast.evaluation.report import explain_failure, fenced, markdown_report, plain
from tinyagent_fast.evaluation.scoring import Prediction, score_all, summarise

LABEL = '1. open_note("a", "")\n2. join()'
RIGHT = Prediction(
    key="k", query="Open a", label=LABEL, prediction=LABEL, stop_reason="stop", new_tokens=3
)
WRONG = replace(RIGHT, query="# Open | *a*\nnow", prediction="1. join()\n```\n# heading")


def report(title: str, rows: Sequence[Prediction]) -> list[str]:
    plans = score_all(rows)
    metrics = summarise([plan.score for plan in plans])
    return markdown_report(title, metrics, plans, None).splitlines()


def test_figures_causes_and_the_first_failing_plans_are_told() -> None:
    rows = [RIGHT, *(replace(WRONG, key=str(at)) for at in range(12))]
    lines = report("runs/a", rows)
    assert lines[0] == "# runs/a"
    assert "**plan success 7.7 % (1.4 - 33.3), n = 13** (95 % Wilson interval)" in lines
    assert "| missing_tool | 12 | " in "\n".join(lines)
    assert "| 1 | 13 | 7.7 % (1.4 - 33.3) |" in lines
    assert lines.count("missing_tool: The calls differ: missing 1 x open_note.") == 10


def test_no_query_and_no_plan_breaks_out_of_its_place() -> None:
    lines = report("a", [WRONG])
    assert r"### \# Open \| \*a\* now" in lines
    start, end = (at for at, line in enumerate(lines) if line.startswith("````"))
    assert "# heading" in lines[start:end]


def test_a_fence_is_longer_than_any_in_the_text() -> None:
    assert fenced("a\n````\nb").splitlines()[::4] == ["`````text", "`````"]
    assert fenced("a").splitlines() == ["```text", "a", "```"]
    assert plain("a\n- b\n\n1. c") == "a - b 1. c"
    assert plain("a_b *c* _d_") == r"a_b \*c\* \_d\_"


@pytest.mark.parametrize(
    ("prediction", "reason"),
    [
        ('1. fly("x")\n2. join()', "The plan calls tools that do not exist: fly."),
        ("1. open_note(x)\n2. join()", "are not Python literals"),
        ('1. open_note("$7", "")\n2. join()', "refers to $7"),
        ('1. open_note("a", "")', "does not end with join()"),
        ("", "there is no step in the text"),
        ('1. open_note("b", "")\n2. join()', "only the published metric differs"),
        ("1. join()", "The calls differ: missing 1 x open_note."),
    ],
)
def test_the_explanation_of_a_failure_names_what_is_wrong(prediction: str, reason: str) -> None:
    assert reason in explain_failure(replace(RIGHT, prediction=prediction), None)


def test_a_broken_label_is_said_to_be_broken() -> None:
    told = explain_failure(replace(RIGHT, label="open_note"), None)
    assert told.startswith("The label itself is at fault")
