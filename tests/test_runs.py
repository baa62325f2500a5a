"""Run folders: made once, never overwritten, found by name, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tinyagent_fast.config import Config
from tinyagent_fast.errors import ConfigError, is_full_disk
from tinyagent_fast.evaluation.predictions import find_predictions
from tinyagent_fast.presets import preset_config
from tinyagent_fast.runs import (
    Run,
    create_run,
    cut_broken_line,
    find_run,
    holding,
    point_latest,
    read_json,
    refuse_taken_name,
    sha256_of,
    unfinished_folder,
    write_json,
    write_text,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(preset_config("smoke"), runs=tmp_path / "runs", name="first")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_a_new_run_has_its_config_and_its_environment(config: Config) -> None:
    run = create_run(config)
    assert run.path == config.runs / "first"
    assert run.config() == config
    environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    assert environment["versions"]["tinyagent-fast"]
    assert environment["python"].startswith("3.")
    assert {"cpus", "platform", "gpu", "git", "command", "started"} <= set(environment)


@pytest.mark.parametrize("kept", [0, 0.3, 0.6])
def test_a_config_that_was_cut_off_does_not_count_as_defaults(config: Config, kept: float) -> None:
    run = create_run(config)
    text = run.config_path.read_text(encoding="utf-8")
    run.config_path.write_text(text[: text.index("\n", int(kept * len(text))) + 1] * bool(kept))
    with pytest.raises(ConfigError, match="cut off"):
        run.config()


def test_what_a_killed_process_has_left_goes_and_what_is_under_way_stays(config: Config) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    host = socket.gethostname()
    there = [f".new-{host}-{os.getpid()}-1", f".new-other-host-{killed.pid}-2", ".newer"]
    for name in (*there, f".new-{host}-{killed.pid}-3"):
        (config.runs / name / "sub").mkdir(parents=True)
    with unfinished_folder(config.runs, "new") as folder:
        create_run(config)
        assert folder.is_dir()
    assert {path.name for path in config.runs.glob(".new*")} == set(there)


def test_a_name_that_no_file_system_has_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="cannot be made"):
        refuse_taken_name(replace(config, name="a" * 5000))
    with pytest.raises(ConfigError, match="control characters"):
        refuse_taken_name(replace(config, name="a\ud800"))
    for name in ("a" * 5000, "a\0", "a\ud800"):
        with pytest.raises(ConfigError, match="no such run"):
            find_run(name, config.runs)


@pytest.mark.parametrize(
    "words",
    ["basic_ios::clear: iostream error", "[enforce fail at x.cc:672] . unexpected pos 64 vs 0"],
)
def test_a_full_disk_is_known_by_the_words_of_torch(words: str) -> None:
    assert is_full_disk(RuntimeError(words))
    assert not is_full_disk(RuntimeError("another one"))


def test_the_newest_run_is_the_latest(config: Config) -> None:
    first = create_run(config)
    assert find_run("latest", config.runs).path == first.path.resolve()
    second = create_run(replace(config, name="second"))
    assert find_run("latest", config.runs).path == second.path.resolve()
    point_latest(first)
    assert find_run("latest", config.runs).path == first.path.resolve()
    assert sorted(path.name for path in config.runs.iterdir()) == ["first", "latest", "second"]


def test_latest_survives_moving_the_folder_of_all_runs(config: Config, tmp_path: Path) -> None:
    create_run(config)
    config.runs.rename(tmp_path / "moved")
    assert find_run("latest", tmp_path / "moved").path.name == "first"


def test_a_run_is_found_by_name_and_by_path(config: Config) -> None:
    run = create_run(config)
    for name in ("first", str(run.path), "latest"):
        assert find_run(name, config.runs).path == run.path.resolve()


@pytest.mark.parametrize("name", ["second", ".", "../runs"])
def test_a_run_that_is_not_there_is_the_users_error_with_those_that_are(
    config: Config, name: str
) -> None:
    create_run(config)
    create_run(replace(config, name="other"))
    with pytest.raises(ConfigError) as caught:
        find_run(name, config.runs)
    assert "there: first, other" in caught.value.why


def test_without_any_run_there_is_no_latest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there: none"):
        find_run("latest", tmp_path / "runs")


def test_a_run_of_the_same_name_is_refused_and_left_as_it_was(config: Config) -> None:
    run = create_run(config)
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "weights").write_bytes(b"1")
    before = files_of(config.runs)
    with pytest.raises(ConfigError, match="a run is never overwritten") as caught:
        create_run(config)
    assert "--resume first" in caught.value.fix
    assert files_of(config.runs) == before


def test_a_folder_with_other_files_is_not_taken_for_a_run(config: Config) -> None:
    (config.runs / "first").mkdir(parents=True)
    (config.runs / "first" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        create_run(config)
    assert [path.name for path in (config.runs / "first").iterdir()] == ["thesis.txt"]


def test_an_empty_folder_can_become_a_run(config: Config) -> None:
    (config.runs / "first").mkdir(parents=True)
    assert create_run(config).config() == config


@pytest.mark.parametrize(
    "name",
    [
        "latest",
        "bases",
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/tmp/a",
        "a/",
        "a\nb",
        "a\x1b[31m",
        "a\u202eb",
    ],
)
def test_a_name_that_is_no_folder_of_its_own_is_refused(config: Config, name: str) -> None:
    with pytest.raises(ConfigError, match="it must be the name of one folder"):
        create_run(replace(config, name=name))
    assert not config.runs.exists()


def test_runs_without_a_name_get_preset_and_time_and_never_the_same(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102-030405")
    names = [create_run(replace(config, name=None)).path.name for _ in range(3)]
    start = "smoke-20260102-030405"
    assert names == [start, f"{start}-2", f"{start}-3"]


def test_runs_that_start_together_get_folders_of_their_own(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    claimed: list[Path] = []
    threads = [
        threading.Thread(target=lambda: claimed.append(create_run(replace(config, name=None)).path))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == len(claimed) == 8


def test_a_folder_that_cannot_be_made_is_the_users_error(config: Config) -> None:
    config.runs.write_text("a file")
    with pytest.raises(ConfigError, match="it cannot be made"):
        create_run(config)


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        Run(tmp_path).config()


def test_a_config_that_was_edited_into_something_wrong_is_named(config: Config) -> None:
    run = create_run(config)
    text = run.config_path.read_text(encoding="utf-8")
    run.config_path.write_text(text.replace(" batch:", " bach:"), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'batch'") as caught:
        run.config()
    assert str(run.config_path) in caught.value.what


def test_a_file_is_written_whole_or_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"success": 1.0})
    whole = path.read_bytes()

    def full_disk(self: Path, text: str, **_: object) -> int:
        with self.open("w") as stream:
            stream.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"success": 0.5})
    assert path.read_bytes() == whole


def test_written_texts_are_utf_8_and_json_is_readable(tmp_path: Path) -> None:
    write_text(tmp_path / "a.md", "größer\n")
    assert (tmp_path / "a.md").read_bytes() == "größer\n".encode()
    write_json(tmp_path / "a.json", {"name": "ä", "n": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "name": "ä",\n  "n": [\n    1\n  ]\n}\n'
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]


def test_history_keeps_its_records_in_order(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.history() == []
    records: list[dict[str, object]] = [
        {"step": 1, "loss": 2.5},
        {"event": "evaluation", "best": True},
    ]
    for record in records:
        run.append_history(record)
    assert Run(tmp_path).history() == records


def test_a_run_whose_training_has_not_ended_says_where_it_is_and_whose_adapter_it_has(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    assert "no adapter" in (run.unfinished() or "")
    run.append_history({"event": "evaluation", "step": 0, "best": True})
    run.append_history({"event": "step", "step": 240, "of": 1500})
    (run.checkpoints / "checkpoint-246").mkdir(parents=True)
    run.best.mkdir()
    (run.best / "adapter_model.safetensors").write_bytes(b"weights")
    for step, told in ((0, "step 0, which is the untrained base"), (100, "step 100")):
        write_json(run.best / "best.json", {"step": step})
        assert run.unfinished() == (
            f"unfinished: at step 246 of 1,500; the adapter is that of {told}"
        )
    for path in (run.history_path, run.best / "best.json"):
        path.write_text("{", encoding="utf-8")
    assert "at step 246; the adapter is that of step unknown" in (run.unfinished() or "")
    for odd in ([1], {"a": 1}, "12", True, 1.5, None):
        write_json(run.best / "best.json", {"step": odd})
        assert "that of step unknown" in (run.unfinished() or "")
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    assert run.unfinished() is None


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[1]", "5", '""', "null"])
def test_a_line_of_the_history_that_was_cut_off_is_named(tmp_path: Path, line: str) -> None:
    run = Run(tmp_path)
    run.append_history({"step": 1})
    with run.history_path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ConfigError, match=r"history\.jsonl, line 2") as caught:
        run.history()
    assert caught.value.fix == "delete that line"


def test_a_base_made_beside_the_runs_is_found_from_any_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(config)
    assert run.base_of(config) == "random"
    write_json(run.path / "data.json", {"base": "runs/bases/random-1"})
    made = tmp_path / "runs" / "bases" / "random-1"
    made.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        assert run.base_of(config) == str(made), "predictions record it"
    write_json(run.path / "data.json", {"base": "someone/model"})
    assert run.base_of(config) == "someone/model"


def test_a_command_that_is_advised_finds_the_run_from_here(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(config)
    monkeypatch.chdir(config.runs.parent)
    assert run.named == "first"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_run(run.named).path == run.path.resolve()


def test_a_run_with_spaces_is_quoted_where_a_command_is_advised(config: Config) -> None:
    run = create_run(replace(config, name="a b"))
    assert [find_run(word).path for word in shlex.split(run.named)] == [run.path.resolve()]
    with pytest.raises(ConfigError) as error:
        run.find_adapter("best")
    assert run.named in error.value.fix


def test_the_adapter_of_a_run_that_was_broken_off_is_its_best(config: Config) -> None:
    run = create_run(config)
    with pytest.raises(ConfigError):
        run.find_adapter()
    for folder in (run.best, run.adapter):
        folder.mkdir()
        (folder / "adapter_model.safetensors").touch()
        assert run.find_adapter() == folder
        assert run.find_adapter(str(folder)) == folder
    with pytest.raises(ConfigError, match="it holds no adapter"):
        run.find_adapter(str(run.path))


def test_data_files_of_a_run_are_found_from_any_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside `runs/`, and where the run was started, which need not be the same folder."""
    started, elsewhere = tmp_path / "started", tmp_path / "elsewhere"
    for folder in (started, elsewhere):
        folder.mkdir()
    (started / "train.json").write_text("{}")
    (tmp_path / "test.json").write_text("{}")
    monkeypatch.chdir(started)
    files = {"train": Path("train.json"), "test": Path("test.json")}
    run = create_run(replace(config, data=replace(config.data, **files)))
    assert run.config().data.train == Path("train.json")
    monkeypatch.chdir(elsewhere)
    data = run.config().data
    assert (data.train, data.test) == (started / "train.json", tmp_path / "test.json")
    assert run.test_file() == tmp_path / "test.json"
    write_json(run.path / "data.json", {"base": "b", "test_file": {"path": "generated.json"}})
    assert run.test_file() == Path("generated.json"), "where it was, though it is gone"


@pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
def test_a_run_says_whether_its_catalogue_is_the_one_it_was_trained_with(
    config: Config, tmp_path: Path, line_break: bytes
) -> None:
    assert create_run(config).changed_catalogue() is None, "TinyAgent's own tools"
    path = tmp_path / "töne.yaml"
    path.write_bytes(b"name: a" + line_break)
    named = replace(config, name="own", data=replace(config.data, catalogue=path))
    run = create_run(named)
    assert run.changed_catalogue() is None, "an earlier version kept no hash"
    record = {"path": str(path), "sha256": sha256_of(path)}
    write_json(run.path / "data.json", {"catalogue_file": record})
    assert run.changed_catalogue() is None
    path.write_bytes(b"name: b" + line_break)
    assert str(path) in str(run.changed_catalogue())
    path.unlink()
    with pytest.raises(ConfigError) as gone:
        run.changed_catalogue()
    assert "run own" in gone.value.why
    assert str(run.config_path) in gone.value.fix


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_where_there_are_no_links_a_file_names_the_newest_run(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "symlink", no_links)
    for name in ("first", "second"):
        run = create_run(replace(config, name=name))
        assert find_run("latest", config.runs).path == run.path.resolve()
        assert find_run(str(config.runs / "latest")).path == run.path.resolve()
    assert not (config.runs / "latest").is_symlink()
    predictions = config.runs / "second" / "predictions.jsonl"
    predictions.write_text("")
    assert find_predictions(config.runs / "latest")[""].path == predictions


def test_a_folder_named_latest_is_the_users_to_move(config: Config) -> None:
    (config.runs / "latest" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="move"):
        create_run(config)
    assert (config.runs / "latest" / "mine").exists()


HOLD = """
import sys, time
from pathlib import Path
from tinyagent_fast.runs import holding
with holding(Path(sys.argv[1]), "train", "or wait"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_number_of_the_first_until_that_has_ended(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as caught, holding(tmp_path, "eval", "or --out"):
            pass
        assert f"process {first.pid} " in caught.value.why and "train" in caught.value.why
        first.kill()
    with holding(tmp_path, "eval", "or --out"):
        pass


@pytest.mark.parametrize("process", ["alive", "dead"])
def test_where_there_are_no_locks_the_number_of_the_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: str
) -> None:
    monkeypatch.setattr("fcntl.flock", no_links)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / ".lock").write_text(f"{other.pid} {socket.gethostname()} train")
        if process == "dead":
            other.kill()
            other.wait()
            with holding(tmp_path, "eval", ""):
                pass
        else:
            held = pytest.raises(ConfigError, match=f"process {other.pid}")
            with held, holding(tmp_path, "eval", ""):
                pass
            other.kill()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", read_only)
    with pytest.raises(ConfigError, match="Read-only") as caught:
        refuse_taken_name(config)
    assert "--runs" in caught.value.fix
    with pytest.raises(ConfigError, match="Read-only"), holding(config.runs, "eval", "--out"):
        pass


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200, "a\0b"])
def test_a_name_that_no_folder_can_have_is_refused_before_the_work(
    config: Config, name: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_taken_name(replace(config, name=name))
    assert "--name" in caught.value.fix


def test_a_half_written_last_line_is_cut_off_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for content, kept in ((b"a\nb\n", b"a\nb\n"), (b"a\n\xc3", b"a\n"), (b"half", b""), (b"", b"")):
        path.write_bytes(content)
        cut_broken_line(path)
        assert path.read_bytes() == kept


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{bad", b"[]", b"null", b'"text"', b"{}"])
def test_a_damaged_record_of_a_run_is_named_with_a_fix(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_json(path, "step")


def test_a_config_that_is_no_text_is_no_bug(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        Run(tmp_path).config()
