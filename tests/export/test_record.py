"""export.json: artefacts enter when whole, are kept when unchanged, and disk is checked before."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.errors import ModelError
from tinyagent_fast.export.preparation import refuse_full_disk, refuse_small_memory
from tinyagent_fast.export.record import ExportRecord
from tinyagent_fast.runs import key_of, sha256_of


def writer(text: str, made: list[str]) -> Any:
    def work(path: Path) -> tuple[str, dict[str, int]]:
        path.write_text(text, encoding="utf-8")
        made.append(text)
        return "f16", {"tensors": 3}

    return work


def test_an_artefact_is_made_once_and_kept_while_nothing_changes(tmp_path: Path) -> None:
    made: list[str] = []
    first, was_there = ExportRecord(tmp_path).make("gguf/a.gguf", "gguf", "k", writer("one", made))
    assert not was_there
    again, was_there = ExportRecord(tmp_path).make("gguf/a.gguf", "gguf", "k", writer("two", made))
    assert was_there
    assert again == first
    assert made == ["one"]
    assert first.sha256 == sha256_of(tmp_path / "gguf" / "a.gguf")
    assert first.size_bytes == 3


@pytest.mark.parametrize("change", ["other key", "damaged", "deleted"])
def test_an_artefact_is_made_anew_when_it_is_not_what_it_was(tmp_path: Path, change: str) -> None:
    made: list[str] = []
    ExportRecord(tmp_path).make("a.gguf", "gguf", "k", writer("one", made))
    if change == "damaged":
        (tmp_path / "a.gguf").write_text("0ne", encoding="utf-8")
    if change == "deleted":
        (tmp_path / "a.gguf").unlink()
    key = "another" if change == "other key" else "k"
    _, was_there = ExportRecord(tmp_path).make("a.gguf", "gguf", key, writer("two", made))
    assert not was_there
    assert (tmp_path / "a.gguf").read_text(encoding="utf-8") == "two"
    assert len(ExportRecord(tmp_path).artefacts) == 1


def test_a_stop_in_the_middle_leaves_no_artefact_and_the_next_start_goes_on(tmp_path: Path) -> None:
    def stopped(path: Path) -> Any:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    made: list[str] = []
    ExportRecord(tmp_path).make("a.gguf", "gguf", "k", writer("a", made))
    with pytest.raises(KeyboardInterrupt):
        ExportRecord(tmp_path).make("b.gguf", "gguf", "k", stopped)
    assert not (tmp_path / "b.gguf").exists()
    ExportRecord(tmp_path).make("a.gguf", "gguf", "k", writer("a", made))
    ExportRecord(tmp_path).make("b.gguf", "gguf", "k", writer("b", made))
    assert made == ["a", "b"]
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_is_an_artefact_too(tmp_path: Path) -> None:
    def work(path: Path) -> Any:
        path.mkdir()
        (path / "config.json").write_text("{}", encoding="utf-8")
        return "bf16", {}

    record = ExportRecord(tmp_path)
    record.make("merged", "merged", "k", work)
    assert record.make("merged", "merged", "k", work)[1]
    (tmp_path / "merged" / "more.txt").write_text("x", encoding="utf-8")
    assert not record.make("merged", "merged", "k", work)[1]


def test_a_full_disk_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, 3 * 2**30))
    assert "2.0 GiB needed (merged 2.0 GiB), 3.0 GiB free" in refuse_full_disk(
        tmp_path, {"merged": 2 * 2**30, "there": 0}
    )
    with pytest.raises(ModelError, match=r"4\.0 GiB needed \(merged 2\.0 GiB, gguf 2\.0 GiB\)"):
        refuse_full_disk(tmp_path, {"merged": 2 * 2**30, "gguf": 2 * 2**30})


def test_too_little_memory_is_found_before_the_work() -> None:
    assert refuse_small_memory(1).startswith("memory: 0.00 GiB")
    with pytest.raises(ModelError, match="too little memory"):
        refuse_small_memory(2**60)


def test_keys_differ_when_anything_differs() -> None:
    assert key_of([1, "a"]) == key_of([1, "a"])
    assert len({key_of([1, "a"]), key_of([1, "b"]), key_of(["1", "a"])}) == 3
