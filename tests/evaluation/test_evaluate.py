"""`eval`: one way for every engine, no flag ignored, and a table that compares GGUF files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tinyagent_fast.cli import main
from tinyagent_fast.evaluation.evaluate import ENGINES
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.inference.engine import Completion, EngineName, Limits, OnToken, Prompt
from tinyagent_fast.models import libraries
from tinyagent_fast.prompts.retrieval import load_retriever
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
            texts={"tokenizer.chat_template": chat_template("alpaca", None, bos=False)},
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
    said = "all 3 prompts have the token ids of training"
    for stem in ("tiny-f16", "tiny-f32"):
        folder = exported.path / f"eval-gguf-{stem}"
        assert len(PredictionFile(folder).read()) == 3
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["generation"]["notes"] == [said]
        made_with = json.loads((folder / "made_with.json").read_text(encoding="utf-8"))
        assert made_with["engine"] == "llama.cpp"
        assert (folder / "report.md").exists()
    written = (exported.path / "eval-gguf.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert all(line in printed for line in written.splitlines()[2:])
    assert printed.count("## ") == 1, "nothing is printed at length but the table"
    f16, f32 = ([cell.strip() for cell in line.split("|")] for line in written.splitlines()[-2:])
    assert f16[4:7] == ["reference", "", ""]
    assert f32[4].startswith("+0.0 (")
    assert f32[6] == f"{second['comparison']['identical_texts']} of 3"
    assert said in printed
    assert "adds the adapter to the table" in printed


def test_with_a_grammar_every_whole_plan_is_right_and_the_headline_stays_as_it_was(
    exported: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    model = exported.path / "export" / "gguf" / "tiny-f16.gguf"
    words = ("--model", model, "--eval.max-new-tokens", "200")
    assert evaluate(exported, *words) == 0
    free = table_of(exported)
    before = PredictionFile(exported.path / "eval-gguf-tiny-f16").read()
    assert evaluate(exported, *words, "--grammar", "on") == 0
    assert "with the grammar" in capsys.readouterr().out
    held = exported.path / "eval-gguf-tiny-f16-grammar"
    failures = json.loads((held / "metrics.json").read_text(encoding="utf-8"))["failures"]
    assert not failures.keys() & {"unparsable", "unknown_tool", "wrong_arity", "no_join"}
    assert all(
        row.prediction.startswith(("1. ", "Thought: ")) for row in PredictionFile(held).read()
    )
    assert PredictionFile(exported.path / "eval-gguf-tiny-f16").read() == before
    assert table_of(exported) == free
    made_with = json.loads((held / "made_with.json").read_text(encoding="utf-8"))
    assert made_with["grammar"] == "on"


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
    assert names - {".lock"} == {"eval-gguf-tiny-f32", "eval-gguf.json", "eval-gguf.md"}
    assert not (exported.path / "eval-gguf.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--engine gguf", "it has no GGUF file"),
        ("--model model.safetensors", "it is no .gguf file"),
        ("--engine gguf --model merged", "name a .gguf file"),
        ("--model absent.gguf", "there is no such file"),
        ("--test absent.json", "there is no such file"),
        ("--adapter absent", "there is no such folder"),
        ("--engine torch --model a.gguf", "--adapter names another"),
        ("--threads 0", "from 1 to"),
        ("--threads 100000", "from 1 to"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: str,
    said: str,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        libraries, "prepare_libraries", lambda _: pytest.fail("libraries are loaded before")
    )
    assert evaluate(run, *words.split()) == 2
    assert said in capsys.readouterr().err


class Observed:
    """Stands in for all engines, and sees what each was given."""

    compute_dtype = "float32"

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def torch(self, loaded: Any, *, lookup_tokens: int, threads: int | None) -> Observed:
        self.seen |= {"eval.lookup-tokens": lookup_tokens, "threads": threads}
        return self

    def load(self, config: Any, base: str, adapter: Path | None) -> Any:
        self.seen |= {"backend": config.model.backend, "adapter": adapter}
        return SimpleNamespace(notes=(), fused="")

    def server(self, settings: Any) -> Any:
        self.seen |= {"model": settings.model, "threads": settings.threads}
        self.slots = settings.slots

    def gguf(self, server: Any, tokenizer: Any) -> Observed:
        return self

    def vllm(self, folder: Path, tokenizer: Any, *, context_tokens: int) -> Observed:
        self.seen["model"] = folder
        return self

    def identity(self) -> Mapping[str, Any]:
        return {}

    def notes(self, prompts: Sequence[Prompt]) -> list[str]:
        self.seen |= {"eval.limit": len(prompts), "eval.parity-prompts": 0}
        return []

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        self.seen |= {"eval.max-new-tokens": limits.max_new_tokens, "eval.batch": limits.batch}
        if limits.batch == 1:  # one by one, to compare with
            self.seen["eval.parity-prompts"] = len(prompts)
        for index in range(len(prompts)):
            yield (
                index,
                Completion(text="1. join()", stop_reason="stop", new_tokens=3, prompt_tokens=9),
            )

    def close(self) -> None:
        self.seen["closed"] = True


@pytest.fixture
def observed(run: Run, monkeypatch: pytest.MonkeyPatch) -> Observed:
    """Return what stands in for every engine; the run has one file of each kind."""
    from tinyagent_fast.inference import llama_cpp, torch_engine, vllm
    from tinyagent_fast.models import loading

    seen = Observed()
    monkeypatch.setattr(torch_engine, "TorchEngine", seen.torch)
    monkeypatch.setattr(loading, "load_for_generation", seen.load)
    monkeypatch.setattr(llama_cpp, "LlamaServer", seen.server)
    monkeypatch.setattr(llama_cpp, "LlamaCppEngine", seen.gguf)
    monkeypatch.setattr(vllm, "VllmEngine", seen.vllm)
    for folder in (run.path / "export" / "merged", run.path / "other"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
    for file in (run.path / "export" / "gguf" / "a.gguf", run.path / "other.gguf"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"GGUF")
    return seen


FLAGS: Mapping[str, Any] = {
    "model": None,  # of a kind that the engine runs
    "adapter": "none",
    "backend": "auto",
    "threads": 1,
    "eval.batch": 5,
    "eval.max-new-tokens": 4,
    "eval.parity-prompts": 2,
    "eval.lookup-tokens": 3,
    "eval.limit": 1,
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_honours_a_flag_or_refuses_it_with_the_reason(
    engine: Any, flag: str, run: Run, observed: Observed, capsys: pytest.CaptureFixture[str]
) -> None:
    value = FLAGS[flag]
    if flag == "model":
        value = run.path / ("other.gguf" if engine == "gguf" else "other")
    words = ["eval", "--run", str(run.path), "--engine", engine, f"--{flag}", str(value)]
    if flag == "eval.limit" or engine == "vllm":
        words += ["--out", str(run.path / "elsewhere")]
    code = main(words)
    if (reason := ENGINES[engine].not_honoured.get(flag)) is not None:
        assert code == 2
        assert reason in capsys.readouterr().err
        assert observed.seen == {}
        return
    assert code == 0
    assert observed.seen[flag] == (None if value == "none" else value)
    assert observed.seen["closed"]


def test_transformers_is_torch_with_that_backend(
    run: Run, observed: Observed, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--run", str(run.path), "--engine", "transformers"]
    assert main([*words, "--backend", "unsloth"]) == 2
    assert "two backends" in capsys.readouterr().err and observed.seen == {}
    assert main(words) == 0
    assert observed.seen["backend"] == "transformers"


def test_every_engine_there_is_can_be_evaluated() -> None:
    assert tuple(ENGINES) == get_args(EngineName)


def test_every_refused_flag_is_one_that_there_is() -> None:
    assert {flag for one in ENGINES.values() for flag in one.not_honoured} <= set(FLAGS)


@pytest.mark.parametrize("spelling", ["--batch=5", "--eval.batch=5", "--eval.max_new_tokens=7"])
def test_flags_are_named_as_in_training_and_may_be_short(
    spelling: str, run: Run, observed: Observed
) -> None:
    name, _, value = spelling.removeprefix("--").partition("=")
    assert main(["eval", "--run", str(run.path), spelling]) == 0
    name = name if name.startswith("eval.") else f"eval.{name}"
    assert observed.seen[name.replace("_", "-")] == int(value)


def test_a_limit_of_the_run_can_be_lifted(run: Run, observed: Observed) -> None:
    from tinyagent_fast.config import dump_config

    config = run.config()
    limited = replace(config, eval=replace(config.eval, limit=1))
    run.config_path.write_text(dump_config(limited), encoding="utf-8")
    assert main(["eval", "--run", str(run.path)]) == 0
    assert observed.seen["eval.limit"] == 1
    assert main(["eval", "--run", str(run.path), "--limit", "all"]) == 0
    assert observed.seen["eval.limit"] > 1


@pytest.mark.parametrize(
    ("words", "folder", "name"),
    [
        ("", "eval", "adapter"),
        ("--engine torch", "eval", "adapter"),
        ("--adapter none", "eval-base", "base"),
        ("--engine vllm", "eval-vllm", "merged"),
    ],
)
def test_what_is_evaluated_decides_the_folder(
    words: str,
    folder: str,
    name: str,
    run: Run,
    observed: Observed,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["eval", "--run", str(run.path), *words.split()]) == 0
    metrics = json.loads((run.path / folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["success"]["total"] == 3
    assert f"{name}: plan success" in capsys.readouterr().out


def test_retrieved_prompts_are_other_predictions_than_those_as_they_are(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    made_with = PredictionFile(run.path / "eval-base").made_with_path
    assert evaluate(run, "--adapter", "none") == 0
    assert "retriever" not in json.loads(made_with.read_text(encoding="utf-8"))
    assert evaluate(run, "--adapter", "none", "--prompts", "retrieved") == 0
    said = capsys.readouterr().out
    assert "prompts rewritten: all tools retrieved for" in said
    assert "of 3 queries" in said
    report = (run.path / "eval-base" / "report.md").read_text(encoding="utf-8")
    assert "all tools retrieved for" in report and "of 3 queries" in report
    saved = load_retriever(run.path)
    assert saved is not None
    assert json.loads(made_with.read_text(encoding="utf-8"))["retriever"] == saved.facts()


def test_a_run_that_mixed_rows_is_measured_on_prompts_as_they_are_too(run: Run) -> None:
    from tinyagent_fast.config import dump_config

    config = run.config()
    data = replace(config.data, with_generated=True, own_passes=2, prompts="short")
    run.config_path.write_text(dump_config(replace(config, data=data)), encoding="utf-8")
    assert evaluate(run, "--adapter", "none", "--prompts", "as-is") == 0


def test_retrieved_prompts_need_a_retriever_or_the_training_file(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    test = run.config().data.test
    record = {"train_file": {"path": "gone.json"}, "test_file": {"path": str(test)}}
    (run.path / "data.json").write_text(json.dumps(record), encoding="utf-8")
    assert evaluate(run, "--adapter", "none", "--prompts", "retrieved") == 2
    assert "its training file is not here" in capsys.readouterr().err


def test_vllm_needs_a_merged_folder_and_says_how_to_make_one(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--run", str(run.path), "--engine", "vllm"]) == 2
    assert "--to merged" in capsys.readouterr().err


def test_only_torch_runs_in_several_processes(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for engine in ("gguf", "vllm"):
        assert main(["eval", "--run", str(run.path), "--engine", engine]) == 2
        assert "without torchrun" in capsys.readouterr().err


def test_a_run_is_evaluated_from_any_folder(
    run: Run,
    observed: Observed,
    tiny_merged: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tinyagent_fast.config import dump_config

    shutil.copytree(tiny_merged, tmp_path / "runs" / "bases" / "nano")
    shutil.copytree(tiny_data, tmp_path / "data")
    config = run.config()
    files = {"train": Path("data/training_data.json"), "test": Path("data/testing_data.json")}
    config = replace(config, data=replace(config.data, **files))
    run.config_path.write_text(dump_config(config), encoding="utf-8")
    record = {"base": "runs/bases/nano", "test_file": {"path": "data/testing_data.json"}}
    (run.path / "data.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["eval", "--run", str(run.path)]) == 0
    assert main(["eval", "--run", str(run.path), "--engine", "gguf"]) == 0
    assert not list(Path().iterdir()), "nothing is generated anew"


def test_test_labels_with_tools_outside_the_catalogue_are_refused_before_a_base_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("tinyagent_fast.models.loading.load_for_generation", load)
    test = run.config().data.test
    assert test is not None
    other = tmp_path / "other.json"
    text = test.read_text(encoding="utf-8")
    other.write_text(re.sub(r"(create|compose|get|open|send)_", r"home_\1_", text), "utf-8")
    assert main(["eval", "--test", str(other)]) == 2
    told = capsys.readouterr().err
    assert "test labels call home_" in told
    assert "--data.catalogue FILE" in told
    assert not run.evaluation.exists()


@pytest.mark.parametrize("command", ["eval", "agent-eval", "export", "report"])
def test_every_command_on_an_unfinished_run_says_so_and_names_the_run(
    run: Run, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.adapter.replace(run.best)
    run.append_history({"event": "step", "step": 3, "of": 8})
    main([command])  # the weights are none, so it may end with an error afterwards
    told = " ".join(capsys.readouterr().out.split())
    assert f"run {run.path.name}" in told
    assert "is unfinished: at step 3 of 8; the adapter is that of step unknown" in told
