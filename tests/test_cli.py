"""The command line: quick help, clear messages, exit codes, and what the light commands print."""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyagent_fast.cli import COMMANDS, main
from tinyagent_fast.commands import data_download, preview, score, train
from tinyagent_fast.config import Config
from tinyagent_fast.display import Display
from tinyagent_fast.errors import ConfigError, DataError, GateError, UserError
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.scoring import Prediction
from tinyagent_fast.export.record import ExportRecord
from tinyagent_fast.presets import choose_preset, preset_config
from tinyagent_fast.runs import Run, create_run

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "tokenizers", "trl", "peft", "numpy")
HELP_S = 0.5
HELP_LIBRARIES = 5
"""So often may the help take what the import of tyro takes, if that is more."""


class Output:
    """What a call of the command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Return a function that runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Output:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Output(code, captured.out, captured.err)

    return run


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    # As for users, modules are compiled once and not at every start.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


LOADED = f"""
import sys
from tinyagent_fast.cli import main
code = main(sys.argv[1:])
print(*sorted(set(sys.modules) & {set(HEAVY)!r}), file=sys.stderr)
sys.exit(code)
"""


def timed(code: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run code and give the processor time; a clock counts what else this machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(code, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_comes_at_once_and_loads_nothing_heavy(command: str) -> None:
    tries = []
    for _ in range(3):
        # A slow processor, or one that is shared, needs longer for the library of the flags too.
        _, library_s = timed("import tyro")
        done, taken_s = timed(LOADED, *command.split(), "--help")
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == ""
        assert f"usage: tinyagent-fast {command or 'COMMAND'}" in done.stdout
        tries.append((taken_s, max(HELP_S, HELP_LIBRARIES * library_s)))
        if tries[-1][0] < tries[-1][1]:
            return
    pytest.fail(f"seconds taken and allowed: {tries}")


def test_the_help_lists_every_command(call: Callable[..., Output]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"], ["data", "--help"]):
        got = call(*arguments)
        assert got.code == 0
        for name, (_, text) in COMMANDS.items():
            assert f"  {name}  " in got.out
            assert text in got.out


def test_the_help_of_train_lists_every_setting_and_preset(call: Callable[..., Output]) -> None:
    for arguments in (["--help"], ["--preset", "auto", "--help"], ["--preset", "l4", "-h"]):
        got = call("train", *arguments)
        assert got.code == 0
        for text in ("--train.learning-rate FLOAT", "--resume RUN", "--config FILE", "a100 (One A"):
            assert text in got.out
    assert "(default: 0.0002)" in got.out


def test_the_version_is_printed(call: Callable[..., Output]) -> None:
    assert call("--version").out.startswith("tinyagent-fast 0.")


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        ("train --preset smoke --train.learning-rat 1e-4", "--train.learning-rate"),
        ("preview --train.epoch 1", "--train.epochs"),
        ("eval --limt 5", "--limit"),
        ("score --pair x.json", "--pairs"),
        ("data check x.json --max-length-token 5", "--max-length-tokens"),
        ("data generate --train-entrys 5", "--train-entries"),
        ("data download --revison main", "--revision"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_one_that_was_meant(
    call: Callable[..., Output], arguments: str, suggestion: str
) -> None:
    got = call(*arguments.split())
    assert got.code == 2
    assert "Unrecognized options" in got.err
    assert suggestion in got.err.partition("Perhaps you meant")[2]
    assert "Traceback" not in got.err


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        ("trian", "'train'"),
        ("evaluate", "'eval'"),
        ("data chek", "'data check'"),
        ("generate", "'data generate'"),
        (
            "data",
            "'data check' or 'data roundtrip' or 'data retrieval' or 'data generate' or "
            "'data download'",
        ),
    ],
)
def test_an_unknown_command_is_refused_with_the_one_that_was_meant(
    call: Callable[..., Output], arguments: str, suggestion: str
) -> None:
    got = call(*arguments.split())
    assert (got.code, got.out) == (2, "")
    first, *rest = got.err.splitlines()
    assert suggestion in first
    assert any(line.startswith("  train ") for line in rest)  # the list of all commands


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "smoke"], "train --preset smoke"),
        (["memory", "l4"], "memory --preset l4"),
        (["train", "mine.yaml", "--name", "x"], "train --config mine.yaml"),
        (["train", "so"], "train --help"),
        (["train", "--train.epochs", "2", "smoke"], "train --preset smoke"),
        (["memory", "--card", "l4", "--name", "x", "l4"], "memory --preset l4"),
        (["doctor", "--train.epochs", "2", "mine.yaml"], "doctor --config mine.yaml"),
        (["preview", "--name", "x", "smoke"], "preview --preset smoke"),
        (["chat", "create", "a", "note"], "chat --once 'create a note'"),
        (["chat", "--run", "x", "--once", "create", "a", "note"], "chat --once 'create a note'"),
        (["chat", "--run", "x", "create", "a", "note"], "chat --once 'create a note'"),
        (["agent", "create", "a", "note", "--dry-run"], "agent 'create a note'"),
        (["agent", "--run", "x", "create", "a", "note"], "agent 'create a note'"),
        (["agent", "create", "--run", "x", "a", "note"], "agent 'create a note'"),
        (["serve", "--port", "0", "create", "a", "note"], "agent 'create a note'"),
    ],
)
def test_a_word_without_its_flag_is_answered_with_the_command_that_was_meant(
    call: Callable[..., Output], words: list[str], meant: str
) -> None:
    got = call(*words)
    assert (got.code, got.out) == (2, "")
    assert f"tinyagent-fast {meant}" in got.err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["eval", "--adapter", ""], "--adapter ''"),
        (["eval", "--out="], "--out="),
        (["train", "--preset", "smoke", "--data.test", ""], "--data.test ''"),
        (["report", ""], "report ''"),
        (["score", ""], "score ''"),
        (["data", "check", ""], "data check ''"),
        (["compare", "a", ""], "B is empty"),
        (["compare", "a", "b", "--out", ""], "--out ''"),
        (["compare", "a", "b", "--runs", ""], "--runs ''"),
        (["compare", "a", "b", "--catalogue="], "--catalogue="),
        (["tools", "check", ""], "tools check ''"),
        (["agent", "--dry-run", ""], "--dry-run ''"),
        (["chat", "--once", ""], "--once ''"),
    ],
)
def test_an_empty_value_is_refused_whatever_it_is_for(
    call: Callable[..., Output], words: list[str], shown: str
) -> None:
    got = call(*words)
    assert (got.code, got.out) == (2, "")
    assert shown in got.err and "empty" in got.err


def test_an_unknown_command_that_is_like_no_other_suggests_none(
    call: Callable[..., Output],
) -> None:
    got = call("--verbose")
    assert got.code == 2
    assert "did you mean" not in got.err


FAILURES: list[tuple[BaseException, int, str]] = [
    (UserError("what", "why", "fix"), 2, "error: what\n  why: why\n  fix: fix\n"),
    (DataError("a file", "it is cut", "fetch it"), 2, "error: a file\n"),
    (ConfigError("a setting", "too big", "less"), 2, "error: a setting\n"),
    (GateError("success 0.1 is below 0.5"), 1, "gate failed: success 0.1 is below 0.5\n"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    (SystemExit("no such thing"), 2, "no such thing\n"),
    (SystemExit(2), 2, ""),
    (SystemExit(None), 0, ""),
    (
        ModuleNotFoundError("No module named 'torch'", name="torch"),
        2,
        "error: tinyagent-fast score",
    ),
]


@pytest.mark.parametrize(("error", "code", "message"), FAILURES, ids=[repr(f[0]) for f in FAILURES])
def test_an_error_that_is_no_bug_gives_its_message_without_a_traceback(
    call: Callable[..., Output],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(score, "run", fail)
    got = call("score")
    assert got.code == code
    assert got.err.startswith(message)
    assert "Traceback" not in got.err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("unexpected"),
        ModuleNotFoundError("x", name="tinyagent_fast.absent"),
        ModuleNotFoundError("x", name="torch.absent"),
        BaseException("as a panic of the tokenizers library is"),
    ],
)
def test_a_bug_gives_a_traceback_and_exit_code_3(
    call: Callable[..., Output], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(score, "run", fail)
    got = call("score")
    assert got.code == 3
    assert got.err.startswith("Traceback")


LABEL = '1. get_email_address("Ann")\n2. join()'
PAIRS = [
    {"label": LABEL, "prediction": LABEL, "note": "others are ignored"},
    {"label": LABEL, "prediction": ""},
    {"label": LABEL, "prediction": '1. get_phone_number("Ann")\n2. join()'},
    {"label": LABEL, "prediction": '1. get_email_address("Bob")\n2. join()'},
    {"label": '1. f("a")\n2. join()', "prediction": "1. join()"},
]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS), encoding="utf-8")
    return path


WITHOUT_TORCH = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
from tinyagent_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_pairs_are_scored_as_json_lines_in_order_where_torch_cannot_be_imported(
    pairs_file: Path,
) -> None:
    done = python(WITHOUT_TORCH, "score", "--pairs", pairs_file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [
        {"success": 1.0, "success_dag": 1.0, "tool_recall": 1.0, "failure": None},
        {"success": 0.0, "success_dag": 0.0, "tool_recall": 0.0, "failure": "empty"},
        {"success": 0.0, "success_dag": 0.0, "tool_recall": 0.5, "failure": "missing_tool"},
        {"success": 1.0, "success_dag": 1.0, "tool_recall": 1.0, "failure": None},
        {"success": 0.0, "success_dag": 0.0, "tool_recall": 0.0, "failure": "bad_label"},
    ]
    for line in lines:
        assert list(line) == ["success", "success_dag", "tool_recall", "failure"]
        assert [type(value) for value in line.values()][:3] == [float] * 3


def write_catalogue(path: Path, tool: str) -> Path:
    parameters = "parameters: [{name: x, type: str, value: person}]"
    path.write_text(f"tools: [{{name: {tool}, phrases: ['do {{x}}'], {parameters}}}]")
    return path


def test_pairs_are_scored_with_the_tools_of_a_catalogue(
    call: Callable[..., Output], tmp_path: Path, pairs_file: Path
) -> None:
    catalogue = write_catalogue(tmp_path / "tools.yaml", "f")
    label = PAIRS[-1]["label"]
    pairs_file.write_text(json.dumps([{"label": label, "prediction": label}]))
    got = call("score", "--pairs", pairs_file, "--json", "--catalogue", catalogue)
    assert json.loads(got.out)["success"] == 1.0


@pytest.mark.parametrize("lines", [False, True])
def test_a_byte_order_mark_is_no_part_of_pairs_nor_of_a_catalogue(
    lines: bool, call: Callable[..., Output], tmp_path: Path, pairs_file: Path
) -> None:
    catalogue = write_catalogue(tmp_path / "tools.yaml", "f")
    pair = {"label": PAIRS[-1]["label"], "prediction": PAIRS[-1]["label"]}
    pairs_file.write_text(json.dumps(pair) if lines else json.dumps([pair]))
    for path in (catalogue, pairs_file):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    got = call("score", "--pairs", pairs_file, "--json", "--catalogue", catalogue)
    assert json.loads(got.out)["success"] == 1.0


def test_pairs_are_summed_up_for_people(call: Callable[..., Output], pairs_file: Path) -> None:
    got = call("score", "--pairs", pairs_file)
    assert got.code == 0
    assert "success      40.0 %" in got.out
    assert "n = 5" in got.out
    for code in ("empty", "missing_tool", "bad_label"):
        assert f"  {code}: 1\n" in got.out


def test_the_figures_of_all_pairs_are_one_object_of_the_same_form_as_a_runs(
    call: Callable[..., Output], tmp_path: Path, pairs_file: Path
) -> None:
    whole = json.loads(call("score", "--pairs", pairs_file, "--json", "--summary").out)
    assert (whole["n"], whole["success"]["count"]) == (5, 2)
    assert whole["failures"] == {"empty": 1, "missing_tool": 1, "bad_label": 1}
    of_run = json.loads(call("score", predictions_in(tmp_path / "e"), "--json").out)
    assert whole.keys() == of_run.keys()


def test_a_summary_of_predictions_has_figures_and_no_plans(
    call: Callable[..., Output], tmp_path: Path
) -> None:
    folder = predictions_in(tmp_path / "e")
    told = call("score", folder, "--summary").out
    assert "success_dag" in told
    assert LABEL.splitlines()[0] not in told
    as_json = call("score", folder, "--json").out
    assert call("score", folder, "--json", "--summary").out == as_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it cannot be read as JSON"),
        ("[" * 100_000, "it cannot be read as JSON"),
        ("{}", "item 0"),
        ("[1]", "item 0"),
        ('[{"label": "a", "prediction": "b"}, {"label": "a"}]', "item 1"),
        ('[{"label": "a", "label": "c", "prediction": "b"}]', "'label' stands twice"),
        ('[{"label": "a", "prediction": null}]', "it has no texts `label` and `prediction`"),
        ("[]", "the list is empty"),
    ],
)
def test_a_pairs_file_of_another_form_is_the_users_error(
    call: Callable[..., Output], pairs_file: Path, content: str, message: str
) -> None:
    pairs_file.write_text(content)
    got = call("score", "--pairs", pairs_file)
    assert (got.code, got.out) == (2, "")
    assert message in got.err


def test_a_pairs_file_that_is_missing_or_no_text_is_the_users_error(
    call: Callable[..., Output], pairs_file: Path
) -> None:
    assert call("score", "--pairs", "absent.json").code == 2
    pairs_file.write_bytes(b"\xff\xfe[]")
    assert call("score", "--pairs", pairs_file).code == 2


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS[:1] * 4000))
    words = [sys.executable, "-m", "tinyagent_fast", "score", "--pairs", str(path), "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b'{"success": 1.0')
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def predictions_in(folder: Path, count: int = 3, label: str = LABEL) -> Path:
    file = PredictionFile(folder)
    file.start({})
    for number in range(count):
        row = Prediction(
            key=f"{number}/0",
            query="What is Ann's email?",
            label=label,
            prediction=label if number else "",
            stop_reason="stop",
            new_tokens=9,
        )
        file.append([row])
    return file.path


@pytest.mark.parametrize("folder", ["eval", "test/after"])
@pytest.mark.parametrize("form", ["file", "evaluation", "run"])
def test_predictions_are_scored_again_by_file_evaluation_or_run(
    call: Callable[..., Output], tmp_path: Path, form: str, folder: str
) -> None:
    run = tmp_path / "runs" / "a"
    path = predictions_in(run / folder)
    target = {"file": path, "evaluation": path.parent, "run": run}[form]
    figures = json.loads(call("score", target, "--json").out)
    assert figures["n"] == 3
    assert figures["success"]["share"] == pytest.approx(2 / 3)
    assert figures["failures"] == {"empty": 1}
    assert call("score", target).out.startswith("#")


@pytest.mark.parametrize("words", [["score", "secnd"], ["compare", "secnd", "first"]])
def test_an_unknown_run_is_answered_with_those_that_are_there(
    call: Callable[..., Output], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        predictions_in(create_run(replace(preset_config("smoke"), name=name)).path / "eval")
    got = call(*words)
    assert (got.code, got.out) == (2, "")
    assert "did you mean 'second'?; there: first, second" in got.err
    assert json.loads(call("score", "second", "--json").out)["n"] == 3


@pytest.mark.parametrize("folder", ["eval", "test/after"])
def test_a_run_is_scored_with_the_tools_it_was_trained_for(
    call: Callable[..., Output], tmp_path: Path, folder: str
) -> None:
    write_catalogue(tmp_path / "tools.yaml", "f")
    write_catalogue(tmp_path / "other.yaml", "g")
    config = replace(preset_config("smoke"), name="a", runs=tmp_path / "runs")
    config = replace(config, data=replace(config.data, catalogue=tmp_path / "tools.yaml"))
    run = create_run(config)
    predictions_in(run.path / folder, label='1. f("a")\n2. join()')
    figures = json.loads(call("score", run.path, "--json").out)
    assert figures["label_problems"] == {}
    assert figures["success"]["share"] == pytest.approx(2 / 3)
    other = call("score", run.path, "--json", "--catalogue", tmp_path / "other.yaml")
    assert (other.code, other.out) == (2, "")
    assert "3 of 3 labels call f" in other.err
    assert "--catalogue FILE" in other.err


def test_pairs_with_unknown_tools_are_told_to_name_the_catalogue(
    call: Callable[..., Output], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.json"
    plan = '1. f("a")\n2. join()'
    pairs.write_text(json.dumps([{"label": plan, "prediction": plan}]), encoding="utf-8")
    refused = call("score", "--pairs", pairs)
    assert refused.code == 2
    assert "--catalogue FILE" in refused.err
    write_catalogue(tmp_path / "tools.yaml", "f")
    known = call("score", "--pairs", pairs, "--json", "--catalogue", tmp_path / "tools.yaml")
    assert json.loads(known.out)["success"] == 1


def test_the_latest_run_is_scored_if_none_is_named(
    call: Callable[..., Output], tmp_path: Path
) -> None:
    run = create_run(replace(preset_config("smoke"), name="a", runs=tmp_path / "runs"))
    predictions_in(run.evaluation)
    assert json.loads(call("score", "--json").out)["n"] == 3


def test_predictions_that_are_missing_or_none_are_the_users_error(
    call: Callable[..., Output], tmp_path: Path, pairs_file: Path
) -> None:
    absent = call("score", "runs/absent")
    assert absent.code == 2
    assert "runs/absent" in absent.err
    empty = call("score", predictions_in(tmp_path / "empty", count=0).parent)
    assert empty.code == 2
    both = call("score", predictions_in(tmp_path / "e"), "--pairs", pairs_file)
    assert (both.code, both.out) == (2, "")
    assert "one call scores one file" in both.err


def test_generated_data_is_checked_without_a_problem(
    call: Callable[..., Output], tiny_data: Path
) -> None:
    train_file, test_file = (tiny_data / f"{n}_data.json" for n in ("training", "testing"))
    got = call("data", "check", train_file, "--against", test_file, "--json")
    assert got.code == 0
    figures = json.loads(got.out)
    assert figures["read"]["entries"] == 40
    assert figures["read"]["problem_count"] == 0
    counts = figures["point_counts"]
    assert counts["plan"] == 40
    assert counts["join"] == 40 + counts["replan"]
    text = call("data", "check", train_file).out
    assert "entries: 40 usable, 0 not" in text
    assert "problems: none" in text


def test_a_file_with_bad_entries_gives_exit_code_1_and_names_them(
    call: Callable[..., Output], tiny_data: Path, tmp_path: Path
) -> None:
    entries = json.loads((tiny_data / "testing_data.json").read_text(encoding="utf-8"))
    key = list(entries)[2]
    del entries[key]["output"][0]["raw_output"]
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    got = call("data", "check", "bad.json")
    assert got.code == 1
    assert "entries: 5 usable, 1 not" in got.out
    assert f"{key} output[0].raw_output" in got.out


def test_a_file_that_is_not_there_is_the_users_error(call: Callable[..., Output]) -> None:
    got = call("data", "check", "absent.json")
    assert got.code == 2
    assert "there is no such file" in got.err
    assert call("data", "check").code == 2


def test_data_is_generated_as_the_flags_say(call: Callable[..., Output], tmp_path: Path) -> None:
    sizes = ["--train-entries", "12", "--test-entries", "3"]
    got = call("data", "generate", *sizes, "--prompt-style", "full", "--seed", "4", "--out", "d")
    assert got.code == 0
    assert "d/training_data.json: 12 entries" in got.out
    assert "--data.train d/training_data.json --data.test d/testing_data.json" in got.out
    entries = json.loads((tmp_path / "d" / "training_data.json").read_text(encoding="utf-8"))
    assert len(entries) == 12
    assert len(json.loads((tmp_path / "d" / "testing_data.json").read_text())) == 3
    assert "Examples:" in next(iter(entries.values()))["output"][0]["raw_input"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-entries 0", "train_entries must be 1 or more"),
        ("--test-entries -1", "test_entries 0 or more"),
        ("--train-entries many", "invalid literal"),
        ("--failure-share 2", "failure_share must be in 0..1"),
        ("--prompt-style long", "'short', 'full'"),
        ("--catalogue absent.yaml", "it cannot be read"),
    ],
)
def test_data_is_not_generated_from_bad_values(
    call: Callable[..., Output], tmp_path: Path, flags: str, message: str
) -> None:
    got = call("data", "generate", *flags.split(), "--out", "d")
    assert (got.code, got.out) == (2, "")
    assert message in got.err
    assert "Traceback" not in got.err
    assert not (tmp_path / "d").exists()


def test_generating_replaces_no_file_unasked(call: Callable[..., Output], tmp_path: Path) -> None:
    published = tmp_path / "data" / "training_data.json"
    published.parent.mkdir()
    published.write_text("734 MB")
    arguments = ["data", "generate", "--out", "data", "--train-entries", "3"]
    got = call(*arguments)
    assert got.code == 2
    assert "training_data.json would be replaced" in got.err
    assert published.read_text() == "734 MB"
    assert call(*arguments, "--overwrite").code == 0
    assert len(json.loads(published.read_text())) == 3


def test_rows_are_shown_with_their_counts_as_the_preset_of_this_machine_has_them(
    call: Callable[..., Output], tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyagent_fast.commands.preview.choose_preset", lambda: ("smoke", "why"))
    files = ["--data.train", tiny_data / "training_data.json"]
    got = call("preview", "--preset", "auto", "--rows", "2", *files)
    assert got.code == 0, got.err
    rows = [line.split() for line in got.out.splitlines() if "supervised tokens" in line]
    assert len(rows) == 2
    prompt = [int(words[words.index("prompt") - 1]) for words in rows]
    supervised = [int(words[words.index("supervised") - 1]) for words in rows]
    total = sum(prompt) + sum(supervised)
    assert min(prompt) > 10 < min(supervised)
    last = got.out.splitlines()[-1]
    assert last.startswith(f"2 rows: {total} tokens, {sum(supervised)} supervised (")
    assert "### Instruction:" in got.out
    marked = re.findall("\u00ab(.*?)\u00bb", got.out, re.DOTALL)
    assert "".join(marked).count("join()<END_OF_PLAN>") == 2
    assert len(marked) == sum(supervised)
    assert "shared prefix" in last
    alone = call("preview", "--preset", "smoke", "--rows", "1", *files).out.splitlines()[-1]
    assert alone.startswith("1 row: ") and "shared" not in alone


@pytest.mark.parametrize(
    ("most", "own", "generated", "shown_own", "shown_generated"),
    [
        (3, 30_000, 100, 2, 1),
        (4, 2, 30_000, 2, 2),
        (10, 2, 5, 2, 5),
        (10, 20, 1, 9, 1),
        (2, 5, 0, 2, 0),
    ],
)
def test_of_a_mixture_both_kinds_of_rows_are_shown(
    most: int, own: int, generated: int, shown_own: int, shown_generated: int
) -> None:
    mixed = {"own_rows": own, "rows": generated}
    # Further passes over the own rows stand behind the generated ones.
    chosen = preview.chosen_rows(most, 3 * own + generated, mixed)
    assert chosen == [*range(shown_own), *range(own, own + shown_generated)]
    assert preview.chosen_rows(most, 3, None) == [0, 1, 2][:most]


def test_no_rows_are_nothing_to_show(call: Callable[..., Output]) -> None:
    got = call("preview", "--rows", "0")
    assert (got.code, got.out) == (2, "")
    assert "ask for 1 or more" in got.err


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Run | None]]:
    """Replace training by a list of what it was asked for, on a machine that nothing lacks."""
    monkeypatch.setattr(train, "check_machine", lambda *_, **__: None)
    asked: list[tuple[Config, Run | None]] = []
    module = types.ModuleType("tinyagent_fast.training.fit")

    def fake(config: Config, console: object, resume: Run | None = None) -> None:
        asked.append((config, resume))

    module.__dict__["train"] = fake
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_train_takes_the_preset_of_this_machine_and_says_why(
    call: Callable[..., Output],
    trained: list[tuple[Config, Run | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "choose_preset", lambda: ("smoke", "the reason"))
    for arguments in ([], ["--preset", "auto"], ["--preset=auto"]):
        got = call("train", *arguments, "--train.batch", "3")
        assert got.code == 0, got.err
        assert "preset smoke: the reason" in got.out
    config = preset_config("smoke")
    wanted = replace(config, train=replace(config.train, batch=3))
    assert trained == [(wanted, None)] * 3
    named = call("train", "--preset", "nano").out
    assert named.count("preset nano: ") == 1 and "the reason" not in named


def test_a_stop_before_there_is_a_run_gives_the_command_that_starts_again(
    call: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "check_machine", stop)
    words = ["train", "--preset", "smoke", "--name", "a b"]
    got = call(*words)
    assert got.code == 130
    assert "no step was made" in got.err and "--resume" not in got.err
    assert shlex.split(got.err.splitlines()[-1].partition("with: ")[2]) == [
        "tinyagent-fast",
        *words,
    ]


def test_a_run_is_resumed_with_its_own_config_also_by_make(
    call: Callable[..., Output], trained: list[tuple[Config, Run | None]], tmp_path: Path
) -> None:
    config = replace(preset_config("smoke"), name="a", runs=Path("runs"))
    run = create_run(config)
    # make passes --preset auto whatever else is asked.
    assert call("train", "--preset", "auto", "--resume", "a").code == 0
    assert call("train", "--resume=latest").code == 0
    assert trained == [(config, Run(run.path.resolve()))] * 2
    got = call("train", "--resume", "b")
    assert got.code == 2
    assert "there: a" in got.err


def test_settings_that_cannot_be_are_refused_before_training(
    call: Callable[..., Output], trained: list[tuple[Config, Run | None]]
) -> None:
    got = call("train", "--preset", "smoke", "--train.epochs", "0", "--lora.rank", "0")
    assert got.code == 2
    assert "train.epochs" in got.err
    assert "lora.rank" in got.err
    assert trained == []


def test_the_published_data_is_downloaded_when_it_is_asked_for_and_absent(
    call: Callable[..., Output],
    trained: list[tuple[Config, Run | None]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    downloads: list[object] = []
    monkeypatch.setattr(data_download, "run", downloads.append)
    assert call("train", "--preset", "l4").code == 0
    assert downloads == [[]]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "training_data.json").write_text("{}")
    call("train", "--preset", "l4")
    call("train", "--preset", "l4", "--data.train", "other.json")
    assert len(downloads) == 1
    assert len(trained) == 3


@pytest.mark.parametrize(
    ("name", "memory_gib", "capability", "preset"),
    [
        ("", 0, 0, "cpu"),
        ("T4", 14.7, 7, "t4"),
        ("V100", 31.7, 7, "t4"),
        ("L4", 22.2, 8, "l4"),
        ("RTX 4080", 15.9, 8, "t4"),
        ("A100", 39.4, 8, "a100"),
        ("H200", 139.8, 9, "a100"),
    ],
)
def test_the_preset_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, memory_gib: float, capability: int, preset: str
) -> None:
    properties = SimpleNamespace(
        name=name, total_memory=int(memory_gib * 2**30), major=capability, minor=0
    )
    cuda = SimpleNamespace(
        is_available=lambda: bool(name), get_device_properties=lambda _: properties
    )
    torch: Any = SimpleNamespace(cuda=cuda, set_num_threads=lambda _: None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    chosen, reason = choose_preset()
    assert chosen == preset
    assert name in reason
    assert chosen in {"cpu", "t4", "l4", "a100"}


def test_eval_needs_a_run_with_an_adapter(call: Callable[..., Output], tmp_path: Path) -> None:
    assert "there: none" in call("eval").err
    create_run(replace(preset_config("smoke"), name="a", runs=tmp_path / "runs"))
    got = call("eval", "--run", "a")
    assert got.code == 2
    assert "holds no adapter_model.safetensors" in got.err
    assert "--resume a" in got.err
    assert "eval.batch must be 1 or more" in call("eval", "--batch", "0").err


def test_the_program_can_be_run_as_a_module() -> None:
    words = [sys.executable, "-m", "tinyagent_fast", "nonsense"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert "nonsense" in done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--run one", "make eval RUN=one ENGINE=gguf\n"),
        ("", "make eval RUN=two ENGINE=gguf\n"),
        ("--run one --out there", "make eval RUN=one ENGINE=gguf MODEL=there/gguf/a.gguf\n"),
    ],
)
def test_export_names_the_run_and_the_files_to_go_on_with(
    call: Callable[..., Output],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    named: str,
) -> None:
    for name in ("one", "two"):
        create_run(replace(preset_config("smoke"), name=name))
    folder = Path("there") if "--out" in flags else tmp_path / "export"
    folder.mkdir()
    file = {"path": "gguf/a.gguf", "kind": "gguf", "quant": "f16", "sha256": "", "size_bytes": 1}
    file |= {"seconds": 0.0, "made_from": "", "details": {}}
    ExportRecord(folder).update(artefacts=[file])
    monkeypatch.setattr("tinyagent_fast.api.export_run", lambda *_, **__: folder)
    assert call("export", *flags.split()).out.endswith(f"next: {named}")
    ExportRecord(folder).update(artefacts=[])
    assert "ENGINE=gguf" not in call("export", *flags.split()).out


def test_ctrl_c_that_a_library_swallows_ends_the_command_before_its_next_step(
    call: Callable[..., Output], monkeypatch: pytest.MonkeyPatch, quiet: Any
) -> None:
    done = []

    def work(_: object) -> int:
        display = Display(quiet)
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with display.bar("training"):
            done.append("trained")
        return 0

    monkeypatch.setattr(score, "run", work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert (call("score").code, done) == (130, [])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_native_code_makes_another_error_of_is_no_bug(
    call: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = True

    def work(_: object) -> int:
        with suppress(KeyboardInterrupt):
            if stops:
                signal.raise_signal(signal.SIGINT)
        raise SystemError("returned a result with an exception set")

    monkeypatch.setattr(score, "run", work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert call("score").code == 130
        stops = False
        assert call("score").code == 3
    finally:
        signal.signal(signal.SIGINT, before)


class _Attribute:
    """An attribute that gets a signal while its class is made, as any may within an import."""

    def __set_name__(self, owner: type, name: str) -> None:
        signal.raise_signal(signal.SIGINT)


def _makes_a_class(_: object) -> int:
    type("Broken", (), {"attribute": _Attribute()})
    return 0


def _gives_a_reason_of_its_own(_: object) -> int:
    try:
        return _makes_a_class(None)
    except Exception as error:
        raise UserError("a model", str(error), "take another one") from error


@pytest.mark.parametrize("work", [_makes_a_class, _gives_a_reason_of_its_own])
def test_ctrl_c_while_a_class_is_made_is_no_bug(
    work: Callable[[object], int], call: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "run", work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert call("score").code == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_again_while_the_process_ends_leaves_message_and_code_as_they_are() -> None:
    done = python("""
import atexit, signal, sys
from tinyagent_fast import cli
from tinyagent_fast.commands import score

def run(_):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: signal.raise_signal(signal.SIGINT))
score.run = run
sys.argv = ["tinyagent-fast", "score"]
sys.exit(cli.main())
""")
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")


@pytest.mark.parametrize("kind", [PermissionError, FileExistsError, NotADirectoryError])
def test_what_files_and_rights_do_not_allow_is_the_users_to_repair(
    kind: type[OSError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    number = {
        PermissionError: errno.EACCES,
        FileExistsError: errno.EEXIST,
        NotADirectoryError: errno.ENOTDIR,
    }[kind]

    def fail(_: object) -> int:
        raise kind(number, "not allowed", "some/place")

    monkeypatch.setattr(score, "run", fail)
    assert main(["score", "x"]) == 2
    said = capsys.readouterr().err
    assert "some/place" in said and "fix:" in said and "bug" not in said


@pytest.mark.parametrize("word", ["a\0b", "a\udc80b", "n" * 300, "/".join(["d" * 200] * 30)])
@pytest.mark.parametrize(
    "command",
    [
        ["data", "check"],
        ["score", "--pairs"],
        ["report", "--run"],
        ["compare", "x"],
        ["data", "generate", "--entries", "4", "--out"],
        ["data", "generate", "--out", "here", "--catalogue"],
        ["train", "--preset", "smoke", "--name"],
        ["train", "--config"],
    ],
    ids=" ".join,
)
def test_a_name_that_no_file_can_have_is_no_bug(
    command: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tinyagent-fast", *command, word])
    code = main()
    assert code == 2 or (code == 0 and "generate" in command)
    assert "bug" not in capsys.readouterr().err


def test_every_command_holds_back_what_bitsandbytes_says_when_it_is_imported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)  # as it is in a new process
    logger = logging.getLogger("bitsandbytes.of.a.test")
    logger.warning("before")
    main(["memory", "--json"])
    logger.warning("after")
    assert caplog.messages == ["before"]


def test_nor_is_it_where_rich_prints(tmp_path: Path) -> None:
    # Through rich, which makes an exit with code 1 of it.
    words = f"{sys.executable} -m tinyagent_fast memory --preset l4"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} | true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_user_typed_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--once", "hi", "--model", "red\x1b[31m.gguf"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and r"red\x1b[31m.gguf" in said
