"""`eval --engine gguf`: every exported file is measured, and one table compares them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.cli import main
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.runs import Run, create_run

MAX_NEW_TOKENS = 6


@pytest.fixture
def run(
    tiny_merged: Path,
    tmp_path: Path,
    config_in: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Return a run of the tiny model, with an adapter file but nothing exported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    config = config_in(tmp_path, eval={"limit": 3, "batch": 2, "max_new_tokens": MAX_NEW_TOKENS})
    config = replace(config, model=replace(config.model, base=str(tiny_merged)))
    made: Run = create_run(config)
    made.adapter.mkdir()
    (made.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    return made


@pytest.fixture
def exported(run: Run, tiny_merged: Path) -> Run:
    """Return the run with an f16 and an f32 file in its export."""
    pytest.importorskip("xllamacpp", reason="these tests run llama.cpp: pip install xllamacpp")
    from tinyagent_fast.export.chat_template import chat_template
    from tinyagent_fast.export.conversion import convert_to_gguf

    folder = run.path / "export" / "gguf"
    folder.mkdir(parents=True)
    for file_type in ("f16", "f32"):
        convert_to_gguf(
            tiny_merged,
            folder / f"tiny-{file_type}.gguf",
            quant=file_type,
            name="tiny",
            chat_template=chat_template("alpaca", None, bos=False),
            extra={},
        )
    return run


def evaluate(run: Run, *words: object) -> int:
    return main(["eval", "--run", str(run.path), "--threads", "1", *map(str, words)])


def table_of(run: Run) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((run.path / "eval-gguf.json").read_text(encoding="utf-8"))
    return table


def record(run: Run, **changes: Any) -> None:
    """Write an export.json that lists the f32 file alone."""
    path = run.path / "export" / "gguf" / "tiny-f32.gguf"
    artefact = {
        "path": "gguf/tiny-f32.gguf",
        "kind": "gguf",
        "quant": "f32",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size_bytes": path.stat().st_size,
        "seconds": 1.0,
        "made_from": "x",
        **changes,
    }
    others = {**artefact, "path": "merged", "kind": "merged"}
    content = {"artefacts": [others, artefact], "gates": [], "passed": True}
    (run.path / "export" / "export.json").write_text(json.dumps(content))


def test_all_exported_files_are_evaluated_and_compared_with_f16(
    exported: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(exported, "--engine", "gguf") == 0
    table = table_of(exported)
    assert (table["reference"], table["queries"]) == ("tiny-f16.gguf", 3)
    first, second = table["rows"]
    assert (first["name"], first["comparison"]) == ("tiny-f16.gguf", None)
    assert second["comparison"]["n"] == 3
    assert second["size_bytes"] > 1.5 * first["size_bytes"]
    for stem in ("tiny-f16", "tiny-f32"):
        folder = exported.path / f"eval-gguf-{stem}"
        assert len(PredictionFile(folder).read()) == 3
        assert (folder / "metrics.json").exists()
        assert (folder / "report.md").exists()
    written = (exported.path / "eval-gguf.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert all(line in printed for line in written.splitlines()[2:])
    assert "all 3 prompts have the token ids of training" in printed
    assert "adds the adapter to the table" in printed


def copy_as_adapter(run: Run, **changes: Any) -> None:
    """Let predictions of the f16 file pass for those of the run's adapter."""
    shutil.copytree(run.path / "eval-gguf-tiny-f16", run.evaluation)
    path = PredictionFile(run.evaluation).made_with_path
    made_with = json.loads(path.read_text(encoding="utf-8"))
    digest = hashlib.sha256(b"weights").hexdigest()
    path.write_text(json.dumps({**made_with, "adapter_sha256": digest, **changes}))


def test_the_adapter_is_the_reference_if_it_did_the_same_task(exported: Run) -> None:
    model = exported.path / "export" / "gguf" / "tiny-f16.gguf"
    assert evaluate(exported, "--model", model) == 0
    assert table_of(exported)["reference"] == "tiny-f16.gguf"
    copy_as_adapter(exported)
    assert evaluate(exported, "--model", model) == 0
    table = table_of(exported)
    assert table["reference"] == "adapter"
    assert [row["name"] for row in table["rows"]] == ["adapter", "tiny-f16.gguf"]
    assert table["rows"][1]["comparison"]["identical_texts"] == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_sha256": "another"}, "(adapter_sha256)"),
        ({"max_new_tokens": 7}, "(max_new_tokens)"),
        ({"test_sha256": "another"}, "(test_sha256)"),
    ],
)
def test_an_adapter_measured_otherwise_is_no_reference_and_that_is_said(
    changes: dict[str, Any], said: str, exported: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    model = exported.path / "export" / "gguf" / "tiny-f16.gguf"
    assert evaluate(exported, "--model", model) == 0
    copy_as_adapter(exported, **changes)
    assert evaluate(exported, "--model", model) == 0
    assert table_of(exported)["reference"] == "tiny-f16.gguf"
    assert f"is for something else {said}" in capsys.readouterr().out


def test_the_record_decides_which_files_there_are(
    exported: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    record(exported)
    assert evaluate(exported, "--engine", "gguf") == 0
    assert [row["name"] for row in table_of(exported)["rows"]] == ["tiny-f32.gguf"]
    assert table_of(exported)["reference"] is None
    assert "is not the file" not in capsys.readouterr().out


def test_a_file_changed_since_its_export_is_told(
    exported: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    record(exported, sha256="0" * 64)
    assert evaluate(exported, "--engine", "gguf") == 0
    assert "note: tiny-f32.gguf is not the file that" in capsys.readouterr().out


def test_a_second_evaluation_generates_nothing_unless_asked_to(
    exported: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    record(exported)
    assert evaluate(exported, "--engine", "gguf") == 0
    first = table_of(exported)
    capsys.readouterr()
    assert evaluate(exported, "--engine", "gguf") == 0
    assert table_of(exported) == first
    assert "3 predictions are there" in capsys.readouterr().out
    assert evaluate(exported, "--engine", "gguf", "--fresh") == 0
    assert "predictions are there" not in capsys.readouterr().out


def test_results_go_where_out_says(exported: Run, tmp_path: Path) -> None:
    record(exported)
    assert evaluate(exported, "--engine", "gguf", "--out", tmp_path / "there") == 0
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {"eval-gguf-tiny-f32", "eval-gguf.json", "eval-gguf.md"}
    assert not (exported.path / "eval-gguf.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--engine gguf", "it has no GGUF file"),
        ("--model model.safetensors", "only GGUF files"),
        ("--model absent.gguf", "it is no file"),
        ("--engine transformers --model a.gguf", "transformers does not run GGUF"),
        ("--engine gguf --adapter none", "the adapter is merged into it"),
        ("--engine gguf --backend transformers", "leave --backend out"),
        ("--engine transformers", "it is for llama.cpp only"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: str, said: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run, *words.split()) == 2
    assert said in capsys.readouterr().err
