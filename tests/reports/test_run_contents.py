"""A run's folder is read whole; whatever is missing, broken or doubtful is said and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import dump_config
from tinyagent_fast.errors import UserError
from tinyagent_fast.evaluation.scoring import FAILURE_CODES, Prediction, score_all
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.presets import preset_config
from tinyagent_fast.reports.charts import run_charts
from tinyagent_fast.reports.pages import run_markdown
from tinyagent_fast.reports.reading import RunContents, number, read_run
from tinyagent_fast.reports.tables import (
    PUBLISHED_TEST_QUERIES,
    cause_rows,
    comparability,
    gallery,
    other_tables,
    tool_rows,
)
from tinyagent_fast.runs import Run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RIGHT = '1. open_note("n", "")\n2. join()'
NO_CALL = "1. join()"


def told(contents: RunContents, words: str) -> bool:
    return any(words in note for note in contents.notes)


def test_a_run_with_nothing_but_its_config_says_what_is_missing(bare_run: Run) -> None:
    contents = read_run(bare_run)
    assert contents.main is None
    assert not contents.steps
    assert not contents.validations
    for words in ("history.jsonl is missing", "data.json is missing", "eval/, test/after/"):
        assert told(contents, words)
    assert told(contents, "nothing was exported")
    assert told(contents, "the training is unfinished")


def test_everything_that_is_there_is_read(full_run: Run) -> None:
    contents = read_run(full_run)
    assert contents.notes == ()
    assert contents.main is not None
    assert contents.main.name == "test/after"
    assert contents.main.metrics.success == Proportion(2, 10)
    assert set(contents.evaluations) == {"test/before", "test/after", "eval-gguf-a-q4_k_m"}
    assert list(contents.steps) == [10, 20, 30, 40]
    assert contents.steps[10]["loss"] == 0.2
    assert [v.success for v in contents.validations] == [Proportion(1, 4), Proportion(3, 4)]
    assert contents.timings_s == {"steps": 65.0, "all": 130.2}
    assert contents.export is not None
    assert [file.path for file in contents.export.artefacts] == ["gguf/a-q4_k_m.gguf"]
    assert contents.export.success == {"q4_k_m": Proportion(3, 4)}
    assert contents.export.verdict() == "All 1 gates passed."


def test_the_newer_evaluation_gives_the_headline(
    full_run: Run, write_predictions: Callable[..., None]
) -> None:
    write_predictions(full_run.path / "eval", [NO_CALL] * 10)
    contents = read_run(full_run)
    assert contents.main is not None
    assert contents.main.name == "eval"


def test_fewer_queries_another_test_file_and_another_adapter_are_said(
    full_run: Run, write_predictions: Callable[..., None]
) -> None:
    folder = full_run.path / "eval"
    write_predictions(folder, [NO_CALL] * 4)
    assert told(read_run(full_run), "eval holds 4 of the run's 10 test queries")
    made_with = {"test_sha256": "other", "adapter_sha256": "other"}
    (folder / "made_with.json").write_text(json.dumps(made_with))
    (full_run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    contents = read_run(full_run)
    assert told(contents, "another test file")
    assert told(contents, "another adapter")


@pytest.mark.parametrize("name", ["data.json", "timings.json", "environment.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\x00", '{"a": ' * 20_000])
def test_a_broken_file_is_left_out_and_named(full_run: Run, name: str, content: str) -> None:
    (full_run.path / name).write_text(content)
    contents = read_run(full_run)
    assert any(note.startswith(name) and "left out" in note for note in contents.notes)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"artefacts": 3, "gates": [], "passed": 1}'])
def test_a_broken_export_record_is_left_out_and_named(full_run: Run, content: str) -> None:
    (full_run.path / "export" / "export.json").write_text(content)
    contents = read_run(full_run)
    assert contents.export is None
    assert told(contents, "export/export.json cannot be read")


def test_half_a_line_of_predictions_leaves_that_evaluation_out(full_run: Run) -> None:
    with (full_run.path / "test" / "after" / "predictions.jsonl").open("a") as stream:
        stream.write('{"key": "half')
    contents = read_run(full_run)
    assert contents.main is None
    assert told(contents, "test/after is left out")


def test_broken_and_repeated_lines_of_history_are_counted(full_run: Run) -> None:
    with full_run.history_path.open("a") as stream:
        stream.write('{"event": "step", "st\nnull\n{"event": "early stop", "step": 40}\n')
        stream.write('{"event": "step", "step": 40, "loss": NaN}\n')
    contents = read_run(full_run)
    assert told(contents, "2 lines cannot be read")
    assert told(contents, "1 records of repeated steps")
    assert number(contents.steps[40], "loss") is None


TRACE: dict[str, Any] = {
    "request": "Write\u2028it\u2029down\x85now",
    "message": "Done.",
    "failed": False,
    "rounds": [
        {"calls": [{"tool": "open_note", "arguments": ["n", ""], "observation": "opened"}]},
    ],
}


def write_lines(path: Path, *records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def test_a_request_with_separators_in_it_is_reported_whole(full_run: Run) -> None:
    path = full_run.path / "agent" / "traces.jsonl"
    write_lines(path, TRACE)
    with path.open("a") as stream:
        stream.write('{"request": "half\n')
    contents = read_run(full_run)
    (trace,) = contents.traces
    assert trace.request == TRACE["request"]
    assert told(contents, "agent/traces.jsonl: 1 line")
    assert "open_note('n', ''): opened" in run_markdown(contents)


@pytest.mark.parametrize("value", [None, "1", True, 10**400, float("nan"), float("inf")])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert number({"n": value}, "n") is None


def damaged(record: Any) -> Iterator[Any]:
    """Give copies of a record, in each of which one value is gone or another one."""
    for key in record if isinstance(record, dict) else range(len(record)):
        for value in ("x", -5, []):
            copy = deepcopy(record)
            copy[key] = value
            yield copy
        lacking = deepcopy(record)
        del lacking[key]
        yield lacking
        if isinstance(record[key], (dict, list)):
            for value in damaged(record[key]):
                copy = deepcopy(record)
                copy[key] = value
                yield copy


def test_no_damaged_value_of_a_record_keeps_a_report_from_being_written(
    bare_run: Run, tmp_path: Path, write_predictions: Callable[..., None]
) -> None:
    write_predictions(bare_run.evaluation, ["1. rest()\n2. join()"])
    catalogue = tmp_path / "own.yaml"
    catalogue.write_text("tools: [{name: rest, phrases: [rest]}]")
    text = bare_run.config_path.read_text().replace("catalogue: null", f"catalogue: {catalogue}")
    bare_run.config_path.write_text(text)
    data: dict[str, Any] = {"test_file": {"path": "t", "sha256": "t"}, "examples": {"test": 1}}
    data["catalogue_file"] = {"path": str(catalogue), "sha256": "c"}
    data["generated"] = {"rows": 5, "path": "g", "own_rows": 2, "own_passes": 1, "left_out": 3}
    data["rows"] = {"train": {"rows": 9, "tokens": 90, "supervised_tokens": 9}}
    step = {"event": "step", "step": 10, "loss": 0.5, "learning_rate": 1e-4, "tokens_per_s": 9.0}
    checked = {"event": "evaluation", "step": 10, "loss": 0.5, "samples": 4, "best": True}
    checked |= {"success": 0.5, "success_dag": 0.5}
    machine = {"gpu": {"name": "card"}, "cpus": 2, "versions": {"torch": "2"}, "folder": "f"}
    machine |= {"started": "now", "python": "3", "git": {"commit": "c", "clean": True}}
    tasks = json.loads((RESULTS / "agent-nano.json").read_text())
    tasks["joins"] = {"confusion": {"finish": {"finish": 3, "replan": 1}}}
    tasks["joins"]["message_match"] = {"count": 1, "total": 2}
    for name, record in (
        ("agent/metrics.json", tasks),
        ("data.json", data),
        ("history.jsonl", step),
        ("history.jsonl", checked),
        ("agent/traces.jsonl", TRACE),
        ("environment.json", machine),
        ("timings.json", {"all": 1.0}),
    ):
        path = bare_run.path / name
        write_lines(path, record)
        assert not told(read_run(bare_run), "left out")
        for one in damaged(record):
            write_lines(path, one)
            contents = read_run(bare_run)
            assert run_markdown(contents)
            assert all(chart.lines for chart in run_charts(contents.steps, contents.validations))
        write_lines(path, record)


def test_no_damaged_value_of_an_export_record_keeps_a_report_from_being_written(
    full_run: Run,
) -> None:
    path = full_run.path / "export" / "export.json"
    record = json.loads(path.read_text())
    assert read_run(full_run).export is not None
    for one in damaged(record):
        path.write_text(json.dumps(one))
        assert run_markdown(read_run(full_run))


def test_failed_and_skipped_gates_are_not_called_passed(full_run: Run) -> None:
    path = full_run.path / "export" / "export.json"
    content = json.loads(path.read_text())
    content["gates"].append({"name": "loss", "passed": False, "rule": "equal"})
    for gates, passed, verdict in (
        (content["gates"], False, "1 of 2 gates failed: loss."),
        ([], None, "Nothing was proved"),
    ):
        path.write_text(json.dumps({**content, "gates": gates, "passed": passed}))
        export = read_run(full_run).export
        assert export is not None
        assert verdict in export.verdict()


def test_plans_of_own_tools_are_scored_with_the_catalogue_and_never_without(
    full_run: Run, tmp_path: Path
) -> None:
    config = preset_config("cpu")
    text = dump_config(config).replace("catalogue: null", "catalogue: gone.yaml")
    full_run.config_path.write_text(text)
    with pytest.raises(UserError, match=r"gone\.yaml"):
        read_run(full_run)


def test_comparable_is_only_what_was_tested_on_the_published_file(
    full_run: Run, write_predictions: Callable[..., None]
) -> None:
    def verdict() -> str:
        contents = read_run(full_run)
        assert contents.main is not None
        return comparability(contents, contents.main)

    assert "generated data" in verdict()
    text = full_run.config_path.read_text().replace("test: null", "test: t.json")
    full_run.config_path.write_text(text)
    assert verdict().startswith("Not comparable")
    assert "10 queries of the test file t.json" in verdict()
    write_predictions(full_run.path / "eval", [NO_CALL] * PUBLISHED_TEST_QUERIES)
    assert verdict().startswith("Comparable with the published results only if")
    (full_run.path / "eval" / "made_with.json").write_text('{"test_sha256": "other"}')
    assert "not the run's own" in verdict()


def test_a_file_is_called_generated_only_where_the_run_made_it(bare_run: Run) -> None:
    def files(**data: object) -> dict[str, object]:
        (bare_run.path / "data.json").write_text(json.dumps(data))
        (facts,) = (t for t in other_tables(read_run(bare_run)) if t.title == "Circumstances")
        return {str(row[0]): row[1] for row in facts.rows if str(row[0]).endswith(" file")}

    made = {"train_file": {"path": "made.json"}, "test_file": {"path": "test.json"}}
    assert files(**made) == {
        "train file": "made.json (generated)",
        "test file": "test.json (generated)",
    }
    text = bare_run.config_path.read_text().replace("train: null", "train: mine.json")
    bare_run.config_path.write_text(text)
    of_the_run = files(train_file={"path": "mine.json"}, test_file=None)
    assert of_the_run == {"train file": "mine.json", "test file": "none"}


def plan(key: str, text: str, label: str = RIGHT) -> Prediction:
    fields = {"key": key, "query": "q", "label": label, "prediction": text, "new_tokens": 1}
    return Prediction(stop_reason="stop", **fields)  # type: ignore[arg-type]


def test_tools_are_counted_by_query() -> None:
    both = '1. open_note("a", "")\n2. open_note("b", "")\n3. send_sms([], "$1$2")\n4. join()'
    plans = score_all([plan("a", RIGHT), plan("b", both), plan("c", NO_CALL, both)], None)
    assert tool_rows(plans) == [
        ("open_note", 3, Proportion(1, 3), 1, 1),
        ("send_sms", 1, Proportion(0, 1), 1, 1),
    ]


def test_causes_are_counted_before_and_after() -> None:
    before = score_all([plan("a", NO_CALL), plan("b", "")], None)
    after = score_all([plan("a", RIGHT), plan("b", NO_CALL)], None)
    assert cause_rows(after, before) == [
        ("missing_tool", 1, 1, FAILURE_CODES["missing_tool"]),
        ("empty", 0, 1, FAILURE_CODES["empty"]),
    ]
    assert cause_rows(after, None) == [("missing_tool", 1, FAILURE_CODES["missing_tool"])]


def test_the_gallery_takes_from_every_cause_and_no_success() -> None:
    plans = [plan(f"m{at}", NO_CALL) for at in range(30)]
    plans += [plan("r", RIGHT), plan("e", ""), plan("x", "1. fly()\n2. join()")]
    chosen = gallery(score_all(plans, None), 6)
    assert [one.score.failure for one in chosen] == ["missing_tool"] * 4 + ["empty", "unknown_tool"]
    assert len(gallery(score_all(plans, None))) == 24
    assert len(gallery(score_all(plans[30:], None))) == 2
    assert gallery(()) == []
    assert {one.score.failure for one in chosen} <= set(FAILURE_CODES)


def test_reports_need_nothing_heavy() -> None:
    folder = Path(__file__).parents[2] / "tinyagent_fast" / "reports"
    names = [f"tinyagent_fast.reports.{path.stem}" for path in folder.glob("*.py")]
    heavy = {"torch", "transformers", "numpy", "matplotlib", "pyarrow"}
    code = "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:]];"
    code += f"sys.exit(' '.join(set(sys.modules) & {heavy!r}))"
    words = [sys.executable, "-c", code, *names]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
