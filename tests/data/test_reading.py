"""Reading a dataset file: validation, problems, damaged files, memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from published_entry import make_entry

from tinyagent_fast.data import reading
from tinyagent_fast.data.reading import PROBLEMS_KEPT, ReadReport, is_incomplete, read_entries
from tinyagent_fast.errors import DataError

PEAK_MIB = 512


def write(path: Path, entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps(entries, indent=4), encoding="utf-8")
    return path


def test_a_file_is_read_in_order_with_a_report(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {f"k{at}": make_entry() for at in range(50)})
    reports: list[ReadReport] = []
    entries = list(
        read_entries(
            path,
            on_bad_entry="error",
            on_report=reports.append,
        )
    )
    size_bytes = path.stat().st_size
    assert [entry.key for entry in entries] == [f"k{at}" for at in range(50)]
    assert (reports[0].entries, reports[0].skipped) == (50, 0)
    assert reports[0].size_bytes == size_bytes
    assert reports[0].file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def bad_file(path: Path, bad: int) -> Path:
    entries: dict[str, Any] = {f"good{at}": make_entry() for at in range(3)}
    entries.update({f"bad{at}": {"input": "q"} for at in range(bad)})
    return write(path, entries)


def test_bad_entries_stop_the_reading_at_its_end_with_all_counts(tmp_path: Path) -> None:
    path = bad_file(tmp_path / "d.json", 30)
    with pytest.raises(DataError) as caught:
        list(read_entries(path, on_bad_entry="error"))
    message = str(caught.value)
    assert "30 of 33 entries cannot be used (30 problems; output 30)" in message
    assert "bad0 output: is missing" in message
    assert "bad19 output" in message
    assert "bad20 output" not in message
    assert "and 10 more problems" in message


def test_bad_entries_are_skipped_and_counted_if_asked(tmp_path: Path) -> None:
    path = bad_file(tmp_path / "d.json", PROBLEMS_KEPT + 5)
    reports: list[ReadReport] = []
    entries = list(read_entries(path, on_bad_entry="skip", on_report=reports.append))
    assert [entry.key for entry in entries] == ["good0", "good1", "good2"]
    assert reports[0].skipped == reports[0].problem_count == PROBLEMS_KEPT + 5
    assert len(reports[0].problems) == PROBLEMS_KEPT


def test_a_key_that_occurs_twice_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    entry = json.dumps(make_entry())
    path.write_text(f'{{"k": {entry}, "k": {entry}}}', encoding="utf-8")
    with pytest.raises(DataError, match=r"1 of 2 entries[^$]*k entry: has a key"):
        list(read_entries(path, on_bad_entry="error"))


def test_a_file_with_no_usable_entry_is_refused_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"k": 1})
    with pytest.raises(DataError, match="1 of 1 entries"):
        list(read_entries(path, on_bad_entry="skip"))


GOOD = json.dumps({"k": make_entry()}).encode()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"{}", "has no entry"),
        (GOOD[:-20], "ends too early"),
        (GOOD + b"x", "not valid JSON"),
        (GOOD + b"\n[]", "not valid JSON"),
        (GOOD.replace(b"Call", b"C\xff\xfell"), "not valid JSON"),
        (b'{"k": NaN}', "not valid JSON"),
        (b"[" + GOOD + b"]", "not a JSON object"),
        (b'  "text"', "not a JSON object"),
        (b"\x1f\x8b\x08 zipped", "not a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer"),
        (codecs.BOM_UTF8, "is empty"),
        (GOOD.decode().encode("utf-16"), "UTF-16"),
        (GOOD.decode().encode("utf-16-be"), "zero bytes"),
        (b'{"k": ' + b"[" * 300_000, "is nested too deeply"),
        (b'{"k": ' + b'{"a":[' * 300_000, "is nested too deeply"),
        (b'{"k": ' + (b"[" + b" " * 50) * 20_000, "is nested too deeply"),
        (b'{"k": ' + b"[[]," * 200_000, "is nested too deeply"),
        (GOOD[:-1] + b',"k": ' + b'["]",' * 200_000, "is nested too deeply"),
    ],
)
def test_a_file_that_is_no_dataset_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, what: str
) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_entries(path, on_bad_entry="skip"))
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b'[{"conversations": [{"from": "human", "value": "x"}]}]',
        b'{"messages": [{"role": "user", "content": "x"}]}\n' * 2,
        b'{"conversations": [{"from": "human", "value": "x"}]}',
        b'{"instruction": "a", "input": "b", "output": "c"}\n' * 2,
    ],
)
def test_a_file_of_another_format_is_told_where_it_is_turned_into_this_one(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_entries(path, on_bad_entry="error"))
    heading = str(caught.value).split('data/README.md, "')[1].split('"')[0]
    readme = Path(__file__).parents[2] / "data" / "README.md"
    assert f"\n## {heading}\n" in readme.read_text(encoding="utf-8")


def test_a_key_given_twice_within_an_entry_is_a_problem_of_that_entry(tmp_path: Path) -> None:
    entry = json.dumps(make_entry())
    twice, again = entry.replace('"index": 0', '"index": 0, "index": 1'), '"input": "q", '
    reports: list[ReadReport] = []
    for text in (
        f'{{"k0": {entry}, "k1": {twice}, "k2": {entry}}}',
        f'{{"k0": {entry}}}\n{{"k1": {twice}}}\n{{"k2": {entry}}}\n',
        "\n".join(f'{{"key": "k{n}", {one[1:]}' for n, one in enumerate((entry, twice, entry))),
        "\n".join(f'{{"key": "k{n}", {"" if n != 1 else again}{entry[1:]}' for n in range(3)),
    ):
        (tmp_path / "d.json").write_text(text, encoding="utf-8")
        found = read_entries(tmp_path / "d.json", on_bad_entry="skip", on_report=reports.append)
        assert [one.key for one in found] == ["k0", "k2"]
        (problem,) = reports[-1].problems
        assert problem.key == "k1" and "twice" in problem.reason


def test_an_entry_that_is_nested_without_end_is_a_problem_of_that_entry(tmp_path: Path) -> None:
    deep = "[" * 600 + "]" * 600
    text = f'{{"k0": {json.dumps(make_entry())}, "k1": {deep}}}'
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    (found,) = read_entries(tmp_path / "d.json", on_bad_entry="skip")
    assert found.key == "k0"


def test_brackets_within_texts_are_no_nesting(tmp_path: Path) -> None:
    entries = {f"k{at}": make_entry("[" * 700 + '\\"{' * 500) for at in range(200)}
    path = write(tmp_path / "d.json", entries)
    assert sum(1 for _ in read_entries(path, on_bad_entry="error")) == 200


def test_a_key_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", {"\x1b[2J\u202eé": {}, "k": make_entry()})
    with pytest.raises(DataError) as caught:
        list(read_entries(path, on_bad_entry="error"))
    assert r"\x1b[2J\u202eé input: is missing" in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_entries(tmp_path / "none.json", on_bad_entry="error"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_entries(tmp_path, on_bad_entry="error"))


def test_importing_the_data_modules_imports_nothing_heavy() -> None:
    code = (
        "import sys, tinyagent_fast.data.report, tinyagent_fast.data.download\n"
        "heavy = {'pyarrow', 'numpy', 'torch', 'huggingface_hub', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# VmHWM and not ru_maxrss: the latter starts at the size of the process that started this one.
MEASURE = """
import sys
from pathlib import Path
{imports}
{work}
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""
READ = MEASURE.format(
    imports="from tinyagent_fast.data.reading import read_entries",
    work="sum(1 for _ in read_entries(sys.argv[1], on_bad_entry='error'))",
)
LOAD = MEASURE.format(
    imports="from tinyagent_fast.data.cache import load_examples",
    work="load_examples(sys.argv[1], on_bad_entry='error')",
)


def peak_mib(code: str, path: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, "TINYAGENT_FAST_CACHE": str(path.parent / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def write_large(path: Path, size_bytes: int) -> Path:
    """Write entries of about 18 kB with prompts that differ, until the size is reached."""
    written = 2
    with path.open("w", encoding="ascii") as file:
        file.write("{")
        at = 0
        while written < size_bytes:
            rules = "".join(f' - rule {n} isn\'t "{at}"\n' for n in range(650))
            text = json.dumps(make_entry(f"Call Ann about {at}", rules), indent=4)
            written += file.write(f'{"," if at else ""}\n"key{at}": {text}')
            at += 1
        file.write("}")
    return path


linux_only = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"
)


@linux_only
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small = write_large(tmp_path / "small.json", 2_000_000)
    large = write_large(tmp_path / "large.json", 24_000_000)
    assert peak_mib(READ, large) < peak_mib(READ, small) + 12


@linux_only
@pytest.mark.slow
def test_a_file_of_the_published_size_needs_less_than_512_mib(tmp_path: Path) -> None:
    path = write_large(tmp_path / "large.json", 734_000_000)
    assert peak_mib(READ, path) < PEAK_MIB
    assert peak_mib(LOAD, path) < PEAK_MIB


REAL_DATA = os.environ.get("TINYAGENT_FAST_REAL_DATA", "")


@pytest.mark.skipif(not REAL_DATA, reason="TINYAGENT_FAST_REAL_DATA names no folder of data files")
@pytest.mark.parametrize("name", ["training_data.json", "testing_data.json"])
def test_real_data_has_no_problem(name: str) -> None:
    reports: list[ReadReport] = []
    path = Path(REAL_DATA) / name
    count = sum(1 for _ in read_entries(path, on_bad_entry="error", on_report=reports.append))
    assert count == reports[0].entries > 0


HALVES = ["\\ud83d", "\\uDE00", "\\ud83d\\ud83d\\ude00", "\\ud83d\\n", "\\\\\\ud83d"]
WHOLE = ["\\ud83d\\ude00", "\\\\ud83d", "\\\\\\\\ude00", "\\u00e9", "😀", "\\ufffd"]


def with_query(tmp_path: Path, text: str, *, padding: int = 0, lines: bool = False) -> Path:
    """Write three entries, the second with an escape of JSON in its query."""
    file = write(tmp_path / "d.json", {"a": make_entry(), "b": make_entry(), "c": make_entry()})
    entries = json.loads(file.read_text(encoding="utf-8"))
    entries["b"]["input"] = "x" * padding + "MARK"
    if lines:
        content = "".join(json.dumps({key: entry}) + "\n" for key, entry in entries.items())
    else:
        content = json.dumps(entries, separators=(",", ":"))
    file.write_text(content.replace("MARK", text), encoding="utf-8")
    return file


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("text", HALVES)
def test_half_a_surrogate_pair_is_refused_or_skipped_and_counted(
    tmp_path: Path, text: str, lines: bool
) -> None:
    file = with_query(tmp_path, text, lines=lines)
    with pytest.raises(DataError, match="b input: holds half of a surrogate pair"):
        list(read_entries(file, on_bad_entry="error"))
    reports: list[ReadReport] = []
    kept = list(read_entries(file, on_bad_entry="skip", on_report=reports.append))
    assert [entry.key for entry in kept] == ["a", "c"]
    assert (reports[0].entries, reports[0].skipped) == (2, 1)


@pytest.mark.parametrize("text", [*HALVES, *WHOLE])
def test_escapes_are_read_alike_wherever_the_file_is_cut_into_pieces(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = json.loads(f'"{text}"')
    for size in (1, 2, 3, 5, 7, 11, 13, 29):
        monkeypatch.setattr(reading, "_CHUNK_BYTES", size)
        file = with_query(tmp_path, text)
        found = {e.key: e.query for e in read_entries(file, on_bad_entry="skip")}
        assert found.get("b") == (expected if text in WHOLE else None), size


def test_numbers_are_read_alike_wherever_the_file_is_cut_into_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = f'{{"a": -1.5e+30, "b": {json.dumps(make_entry())}, "c": 12}}'
    (tmp_path / "d.json").write_text(content, encoding="utf-8")
    for size in range(1, 20):
        monkeypatch.setattr(reading, "_CHUNK_BYTES", size)
        (found,) = read_entries(tmp_path / "d.json", on_bad_entry="skip")
        assert found.key == "b"


def test_half_a_pair_in_a_key_is_no_crash(tmp_path: Path) -> None:
    file = write(tmp_path / "d.json", {"a": make_entry(), "b": make_entry()})
    file.write_text(file.read_text(encoding="utf-8").replace('"b": {', '"\\ud800": {'))
    reports: list[ReadReport] = []
    assert len(list(read_entries(file, on_bad_entry="skip", on_report=reports.append))) == 1
    assert "surrogate" in reports[0].problem_lines()[0].encode("ascii").decode()


def test_bytes_that_are_no_utf_8_are_the_users_to_repair(tmp_path: Path) -> None:
    file = write(tmp_path / "d.json", {"a": make_entry()})
    for bad in (b"\xed\xa0\xbd", b"\xff", b"\xc3"):
        content = json.dumps({"a": make_entry()}).encode()
        file.write_bytes(content.replace(b'"input": "', b'"input": "' + bad))
        with pytest.raises(DataError):
            list(read_entries(file, on_bad_entry="skip"))


@pytest.mark.parametrize("form", ["keyed", "with key", "without key"])
def test_json_lines_give_the_entries_of_the_one_object(tmp_path: Path, form: str) -> None:
    entries = {f"k{number}": make_entry() for number in range(3)}
    forms = {
        "keyed": [{key: entry} for key, entry in entries.items()],
        "with key": [{"key": key, **entry} for key, entry in entries.items()],
        "without key": list(entries.values()),
    }
    file = tmp_path / "lines.jsonl"
    for count in (1, 3):
        lines = [json.dumps(value) for value in forms[form][:count]]
        file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        found = list(read_entries(file, on_bad_entry="error"))
        assert [e.query for e in found] == [make_entry()["input"]] * count
        if form != "without key":
            assert [entry.key for entry in found] == list(entries)[:count]
    file.write_text(file.read_text(encoding="utf-8") + '{"key": "cut", "inp', encoding="utf-8")
    with pytest.raises(DataError, match="3 entries"):
        list(read_entries(file, on_bad_entry="skip"))


@pytest.mark.parametrize("lines", [False, True])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, lines: bool) -> None:
    path, marked = with_query(tmp_path, "x", lines=lines), tmp_path / "marked.json"
    marked.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    reports: list[ReadReport] = []
    read = [
        list(read_entries(one, on_bad_entry="error", on_report=reports.append))
        for one in (path, marked)
    ]
    assert read[0] == read[1]
    assert [report.json_lines for report in reports] == [lines, lines]
    assert reports[1].file_sha256 == hashlib.sha256(marked.read_bytes()).hexdigest()
    assert not is_incomplete(marked)
