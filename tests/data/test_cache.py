"""The Arrow cache: same rows as the file, instant second start, damage noticed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Points
from tinyagent_fast.data import cache
from tinyagent_fast.data.cache import ExampleTable, cached_table, load_examples
from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.data.schema import Example
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


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_file(tmp_path / "data.json", 30)


def load(path: Path, points: Points = "all", on_bad_entry: str = "error") -> ExampleTable:
    return load_examples(
        path,
        on_bad_entry=on_bad_entry,  # type: ignore[arg-type]
        points=points,
    )


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the data file was read again")

    monkeypatch.setattr(cache, "read_entries", fail)
    monkeypatch.setattr(cache, "sha256_of", fail)


def test_the_table_has_the_rows_of_the_file(data_file: Path) -> None:
    expected = [
        example
        for entry in read_entries(data_file, on_bad_entry="error")
        for example in entry.examples
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
    assert [table[row] for row in range(len(table))] == expected


def test_many_batches_hold_the_same_rows(data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(load(data_file))
    monkeypatch.setattr(cache, "_BATCH_ROWS", 7)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(data_file.parent / "other"))
    other = load(data_file)
    assert list(other) == whole
    assert other.column("entry_key") == [example.entry_key for example in whole]


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
    assert [example.entry_key for example in chosen] == chosen.column("entry_key")
    assert chosen.column("query") == ["q\u00e9 5", "q\u00e9 2"]
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
    monkeypatch.setattr(cache, "read_entries", lambda *_, **__: pytest.fail("it was read again"))
    assert len(load(data_file)) == 90


def test_a_cut_cache_file_is_noticed_and_written_again(
    data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(load(data_file))
    arrow = only(data_file.parent / "cache", "*/rows.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert list(load(data_file)) == expected
    assert "the cache is damaged" in caplog.text


@pytest.mark.parametrize("name", ["rows.arrow", "about.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"garbage" * 3000, None])
def test_any_damaged_cache_file_is_noticed_and_written_again(
    data_file: Path, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(load(data_file))
    file = only(data_file.parent / "cache", f"*/{name}")
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert list(load(data_file)) == expected
    assert "the cache is damaged" in caplog.text


def test_a_damaged_source_record_costs_only_a_hash(data_file: Path) -> None:
    expected = list(load(data_file))
    only(data_file.parent / "cache" / "sources", "*").write_text("[1]")
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
    assert list((tmp_path / "cache").rglob("*.arrow")) == []
    assert list((tmp_path / "cache").glob(".*")) == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "sha256_of", lambda path: "0" * 64)
    with pytest.raises(DataError, match="changed while it was read"):
        load(data_file)


def test_a_missing_data_file_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.json")


def test_a_cache_folder_that_cannot_be_written_is_refused_clearly(
    data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = data_file.parent / "blocked"
    blocked.write_text("a file")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(blocked))
    with pytest.raises(DataError, match="the cache cannot be written"):
        load(data_file)


def test_a_kind_of_point_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    entry = {"input": "q", "output": [make_point("plan", "x")]}
    path.write_text(json.dumps({"k": entry}))
    with pytest.raises(DataError, match="has no join point"):
        load(path, "join")


def test_two_processes_at_once_both_get_the_whole_table(data_file: Path) -> None:
    code = (
        "import sys\n"
        "from tinyagent_fast.data.cache import load_examples\n"
        "table = load_examples(sys.argv[1], on_bad_entry='error')\n"
        "print(len(list(table)))"
    )
    write_file(data_file, 300)
    command = [sys.executable, "-c", code, str(data_file)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["300", "300"]
    assert len(list((data_file.parent / "cache").glob("*/rows.arrow"))) == 1
    assert list((data_file.parent / "cache").glob(".*")) == []


def test_a_table_that_another_process_has_just_finished_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "table"

    def fill(write: Callable[[Any], None]) -> str:
        write({"a": "mine"})
        cached_table(folder, {"a": Value("string")}, lambda add: add({"a": "theirs"}))
        return "mine"

    from datasets import Value

    rows, facts = cached_table(folder, {"a": Value("string")}, fill)
    assert (rows["a"][:], facts) == (["theirs"], None)


def test_nothing_is_asked_of_the_network_and_nothing_is_left_at_home(
    data_file: Path, tmp_path: Path
) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('a connection was made')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from tinyagent_fast.data.cache import load_examples\n"
        "load_examples(sys.argv[1], on_bad_entry='error').select([3, 1])"
    )
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(data_file)],
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert [path for path in home.rglob("*") if path.is_file()] == []
