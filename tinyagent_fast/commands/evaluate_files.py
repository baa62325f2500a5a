"""The part of `eval` for GGUF files: each is served by llama.cpp, and a table compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import Config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.evaluation.comparison import (
    ComparedRow,
    compare_predictions,
    comparison_table,
)
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.report import headline
from tinyagent_fast.evaluation.scoring import Prediction, score_predictions
from tinyagent_fast.export.record import ExportRecord, sha256_of
from tinyagent_fast.runs import Run, write_json, write_text

if TYPE_CHECKING:
    from tinyagent_fast.commands.evaluate import EvalFlags
    from tinyagent_fast.data.schema import Example
    from tinyagent_fast.plans.tools import Tool
    from tinyagent_fast.prompts.tokens import PromptTokenizer
    from tinyagent_fast.training.display import TrainingDisplay

_SLOTS = 8
_SPARE_TOKENS = 64
"""For prompts that the file encodes with more tokens than the run's tokenizer does."""
_ADAPTER = "adapter"


@dataclass(frozen=True)
class _GgufFile:
    """A file to evaluate; the name of its quantisation as the export recorded it, if it did."""

    path: Path
    quant: str | None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What every file of a run is given to do."""

    run: Run
    config: Config
    flags: EvalFlags
    folder: Path
    examples: Sequence[Example]
    test_sha256: str
    tools: Mapping[str, Tool] | None
    tokenizer: PromptTokenizer
    display: TrainingDisplay


def evaluate_files(
    found: Run, config: Config, flags: EvalFlags, base: str, display: TrainingDisplay
) -> None:
    """Evaluate GGUF files one after the other, and write the table that compares them.

    Args:
        found: The run.
        config: Its config, with what the flags change.
        flags: Name a file, or none for all that the run has exported.
        base: The run's base model, which has its tokenizer.
        display: Where progress is shown.

    Raises:
        ConfigError: There is no file.
        ModelError: A file cannot be run.
    """
    files = _gguf_files(found, flags, display)
    task = _task(found, config, flags, base, display)
    names = ", ".join(file.path.name for file in files)
    display.say(f"run {found.path.name}: {len(task.examples)} test queries, {names}")
    measured: dict[str, Sequence[Prediction]] = {}
    adapter = _adapter_predictions(task)
    if adapter is not None:
        measured[_ADAPTER] = adapter
    for file in files:
        measured[file.path.name] = _evaluate_file(file.path, task)
    f16 = next((file.path.name for file in files if _is_f16(file)), None)
    reference = _ADAPTER if adapter is not None else f16
    sizes = {file.path.name: file.path.stat().st_size for file in files}
    rows = _rows(measured, sizes, reference, task.tools)
    table = comparison_table(rows, reference)
    write_text(task.folder / "eval-gguf.md", f"# GGUF files of {found.path.name}\n\n{table}")
    facts = {"test_sha256": task.test_sha256, "queries": len(task.examples), "reference": reference}
    write_json(task.folder / "eval-gguf.json", {**facts, "rows": [row.to_json() for row in rows]})
    display.say(table)
    display.say(f"written: {task.folder}/eval-gguf.md, eval-gguf.json")


def _task(
    found: Run, config: Config, flags: EvalFlags, base: str, display: TrainingDisplay
) -> _Task:
    from tinyagent_fast.models.libraries import prepare_libraries

    prepare_libraries(replace(config.model, backend="transformers"))
    from tinyagent_fast.prompts.tokenizers import load_tokenizer, resolve_tokenizer_folder
    from tinyagent_fast.prompts.tokens import PromptTokenizer
    from tinyagent_fast.training.inputs import load_test_examples
    from tinyagent_fast.training.session import scoring_tools

    examples, test_sha256 = load_test_examples(config)
    tokenizer_folder = resolve_tokenizer_folder(base, config.model.revision)
    return _Task(
        run=found,
        config=config,
        flags=flags,
        folder=flags.out or found.path,
        examples=examples,
        test_sha256=test_sha256,
        tools=scoring_tools(config),
        tokenizer=PromptTokenizer(load_tokenizer(tokenizer_folder), config.model.prompt_format),
        display=display,
    )


def _evaluate_file(path: Path, task: _Task) -> Sequence[Prediction]:
    from tinyagent_fast.evaluation.running import evaluate_examples
    from tinyagent_fast.inference.engines import LlamaCppEngine, encode_prompts
    from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, llama_server

    folder, display = task.folder / f"eval-gguf-{path.stem}", task.display
    if task.flags.fresh:
        PredictionFile(folder).forget()
    longest_tokens = max(map(len, encode_prompts(task.tokenizer, task.examples)), default=0)
    settings = LlamaCppSettings(
        model=path,
        slots=task.flags.batch or min(_SLOTS, task.config.eval.batch),
        context_tokens_per_slot=longest_tokens + task.config.eval.max_new_tokens + _SPARE_TOKENS,
        threads=task.flags.threads,
    )
    with llama_server(settings) as server, display.bar(path.name, "plans") as update:
        result = evaluate_examples(
            LlamaCppEngine(server, task.tokenizer),
            task.examples,
            replace(task.config.eval, batch=settings.slots),
            folder,
            made_with={"test_sha256": task.test_sha256},
            tools=task.tools,
            title=path.name,
            on_progress=update,
            say=display.say,
        )
    display.say(f"{path.name}: {headline(result.metrics)}")
    return result.predictions


def _gguf_files(found: Run, flags: EvalFlags, display: TrainingDisplay) -> list[_GgufFile]:
    """List what to evaluate: the file that is named, or all that the run has exported."""
    if flags.model is not None:
        return [_GgufFile(flags.model, None)]
    record = ExportRecord(found.path / "export")
    listed = [artefact for artefact in record.artefacts if artefact.kind == "gguf"]
    if not listed:
        there = sorted((record.folder / "gguf").glob("*.gguf"))
        if not there:
            raise ConfigError(
                f"run {found.path.name}",
                f"it has no GGUF file in {record.folder}",
                f"make export RUN={found.path.name}, or name a file with --model",
            )
        return [_GgufFile(path, None) for path in there]
    if record.content["passed"] is False:
        display.say(f"note: the export did not pass its own gates; see {record.path}")
    for artefact in listed:
        path = record.folder / artefact.path
        if not path.exists() or sha256_of(path) != artefact.sha256:
            display.say(f"note: {path.name} is not the file that {record.path} tells of")
    return [_GgufFile(record.folder / a.path, a.quant) for a in listed]


def _is_f16(file: _GgufFile) -> bool:
    return file.quant == "f16" or (file.quant is None and file.path.stem.endswith("f16"))


def _adapter_predictions(task: _Task) -> list[Prediction] | None:
    """Take the adapter's predictions as the reference if they are there for the same task."""
    file, display = PredictionFile(task.run.evaluation), task.display
    remedy = f"`make eval RUN={task.run.path.name}` adds the adapter to the table"
    if not file.path.exists() or not file.made_with_path.exists():
        display.say(f"note: {remedy}")
        return None
    made_with = json.loads(file.made_with_path.read_text(encoding="utf-8"))
    weights = task.run.adapter / "adapter_model.safetensors"
    wanted = {
        "test_sha256": task.test_sha256,
        "max_new_tokens": task.config.eval.max_new_tokens,
        "adapter_sha256": sha256_of(weights) if weights.exists() else None,
    }
    by_key = {row.key: row for row in file.read()}
    other = [name for name, value in wanted.items() if made_with.get(name) != value]
    if missing := [e.key for e in task.examples if e.key not in by_key]:
        other.append(f"{len(missing)} queries missing")
    if other:
        display.say(f"note: {file.path} is for something else ({', '.join(other)}); {remedy}")
        return None
    return [by_key[example.key] for example in task.examples]


def _rows(
    measured: Mapping[str, Sequence[Prediction]],
    sizes: Mapping[str, int],
    reference: str | None,
    tools: Mapping[str, Tool] | None,
) -> list[ComparedRow]:
    return [
        ComparedRow(
            name=name,
            size_bytes=sizes.get(name),
            success=score_predictions(predictions, tools).success,
            seconds=sum(p.seconds or 0.0 for p in predictions),
            comparison=None
            if reference is None or name == reference
            else compare_predictions(measured[reference], predictions, tools),
        )
        for name, predictions in measured.items()
    ]
