"""The part of `eval` for vLLM: the merged folder of a run's export, on a CUDA machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import Config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.report import headline
from tinyagent_fast.export.record import ExportRecord, sha256_of
from tinyagent_fast.runs import Run

if TYPE_CHECKING:
    from tinyagent_fast.commands.evaluate import EvalFlags
    from tinyagent_fast.training.display import TrainingDisplay


def evaluate_with_vllm(
    found: Run, config: Config, flags: EvalFlags, base: str, display: TrainingDisplay
) -> None:
    """Evaluate a merged folder.

    Args:
        found: The run.
        config: Its config, with what the flags change.
        flags: Name a folder, or none for the one that the run has exported.
        base: The run's base model, which has its tokenizer.
        display: Where progress is shown.

    Raises:
        ConfigError: There is no merged folder.
        ModelError: vLLM is not installed or cannot load it.
    """
    folder = _merged_folder(found, flags)
    from tinyagent_fast.evaluation.running import evaluate_examples
    from tinyagent_fast.inference.vllm_engine import VllmEngine
    from tinyagent_fast.prompts.tokenizers import load_tokenizer, resolve_tokenizer_folder
    from tinyagent_fast.prompts.tokens import PromptTokenizer
    from tinyagent_fast.training.inputs import load_test_examples
    from tinyagent_fast.training.session import scoring_tools

    examples, test_sha256 = load_test_examples(config)
    files = resolve_tokenizer_folder(base, config.model.revision)
    tokenizer = PromptTokenizer(load_tokenizer(files), config.model.prompt_format)
    room = config.model.max_length_tokens + config.eval.max_new_tokens
    engine = VllmEngine(folder, tokenizer, context_tokens=room)
    display.say(f"run {found.path.name}: {len(examples)} test queries, {folder} in vLLM")
    target = flags.out or found.evaluation.with_name("eval-vllm")
    if flags.fresh:
        PredictionFile(target).forget()
    with display.bar("evaluation", "plans") as update:
        result = evaluate_examples(
            engine,
            examples,
            config.eval,
            target,
            made_with={
                **engine.identity(),
                "merged_sha256": sha256_of(folder),
                "test_sha256": test_sha256,
            },
            tools=scoring_tools(config),
            title=f"Run {found.path.name}, vLLM",
            on_progress=update,
            say=display.say,
        )
    display.say(headline(result.metrics))
    display.say(f"written: {target}/metrics.json, predictions.jsonl, report.md")


def _merged_folder(found: Run, flags: EvalFlags) -> Path:
    """Take the folder that was named, or that of the run's export."""
    export = found.path / "export"
    recorded = [a.path for a in ExportRecord(export).artefacts if a.kind == "merged"]
    folder = flags.model or export / (recorded[0] if recorded else "merged")
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"merged folder {folder}",
            "it holds no config.json, and vLLM runs merged folders",
            f"tinyagent-fast export --run {found.path.name} --to merged, or name one with --model",
        )
    return folder
