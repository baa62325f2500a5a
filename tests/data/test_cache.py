"""The Arrow cache: same rows as the file, instant second start, damage noticed."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.data import cache
from tinyagent_fast.data.cache import Points, entry_examples, load_examples
from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.data.schema import Example
from tinyagent_fast.data.table import ExampleTable
from tinyagent_fast.errors import DataError


def make_point(kind: str, text: str) -> dict[str, Any]:
    call = {"tool_name": "open_note", "tool_args": [text]}
    return {
        "type": kind,
        "raw_input": text
        if kind == "join"
        else repr([{"role": "system", "content": "S " + text}, {"role": "user", "content": text}]),
        "raw_output": f'1. open_note("{text}")\n2. join()'
        if kind != "join"
        else "Action: Finish()",
        "parsed_output": {} if kind == "join" else [call, {"tool_name": "join", "tool_args": []}],
        "id": "i",
        "index": 0,
    }


def write_file(path: Path, count: int, *, bad: int = 0) -> Path:
    entries: dict[str, Any] = {
        f"k{at}": {
            "input": f"q\u00e9 {at}",
            "output": [make_point(kind, f"t\u00e9xt {at}") for kind in ("plan", "join", "replan")],
        }
        for at in range(count)
    }
    entries.update({f"bad{at}": {} for at in range(bad)})
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_file(tmp_path / "data.json", 30)


def load(path: Path, points: Points = "all", on_bad_entry: str = "error") -> ExampleTable:
    return load_examples(
        path,
        on_bad_entry=on_bad_entry,  # type: ignore[arg-type]
        cache_dir=path.parent / "cache",
        points=points,
    )


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the data file was read again")

    monkeypatch.setattr(cache, "read_entries", fail)
    monkeypatch.setattr(cache, "_file_sha256", fail)


def test_the_table_has_the_rows_of_the_file(data_file: Path) -> None:
    expected = [
        example
        for entry in read_entries(data_file, on_bad_entry="error")
        for example in entry_examples(entry)
    ]
    table = load(data_file)
    assert list(table) == expected
    assert table[0] == Example(
        key="k0/0",
        entry_key="k0",
        kind="plan",
        query="q\u00e9 0",
        system="S t\u00e9xt 0",
        user="t\u00e9xt 0",
        output='1. open_note("t\u00e9xt 0")\n2. join()',
    )
    assert table[1].system is None
    assert table.point_counts == {"join": 30, "plan": 30, "replan": 30}


def test_many_batches_hold_the_same_rows(data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(load(data_file))
    monkeypatch.setattr(cache, "_BATCH_ROWS", 7)
    other = load_examples(
        data_file, on_bad_entry="error", cache_dir=data_file.parent / "other", points="all"
    )
    assert list(other) == whole
    assert other.entry_keys() == [example.entry_key for example in whole]


@pytest.mark.parametrize(("points", "kinds"), [("plan", {"plan"}), ("join", {"join"})])
def test_points_selects_the_rows(data_file: Path, points: Points, kinds: set[str]) -> None:
    table = load(data_file, points)
    assert len(table) == 30
    assert {example.kind for example in table} == kinds


def test_slices_and_selections_are_tables_over_the_same_rows(data_file: Path) -> None:
    table = load(data_file, "plan")
    assert [example.entry_key for example in table[3:5]] == ["k3", "k4"]
    assert table[-1].entry_key == "k29"
    chosen = table.select([5, 2])
    assert isinstance(chosen, ExampleTable)
    assert [example.entry_key for example in chosen] == chosen.entry_keys() == ["k5", "k2"]
    assert chosen.queries() == ["q\u00e9 5", "q\u00e9 2"]
    with pytest.raises(IndexError):
        table[30]


def test_a_table_can_be_pickled_for_worker_processes(data_file: Path) -> None:
    table = load(data_file).select([4, 8])
    assert list(pickle.loads(pickle.dumps(table))) == list(table)


def test_a_second_start_neither_reads_nor_hashes_the_file(
    data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(data_file)
    forbid_reading(monkeypatch)
    second = load(data_file)
    assert list(second) == list(first)
    assert second.sha256 == first.sha256
    assert second.report == first.report


def test_a_changed_file_is_noticed(data_file: Path) -> None:
    first = load(data_file)
    write_file(data_file, 31)
    second = load(data_file)
    assert (len(first), len(second)) == (90, 93)
    assert first.sha256 != second.sha256


def test_a_change_that_keeps_the_size_is_noticed_by_its_time(data_file: Path) -> None:
    load(data_file)
    data_file.write_bytes(data_file.read_bytes().replace(b"xt 7", b"xt 8"))
    os.utime(data_file, ns=(1, 1))
    assert load(data_file)[21].user == "t\u00e9xt 8"


def test_a_touched_or_copied_file_is_not_read_again(
    data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(data_file)
    os.utime(data_file, ns=(5, 5))
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("the file was read again"))
    assert len(load(data_file)) == 90


def test_a_cut_cache_file_is_noticed_and_written_again(
    data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(load(data_file))
    arrow = only(data_file.parent / "cache", "*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert list(load(data_file)) == expected
    assert "the cache is damaged" in caplog.text


@pytest.mark.parametrize("name", ["*.arrow", "*.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"garbage" * 3000])
def test_any_damaged_cache_file_is_noticed_and_written_again(
    data_file: Path, name: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(load(data_file))
    only(data_file.parent / "cache", name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(load(data_file)) == expected
    assert "the cache is damaged" in caplog.text


def test_no_damaged_byte_gives_a_wrong_row(data_file: Path) -> None:
    expected = list(load(data_file))
    arrow = only(data_file.parent / "cache", "*.arrow")
    good = arrow.read_bytes()
    refused = 0
    for at in range(5, len(good), 97):
        arrow.write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        try:
            assert list(load(data_file)) == expected
        except DataError as error:
            assert "is damaged" in str(error)
            refused += 1
    assert refused > 10


def test_a_missing_half_of_the_cache_is_written_again(data_file: Path) -> None:
    expected = list(load(data_file))
    only(data_file.parent / "cache", "*.arrow").unlink()
    assert list(load(data_file)) == expected


def test_a_damaged_source_record_costs_only_a_hash(data_file: Path) -> None:
    expected = list(load(data_file))
    only(data_file.parent / "cache" / "sources", "*.json").write_text("[1]")
    assert list(load(data_file)) == expected


def test_skipped_entries_are_said_on_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_file(tmp_path / "data.json", 5, bad=2)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            table = load(path, on_bad_entry="skip")
        assert "2 of 7 entries were left out (4 problems)" in caplog.text
        assert table.report.skipped == 2
        assert table.report.problems[0].key == "bad0"


def test_a_cache_that_skipped_entries_is_not_used_when_they_are_errors(tmp_path: Path) -> None:
    path = write_file(tmp_path / "data.json", 5, bad=2)
    load(path, on_bad_entry="skip")
    with pytest.raises(DataError, match="2 of 7 entries cannot be used"):
        load(path, on_bad_entry="error")


def test_a_failed_build_leaves_no_file_behind(tmp_path: Path) -> None:
    path = write_file(tmp_path / "data.json", 5, bad=2)
    with pytest.raises(DataError):
        load(path)
    assert [item.name for item in (tmp_path / "cache").rglob("*") if item.is_file()] == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_file_sha256", lambda path: "0" * 64)
    with pytest.raises(DataError, match="changed while it was read"):
        load(data_file)


def test_a_missing_data_file_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.json")


def test_a_cache_folder_that_cannot_be_written_is_refused_clearly(data_file: Path) -> None:
    blocked = data_file.parent / "blocked"
    blocked.write_text("a file")
    with pytest.raises(DataError, match="the cache cannot be written"):
        load_examples(data_file, on_bad_entry="error", cache_dir=blocked)


def test_a_kind_of_point_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    entry = {"input": "q", "output": [make_point("plan", "x")]}
    path.write_text(json.dumps({"k": entry}))
    with pytest.raises(DataError, match="has no join point"):
        load(path, "join")


def test_the_cache_folder_can_be_set_by_the_environment(
    data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = data_file.parent / "elsewhere"
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
    load_examples(data_file, on_bad_entry="error")
    assert only(folder, "*.arrow").stat().st_size > 0
