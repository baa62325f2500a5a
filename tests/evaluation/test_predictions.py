"""predictions.jsonl: kept across a stop, never mixed with predictions of something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.predictions import PredictionFile, find_predictions
from tinyagent_fast.evaluation.scoring import Prediction

MADE_WITH = {"adapter_sha256": "a1", "max_new_tokens": 300}
# What text files are cut at elsewhere, but JSON strings may hold as it is.
SEPARATORS = "\u2028\u2029\u0085\r\n\x0b\x0c\x1c"


def make(key: str, text: str = "1. join()") -> Prediction:
    return Prediction(
        key=key,
        query=f"query of {key}",
        label="1. join()",
        prediction=text,
        stop_reason="stop",
        new_tokens=4,
        seconds=0.5,
    )


def started(folder: Path, *predictions: Prediction) -> PredictionFile:
    file = PredictionFile(folder)
    file.start(MADE_WITH)
    file.append(predictions)
    return file


def test_predictions_read_back_as_they_were_written_in_order(tmp_path: Path) -> None:
    file = started(tmp_path, make("b"), make("a"))
    file.append([make("c")])
    assert file.read() == [make("b"), make("a"), make("c")]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(SEPARATORS + "a1.()"))
def test_any_text_survives_the_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    row = replace(make("k", text), query=text, label=text)
    assert started(tmp_path_factory.mktemp("p"), row, make("z")).read() == [row, make("z")]


def test_the_folder_is_made_and_says_what_the_predictions_were_made_with(tmp_path: Path) -> None:
    file = started(tmp_path / "eval" / "deep")
    assert json.loads(file.made_with_path.read_text(encoding="utf-8")) == MADE_WITH


def test_a_second_start_with_the_same_things_keeps_what_is_there(tmp_path: Path) -> None:
    started(tmp_path, make("a"), make("b"))
    again = PredictionFile(tmp_path)
    assert again.start(dict(reversed(MADE_WITH.items()))) == {"a": make("a"), "b": make("b")}
    again.append([make("c")])
    assert [p.key for p in again.read()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "other",
    [
        {**MADE_WITH, "adapter_sha256": "b2"},
        {**MADE_WITH, "max_new_tokens": 301},
        {"adapter_sha256": "a1"},
        {**MADE_WITH, "test_sha256": "t"},
    ],
    ids=["adapter", "limit", "less known", "more known"],
)
def test_predictions_made_with_anything_else_are_put_aside(
    other: dict[str, object], tmp_path: Path
) -> None:
    file = started(tmp_path, make("a"), make("b"))
    before = file.path.read_bytes()
    again = PredictionFile(tmp_path)
    assert again.start(other) == {}
    again.append([make("c")])
    assert again.read() == [make("c")]
    assert (tmp_path / "predictions.previous.jsonl").read_bytes() == before


def test_predictions_of_unknown_origin_are_not_kept(tmp_path: Path) -> None:
    file = started(tmp_path, make("a"))
    file.made_with_path.unlink()
    assert PredictionFile(tmp_path).start(MADE_WITH) == {}


def test_every_possible_stop_in_the_last_line_is_repaired(tmp_path: Path) -> None:
    """Cuts at each byte, so also inside a character of two, three or four bytes."""
    last = make("b", "1. note(\u00e9 \u65e5 \U0001f680)")
    file = started(tmp_path, make("a"), last)
    whole = file.path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        file.path.write_bytes(whole[:end])
        assert PredictionFile(tmp_path).start(MADE_WITH) == {"a": make("a")}, end
        assert file.path.read_bytes() == whole[:start]
    file.append([last])
    assert file.path.read_bytes() == whole


def test_a_stop_in_the_first_line_leaves_no_prediction(tmp_path: Path) -> None:
    file = started(tmp_path, make("a"))
    file.path.write_bytes(file.path.read_bytes()[:30])
    assert PredictionFile(tmp_path).start(MADE_WITH) == {}
    file.append([make("b")])
    assert file.read() == [make("b")]


def test_scoring_alone_does_not_repair_but_names_the_broken_line(tmp_path: Path) -> None:
    file = started(tmp_path, make("a"), make("b"))
    content = file.path.read_bytes()
    file.path.write_bytes(content[:-20])
    with pytest.raises(DataError, match="line 2"):
        file.read()
    assert file.path.read_bytes() == content[:-20]


def test_a_query_that_stands_twice_is_named_and_not_counted_twice(tmp_path: Path) -> None:
    file = started(tmp_path, make("a"), make("b"))
    file.append([make("a")])
    with pytest.raises(DataError, match="line 3"):
        file.read()


@pytest.mark.parametrize(
    ("line", "message"),
    [("[1, 2]", "no JSON object"), ("{oops", "no JSON"), ('{"key": "k"}', "query")],
)
def test_a_line_that_is_no_prediction_is_an_error(line: str, message: str, tmp_path: Path) -> None:
    file = started(tmp_path, make("a"))
    with file.path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=message):
        file.read()


def test_a_line_that_is_no_utf_8_is_an_error(tmp_path: Path) -> None:
    file = started(tmp_path, make("a"))
    with file.path.open("ab") as stream:
        stream.write(b'{"key": "\xff"}\n')
    with pytest.raises(DataError, match="line 2"):
        file.read()


def test_a_missing_file_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tinyagent-fast eval"):
        PredictionFile(tmp_path).read()


def test_another_name_reads_another_file(tmp_path: Path) -> None:
    started(tmp_path, make("a")).path.rename(tmp_path / "other.jsonl")
    assert PredictionFile(tmp_path, "other.jsonl").read() == [make("a")]


def test_what_is_forgotten_is_put_aside(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path)
    file.start({"a": 1})
    file.path.write_text('{"of": "a long evaluation"}\n', encoding="utf-8")
    before = file.path.read_bytes()
    file.forget()
    assert file.start({"a": 1}) == {}
    assert not file.path.exists()
    assert (tmp_path / "predictions.previous.jsonl").read_bytes() == before


def test_a_file_named_latest_that_is_no_run_does_not_hide_the_newest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    (tmp_path / "runs" / "latest" / "predictions.jsonl").write_text("")
    (tmp_path / "latest").write_bytes(b"\xff\xfe\0bin")
    monkeypatch.chdir(tmp_path)
    assert find_predictions("latest")[""].path == Path("runs/latest/predictions.jsonl")
