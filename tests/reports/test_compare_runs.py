"""`compare` says whether one planner is better, how sure that is, and which plans flipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.cli import main
from tinyagent_fast.commands.compare import _text
from tinyagent_fast.config import Config
from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.scoring import Prediction, score_all
from tinyagent_fast.reports.flips import (
    ComparedPlanner,
    Flip,
    FlippedPlans,
    chosen_flips,
    flipped_plans,
)
from tinyagent_fast.reports.pages import compare_page
from tinyagent_fast.runs import Run, create_run

ONE = '1. open_note("n", "")\n2. join()'
TWO = '1. get_phone_number("A")\n2. send_sms(["$1"], "x")\n3. join()'
WRONG = "1. join()"


def planner(name: str, right: Sequence[bool], first: int = 0) -> ComparedPlanner:
    """Return a planner for queries whose labels have one call and two calls in turn."""
    labels = [ONE if at % 2 else TWO for at in range(first, first + len(right))]
    return ComparedPlanner(
        name=name,
        folder=Path(name),
        predictions=tuple(
            Prediction(
                key=f"k{at}",
                query=f"query </b> {at}",
                label=label,
                prediction=label if good else WRONG,
                stop_reason="stop",
                new_tokens=3,
            )
            for at, (label, good) in enumerate(zip(labels, right, strict=True), start=first)
        ),
    )


def compared(outcomes: Sequence[tuple[bool, bool]]) -> FlippedPlans:
    a, b = zip(*outcomes, strict=True)
    return flipped_plans(planner("a", a), planner("b", b), None)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_flips_are_the_queries_that_one_alone_gets_right(
    outcomes: list[tuple[bool, bool]],
) -> None:
    got = compared(outcomes)
    winners = Counter(flip.winner for flip in got.flips)
    assert winners["A"] == sum(a and not b for a, b in outcomes)
    assert winners["B"] == sum(b and not a for a, b in outcomes)
    assert all(flip.loser.score.failure == "missing_tool" for flip in got.flips)
    for side in ("A", "B"):
        by_calls = {c.group: c.only_a if side == "A" else c.only_b for c in got.by_calls}
        assert sum(by_calls.values()) == winners[side]
    of_one = next((c for c in got.by_calls if c.group == "1 call"), None)
    notes = next((c for c in got.by_tool if c.group == "open_note"), None)
    assert (of_one is None) == (notes is None)
    if of_one and notes:
        assert (of_one.queries, of_one.only_a) == (len(outcomes) // 2, notes.only_a)
    json.dumps(got.to_json())
    assert "query &lt;/b&gt;" in compare_page(got) or not got.flips


def test_the_verdict_follows_the_test_and_names_the_better_one() -> None:
    assert "B is better" in compared([(False, True)] * 12).verdict()
    assert "A is better" in compared([(True, False)] * 12).verdict()
    assert "No difference is shown" in compared([(False, True)] * 5).verdict()


def test_queries_of_one_alone_are_refused_or_counted() -> None:
    a, b = planner("a", [True] * 4), planner("b", [False] * 4, first=2)
    with pytest.raises(DataError, match="4 queries were planned by one alone"):
        flipped_plans(a, b, None)
    got = flipped_plans(a, b, None, common=True)
    assert (got.paired.n, got.left_out) == (2, 4)
    assert any("4 queries planned by one alone are left out" in line for line in got.lines())
    with pytest.raises(DataError):
        flipped_plans(a, planner("b", [True], first=9), None, common=True)


@pytest.mark.parametrize(
    ("of_a", "of_b", "shown"),
    [(30, 30, (12, 12)), (30, 2, (22, 2)), (3, 30, (3, 21)), (2, 1, (2, 1))],
)
def test_shown_flips_come_from_both_sides(of_a: int, of_b: int, shown: tuple[int, int]) -> None:
    (plan,) = score_all(planner("a", [False]).predictions)
    flips = [Flip("A", plan)] * of_a + [Flip("B", plan)] * of_b
    winners = Counter(one.winner for one in chosen_flips(flips, 24))
    assert (winners["A"], winners["B"]) == shown


@pytest.mark.parametrize("out", [".", "page", "page.md"])
def test_a_page_is_named_as_one_before_anything_is_read(
    out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "a", "b", "--out", out]) == 2
    assert ".html" in capsys.readouterr().err


def test_the_terminal_lists_flips_of_both_sides() -> None:
    shown = "\n".join(_text(compared([(True, False)] * 30 + [(False, True)] * 10)))
    every = shown.split("All flipped queries")[1]
    assert (every.count("A only"), every.count("B only")) == (6, 6)
    assert "and 28 more" in every


def test_two_evaluations_of_a_run_are_compared(
    full_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = full_run.path / "test" / "before", full_run.path / "test" / "after"
    assert main(["compare", str(before), str(after), "--html"]) == 0
    out = capsys.readouterr().out
    assert "B less A: +20.0 (" in out
    assert "McNemar p = 0.5" in out
    assert "No difference is shown by these 10 queries" in out
    assert "right in B only" in out
    pages = list(after.glob("compare-*.html"))
    assert len(pages) == 1
    page = pages[0].read_text(encoding="utf-8")
    assert page.count("<article") == 2
    assert "<b " not in page


def test_runs_are_found_by_name_and_the_evaluation_that_both_have_is_taken(
    full_run: Run, write_predictions: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    name = full_run.path.name
    write_predictions(Path("other") / "eval", [ONE] * 3)
    write_predictions(Path("other") / "test" / "after", [WRONG] * 10)
    assert main(["compare", name, "other", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["n"], got["difference"]) == (10, -0.2)
    assert got["b"] == "other/test/after"
    assert main(["compare", "other", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["a"] == "other/test/after"
    assert (
        main(["compare", f"{name}/test/after", "other/eval", "--common", "--out", "c/x.html"]) == 0
    )
    assert "7 queries planned by one alone are left out" in capsys.readouterr().out
    assert Path("c/x.html").exists()


def test_tasks_and_verdicts_of_both_runs_stand_beside_each_other(
    full_run: Run, write_predictions: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    other = create_run(Config(name="other"))
    write_predictions(other.path / "test" / "after", [WRONG] * 10)
    for run, done in ((full_run, 30), (other, 70)):
        metrics = agent_figures(done)
        (run.path / "agent").mkdir()
        (run.path / "agent" / "metrics.json").write_text(json.dumps(metrics))
    words = ["compare", full_run.path.name, "other", "--html"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "task success: A 30.0 % (21.9 - 39.6), B 70.0 % (60.4 - 78.1)" in said
    assert "joins: action accuracy: A 30.0 %" in said
    (page,) = other.path.glob("test/after/compare-*.html")
    assert "with faults, with replan" in page.read_text(encoding="utf-8")
    assert main([*words[:3], "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert [side["count"] for side in tasks["with faults, without replan"]] == [30, 70]
    (other.path / "agent" / "metrics.json").write_text("{")
    assert main(words) == 0
    assert "task success" not in capsys.readouterr().out


def agent_figures(done: int) -> dict[str, object]:
    """Figures of an evaluation in which so many of 100 tasks were done, and of all else too."""
    share = {"share": done / 100, "interval": [0, 1], "n": 100, "count": done}
    join = {"count": done, "total": 100}
    return {
        "task_success": share,
        "with_faults": {"without_replan": share, "with_replan": share},
        "joins": {"action_accuracy": join, "message_match": join},
    }


def test_errors_say_what_to_do(full_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", full_run.path.name, "nothing"]) == 2
    assert full_run.path.name in capsys.readouterr().err
    Path("bare").mkdir()
    assert main(["compare", full_run.path.name, "bare"]) == 2
    assert "tinyagent-fast eval --run bare" in capsys.readouterr().err
    assert main(["compare", full_run.path.name]) == 2
    Path("empty").mkdir()
    Path("empty/predictions.jsonl").touch()
    assert main(["compare", "empty", full_run.path.name]) == 2
    assert "no prediction" in capsys.readouterr().err
    assert main(["compare", full_run.path.name, ""]) == 2
    said = capsys.readouterr().err
    assert "B is empty" in said and "make compare A=run B=run" in said


def test_runs_for_different_tools_are_not_compared_in_silence(
    full_run: Run,
    write_predictions: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path(__file__).parents[2] / "tinyagent_fast" / "data" / "generation"
    own = Path("own.yaml")
    own.write_text(
        (source / "tinyagent.yaml").read_text(encoding="utf-8").replace("send_sms", "sms")
    )
    other = full_run.path.parent / "other"
    write_predictions(other / "test" / "after", [WRONG] * 10)
    config = full_run.config_path.read_text().replace("catalogue: null", f"catalogue: {own}")
    (other / "config.yaml").write_text(config)
    assert main(["compare", full_run.path.name, "other"]) == 2
    assert "--catalogue" in capsys.readouterr().err
    assert main(["compare", full_run.path.name, "other", "--catalogue", str(own)]) == 0
