"""Run to proved files: all is made once, resumed after a stop, and no mistake gets through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Config
from tinyagent_fast.display import Display
from tinyagent_fast.errors import ConfigError, GateError
from tinyagent_fast.export import pipeline, proof
from tinyagent_fast.export.checkpoints import open_checkpoint
from tinyagent_fast.export.pipeline import run_export
from tinyagent_fast.export.preparation import Export, prepare_export
from tinyagent_fast.export.record import ExportRecord
from tinyagent_fast.export.settings import ExportSettings, QuantSpec
from tinyagent_fast.runs import Run

FILES = "f16,q8_0,q4_k_m,q4_k_m-imatrix"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    config_in: Callable[..., Config],
    tiny_merged: Path,
) -> Iterator[Run]:
    """Return a run whose adapter changes what the base says."""
    import io

    from rich.console import Console

    from tinyagent_fast.training import fit

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TINYAGENT_FAST_CACHE", str(folder / "cache"))
        patch.setattr(fit, "plot_training", lambda _: None)
        config = config_in(
            folder,
            model={"base": str(tiny_merged), "max_length_tokens": 1500},
            # After fewer steps plans hold tokens that their own text is not cut into.
            train={"learning_rate": 2e-2, "max_steps": 60},
        )
        yield fit.train(config, Console(file=io.StringIO()))


def prepared(run: Run, quiet: Any, **flags: Any) -> Export:
    config = run.config()
    settings = ExportSettings(
        **{"gate_prompts": 2, "quant_prompts": 3, "importance_rows": 4, "threads": 1, **flags}
    )
    return prepare_export(
        run,
        replace(config, eval=replace(config.eval, max_new_tokens=24)),
        settings,
        run.adapter,
        Display(quiet),
    )


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a finished export of all kinds of files."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, highlight=False)
    export = prepared(run, console, quant=FILES, out=tmp_path_factory.mktemp("export"))
    run_export(export)
    return export


def test_an_export_makes_and_proves_every_file(exported: Export) -> None:
    content = json.loads((exported.folder / "export.json").read_text(encoding="utf-8"))
    assert content["passed"] is True
    assert {a["quant"] for a in content["artefacts"] if a["kind"] == "gguf"} == set(
        FILES.split(",")
    )
    assert all(len(a["sha256"]) == 64 and a["size_bytes"] > 0 for a in content["artefacts"])
    names = [gate["name"] for gate in content["gates"]]
    assert len(names) == 11
    assert len(set(names)) == 11
    there = {path.name for path in exported.folder.iterdir()}
    assert {"merged", "gguf", "Modelfile", "README.md", "plan.gbnf", "report.md"} <= there
    assert {"retriever.json", "retriever.npz"} <= there
    assert not [name for name in there if name.startswith(".work") or name.endswith(".part")]
    report = (exported.folder / "report.md").read_text(encoding="utf-8")
    assert "All gates passed." in report
    assert "q4_k_m-imatrix" in report


def test_the_adapter_matters_so_the_gates_compare_something(exported: Export) -> None:
    content = exported.record.content
    adapter = next(gate for gate in content["gates"] if "adapter on its base" in gate["name"])
    rows = exported.tokenizer.training_rows(exported.validation[:2])
    with proof.reference_model(exported.config, str(exported.base), None) as bare:
        loss = proof.mean_loss(bare, rows)
    assert abs(loss - adapter["figures"]["loss"][0]) > 0.05 * loss


def test_a_second_export_keeps_what_is_whole(run: Run, exported: Export, quiet: Any) -> None:
    times = {path: path.stat().st_mtime_ns for path in exported.folder.glob("gguf/*")}
    run_export(prepared(run, quiet, quant=FILES, out=exported.folder, gates="off"))
    assert times == {path: path.stat().st_mtime_ns for path in exported.folder.glob("gguf/*")}
    assert quiet.file.getvalue().count("was there, whole: kept") == 6


def test_a_broken_off_export_goes_on_from_the_last_whole_file(
    run: Run, quiet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipeline.convert_to_gguf
    flags = {"quant": "f16,q8_0,q4_k_m", "out": tmp_path / "out", "gates": "off"}

    def full_disk(source: Path, target: Path, *, quant: str, **rest: Any) -> Any:
        if quant == "q4_k_m":
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return right(source, target, quant=quant, **rest)

    monkeypatch.setattr(pipeline, "convert_to_gguf", full_disk)
    with pytest.raises(OSError, match="No space"):
        run_export(prepared(run, quiet, **flags))
    assert {p.name for p in (tmp_path / "out" / "gguf").glob("*.gguf")} == {
        "tiny-f16.gguf",
        "tiny-q8_0.gguf",
    }
    monkeypatch.setattr(pipeline, "convert_to_gguf", right)
    run_export(prepared(run, quiet, **flags))
    assert quiet.file.getvalue().count("was there, whole: kept") == 3
    assert {p.name for p in (tmp_path / "out" / "gguf").iterdir()} == {
        "tiny-f16.gguf",
        "tiny-q8_0.gguf",
        "tiny-q4_k_m.gguf",
    }


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content), encoding="utf-8")


def swap_rows(folder: Path) -> None:
    """Exchange two halves of a head's rows in one layer's queries, as a wrong permutation does."""
    tensor = open_checkpoint(folder).tensors["model.layers.1.self_attn.q_proj.weight"]
    with tensor.path.open("r+b") as stream:
        stream.seek(tensor.offset_bytes)
        half = 32 * tensor.shape[1] * 4
        first, second = stream.read(half), stream.read(half)
        stream.seek(tensor.offset_bytes)
        stream.write(second + first)


def corrupt_weight(folder: Path) -> None:
    """Turn one weight's sign bit and exponent, as a damaged disk does."""
    tensor = open_checkpoint(folder).tensors["model.layers.0.mlp.down_proj.weight"]
    with tensor.path.open("r+b") as stream:
        stream.seek(tensor.offset_bytes + 403)
        stream.write(b"\xc1")


def shift_rope(folder: Path) -> None:
    set_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def loosen_epsilon(folder: Path) -> None:
    set_config(folder, rms_norm_eps=1e-4)


MISTAKES = {f.__name__: f for f in (swap_rows, corrupt_weight, shift_rope, loosen_epsilon)}


@pytest.fixture(scope="module")
def witness(exported: Export) -> Any:
    return proof.merged_gates(exported)[1]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_of_the_conversion_fails_the_gate(
    exported: Export, witness: Any, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = pipeline.convert_to_gguf

    def convert_wrongly(source: Path, *rest: Any, **named: Any) -> Any:
        shutil.copytree(source, tmp_path / "wrong")
        MISTAKES[mistake](tmp_path / "wrong")
        return right(tmp_path / "wrong", *rest, **named)

    monkeypatch.setattr(pipeline, "convert_to_gguf", convert_wrongly)
    pipeline.convert(exported, tmp_path / "f32.gguf", QuantSpec("f32"))
    gate = proof.f32_gate(exported, tmp_path / "f32.gguf", witness)
    assert not gate.passed
    assert gate.figures["max_abs"] > 1e-3


@pytest.mark.parametrize("mistake", ["other template", "other tokenizer"])
def test_a_file_with_another_template_or_tokenizer_fails_its_gate(
    exported: Export, witness: Any, mistake: str, tmp_path: Path
) -> None:
    from tinyagent_fast.export.conversion import convert_to_gguf

    source = tmp_path / "merged"
    shutil.copytree(exported.merged, source)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    if mistake == "other tokenizer":
        path = source / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        del content["model"]["merges"][10:]
        path.write_text(json.dumps(content), encoding="utf-8")
        template = (source / "chat_template.jinja").read_text(encoding="utf-8")
    model = convert_to_gguf(
        source,
        tmp_path / "x.gguf",
        quant="f16",
        name="x",
        texts={"tokenizer.chat_template": template.replace("{{- bos_token -}}\n", "")},
    ).path
    failed = [g.name for g in proof.file_gates(exported, model, witness) if not g.passed]
    expected = {
        "other template": ["prompt template in the file"],
        "other tokenizer": ["ids of hard strings", "ids of prompts"],
    }
    assert failed == expected[mistake]


def test_plans_that_part_from_the_merged_models_without_a_tie_fail_the_gate(
    exported: Export, witness: Any, tmp_path: Path
) -> None:
    f16 = exported.folder / "gguf" / "tiny-f16.gguf"
    alone = replace(exported, record=ExportRecord(tmp_path), specs=[])
    wrong = replace(witness, plans=['1. get_email_address("Zoe")\n2. join()'] * 2)
    (gate,) = proof.quant_gates(alone, f16, wrong)
    assert not gate.passed
    assert min(gate.figures["gaps"]) > 2 * gate.figures["noise"] > 0


def test_a_failed_gate_is_exit_code_one_and_stays_on_record(
    run: Run, quiet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.export import gates

    monkeypatch.setattr(gates, "MAX_LOGIT_DIFFERENCE", -1.0)
    export = prepared(run, quiet, quant="f16", out=tmp_path)
    with pytest.raises(GateError, match="1 of 8 gates: FAIL  f32 GGUF") as caught:
        run_export(export)
    assert caught.value.exit_code == 1
    content = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert content["passed"] is False
    assert "1 gates failed: f32 GGUF" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_merged_alone_needs_no_llama_cpp(run: Run, quiet: Any, tmp_path: Path) -> None:
    export = prepared(run, quiet, to="merged", out=tmp_path, merged_dtype="bf16")
    run_export(export)
    assert export.record.content["passed"] is True
    assert not (tmp_path / "gguf").exists()
    assert not (tmp_path / "Modelfile").exists()


def test_a_damaged_record_of_the_run_is_named_before_anything_is_made(
    run: Run, quiet: Any, tmp_path: Path
) -> None:
    copy = Run(shutil.copytree(run.path, tmp_path / "runs" / run.path.name))
    damaged = copy.path / "test" / "after" / "metrics.json"
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_text('{"success": {"share": 0.', encoding="utf-8")
    out = tmp_path / "out"
    with pytest.raises(ConfigError) as caught:
        run_export(prepared(copy, quiet, to="merged", out=out, gates="off"))
    assert caught.value.exit_code == 2 and str(damaged) in str(caught.value)
    assert not (out / "merged").exists()


def test_no_file_is_converted_that_neither_a_flag_nor_a_gate_asks_for(
    run: Run, quiet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, made = pipeline.convert_to_gguf, []

    def counted(*rest: Any, quant: str, **named: Any) -> Any:
        made.append(quant)
        return right(*rest, quant=quant, **named)

    monkeypatch.setattr(pipeline, "convert_to_gguf", counted)
    run_export(prepared(run, quiet, quant="q8_0", out=tmp_path, gates="off"))
    assert made == ["q8_0"]


def test_a_file_of_an_earlier_export_is_neither_listed_nor_recommended(
    run: Run, tmp_path: Path
) -> None:
    from rich.console import Console

    for quant in ("f16,q8_0", "f16"):
        run_export(prepared(run, Console(quiet=True), quant=quant, out=tmp_path, gates="off"))
    content = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert [a["quant"] for a in content["artefacts"] if a["kind"] == "gguf"] == ["f16"]
    assert "q8_0" not in (tmp_path / "llama-server.sh").read_text(encoding="utf-8")
    assert str(Path.cwd()) not in json.dumps(content["environment"])
