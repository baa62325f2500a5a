"""One export from run to proved files: merge, convert, quantise, companions, gates, report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyagent_fast.display import size_text
from tinyagent_fast.errors import GateError
from tinyagent_fast.export.chat_template import chat_template
from tinyagent_fast.export.companions import (
    CARD,
    MERGED,
    export_report,
    model_card,
    write_companions,
)
from tinyagent_fast.export.conversion import ConversionReport, convert_to_gguf
from tinyagent_fast.export.gates import Gate
from tinyagent_fast.export.importance import (
    collect_importance,
    load_importance,
    save_importance,
)
from tinyagent_fast.export.merging import merge_adapter, write_tokenizer
from tinyagent_fast.export.preparation import Export
from tinyagent_fast.export.proof import prove, reference_model
from tinyagent_fast.export.record import Artefact, Kind, Work
from tinyagent_fast.export.settings import QuantSpec
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.templates import render_prompt
from tinyagent_fast.runs import (
    ADAPTER_WEIGHTS,
    environment,
    key_of,
    sha256_of,
    unfinished_folder,
    write_text,
)
from tinyagent_fast.training.inputs import retriever_of_run
from tinyagent_fast.version import __version__

IMPORTANCE = "importance.gguf"


def run_export(export: Export) -> Path:
    """Make all files, then prove them; give the export's folder.

    Raises:
        GateError: A gate failed; the files stay, and export.json says which.
    """
    started = time.perf_counter()
    record, settings = export.record, export.settings
    identity = _identity(export)
    # What is published names no folder of this machine.
    private = ("command", "folder")
    machine = {name: value for name, value in environment().items() if name not in private}
    nothing_proved: dict[str, Any] = {"passed": None, "gates": [], "success_on_validation": {}}
    record.update(tinyagent_fast=__version__, **identity, environment=machine, **nothing_proved)
    if settings.fresh:
        record.update(artefacts=[])
    _card(export)  # what is damaged in the run is found before the work
    merged = _make_merged(export, identity)
    gates: list[Gate] = []
    with unfinished_folder(export.folder, "work") as work:
        f32, f16 = _make_files(export, merged, work) if export.specs else (None, None)
        for gate in prove(export, f32, f16) if settings.gates == "on" else ():
            export.display.say(gate.sentence())
            gates.append(gate)
    _finish(export, gates, time.perf_counter() - started)
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        names = "; ".join(gate.sentence() for gate in failed)
        raise GateError(f"{len(failed)} of {len(gates)} gates: {names}. See {record.path}")
    return export.folder


def _identity(export: Export) -> dict[str, Any]:
    """Name all that the artefacts depend on, beside each one's own settings."""
    vocabulary = export.tokenizer.hf.backend_tokenizer.to_str()
    weights = [sha256_of(path) for path in sorted(export.base.glob("*.safetensors"))]
    return {
        "run": export.run.path.name,
        "base": str(export.config.model.base),
        "base_sha256": key_of(weights),
        "adapter_sha256": sha256_of(export.adapter / ADAPTER_WEIGHTS),
        "tokenizer": key_of([vocabulary, export.tokenizer.bos_id, export.tokenizer.eos_id]),
        "prompt_format": export.config.model.prompt_format,
        "stop": END_OF_PLAN,
        "trained_on_weights": export.config.model.weights,
        "qat": export.config.train.qat,
    }


def _card(export: Export) -> str:
    return model_card(export.run, export.run.recorded_config(), export.record.content)


def _make(export: Export, path: str, kind: Kind, depends: Sequence[object], work: Work) -> Artefact:
    """Make an artefact or keep it, and say which."""
    artefact, was_there = export.record.make(path, kind, key_of(depends), work)
    how = "was there, whole: kept" if was_there else f"{artefact.seconds:.1f} s"
    export.display.say(f"{artefact.path}: {size_text(artefact.size_bytes)}, {how}")
    return artefact


def _make_merged(export: Export, identity: Mapping[str, Any]) -> Artefact:
    dtype = export.settings.merged_dtype

    def work(path: Path) -> tuple[str, Mapping[str, Any]]:
        with export.display.bar("merging, then reading it back", "bytes") as update:
            report = merge_adapter(
                export.base, export.adapter, path, dtype=dtype, on_progress=update
            )
        write_tokenizer(export.base, export.tokenizer, path)
        return report.dtype, asdict(report)

    return _make(export, MERGED, "merged", [identity, dtype], work)


def _make_files(export: Export, merged: Artefact, work: Path) -> tuple[Path, Path]:
    """Make the GGUF files; give an f32 and an f16 one for the gates, where need be temporary."""
    importance = None
    if any(spec.importance for spec in export.specs):
        importance = _make_importance(export, merged)
    f32, f16 = work / "f32.gguf", work / "f16.gguf"
    for spec in export.specs:
        artefact = _make_gguf(export, spec, merged, importance if spec.importance else None)
        if spec.quant == "f16":
            f16 = export.folder / artefact.path
    if export.settings.gates == "on":
        convert(export, f32, QuantSpec("f32"))
        if not f16.exists():
            convert(export, f16, QuantSpec("f16"))
    return f32, f16


def _make_importance(export: Export, merged: Artefact) -> Artefact:
    """Measure what the training prompts activate, or keep what was measured before."""

    def work(path: Path) -> tuple[str, Mapping[str, Any]]:
        rows = [row.input_ids for row in export.tokenizer.training_rows(export.training)]
        with (
            export.display.bar("importance matrix", "rows") as update,
            reference_model(export.config, str(export.merged), None) as loaded,
        ):
            found = collect_importance(loaded.model, rows, on_progress=update)
        save_importance(found, path)
        return "f32", {"rows": len(rows), "tokens": found.tokens}

    depends = [merged.sha256, [[e.system, e.user, e.output] for e in export.training]]
    return _make(export, IMPORTANCE, "importance", depends, work)


def _make_gguf(
    export: Export, spec: QuantSpec, merged: Artefact, importance: Artefact | None
) -> Artefact:
    def work(path: Path) -> tuple[str, Mapping[str, Any]]:
        report = convert(export, path, spec)
        for note in (*report.notes, *report.fallbacks):
            export.display.say(f"note: {spec.name}: {note}")
        return spec.name, report.to_json()

    depends = [merged.sha256, spec.name, importance.sha256 if importance else None]
    return _make(export, export.gguf_path(spec), "gguf", depends, work)


def convert(export: Export, path: Path, spec: QuantSpec) -> ConversionReport:
    """Convert the merged folder to one GGUF file, with its importance matrix if it needs it."""
    tokenizer = export.tokenizer
    own = tokenizer.chat.source if tokenizer.chat else None
    template = chat_template(tokenizer.prompt_format, own, bos=False)
    with export.display.bar(f"converting to {spec.name}", "bytes") as update:
        return convert_to_gguf(
            export.merged,
            path,
            quant=spec.quant,
            name=export.stem,
            texts={
                "tokenizer.chat_template": template,
                "tinyagent_fast.version": __version__,
                "tinyagent_fast.prompt_format": tokenizer.prompt_format,
                "tinyagent_fast.stop": END_OF_PLAN,
            },
            importance=load_importance(export.folder / IMPORTANCE) if spec.importance else None,
            threads=export.settings.threads,
            on_progress=update,
        )


def _finish(export: Export, gates: Sequence[Gate], seconds: float) -> None:
    """Write companions and report, and close the record."""
    record, tokenizer = export.record, export.tokenizer
    example = (export.validation or export.training)[0]
    # A file of an earlier export was not proved with these: it is made again when asked for.
    made = {MERGED, IMPORTANCE, *(export.gguf_path(spec) for spec in export.specs)}
    kept = [artefact for artefact in record.content["artefacts"] if artefact["path"] in made]
    record.update(artefacts=kept)
    files = [artefact for artefact in record.artefacts if artefact.kind == "gguf"]
    if files:
        written = write_companions(
            export.folder,
            name=export.stem,
            files=files,
            gates=gates,
            prompt_format=tokenizer.prompt_format,
            tools=export.tools,
            example_prompt=render_prompt(
                example.system, example.user, tokenizer.prompt_format, tokenizer.chat
            ),
        )
        for path in written:
            export.display.say(f"{path.name}: written")
    if (retriever := retriever_of_run(export.run)) is not None:
        for path in retriever.save(export.folder):
            size = size_text(path.stat().st_size)
            export.display.say(f"{path.relative_to(export.folder)}: written, {size}")
    record.update(
        gates=[vars(gate) for gate in gates],
        passed=all(gate.passed for gate in gates) if gates else None,
        seconds=round(seconds, 2),
    )
    write_text(export.folder / "report.md", export_report(record.content))
    write_text(export.folder / CARD, _card(export))
    export.display.say(f"{CARD}: written")
