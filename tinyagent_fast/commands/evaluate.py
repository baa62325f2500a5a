"""`eval`: plan success of a run's adapter, or of its GGUF files, on the test file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinyagent_fast.config import Backend, Config, check_config
from tinyagent_fast.distributed import init_processes, launch_environment
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.report import headline
from tinyagent_fast.export.record import sha256_of
from tinyagent_fast.runs import Run, find_run

if TYPE_CHECKING:
    from tinyagent_fast.training.display import TrainingDisplay


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    """Flags of `eval`; what is not given comes from the run's config."""

    run: str = "latest"
    """Run to evaluate: its name, its folder, or `latest`."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    engine: Literal["auto", "transformers", "gguf", "vllm"] = "auto"
    """`transformers` runs the adapter on its base, `gguf` the exported files in llama.cpp, `vllm`
    the merged folder on CUDA; `auto` takes what `--model` is, and the adapter without it."""
    model: Path | None = None
    """A .gguf file, or for vllm a merged folder; without it those that the run has exported."""
    adapter: str = "best"
    """`best` for the run's adapter, `none` for the bare base model, or a folder."""
    test: Path | None = None
    """Another test file in the published schema."""
    batch: int | None = None
    """Prompts generated together; llama.cpp takes 8 at most where this is not given."""
    max_new_tokens: int | None = None
    """Tokens after which a plan counts as truncated."""
    parity_prompts: int | None = None
    """Prompts generated at batch 1 and at batch N before the sweep; 0 skips the comparison."""
    lookup_tokens: int | None = None
    """Guesses from the prompt that a decoding step checks at once; plans stay the same."""
    limit: int | None = None
    """Evaluate only the first so many entries."""
    backend: Backend | None = None
    """Another backend than the run's."""
    threads: int | None = None
    """CPU threads of llama.cpp; None takes one per core."""
    out: Path | None = None
    """Folder for predictions and report; by default `eval/` in the run's folder. With
    `--engine gguf` each file gets a folder `eval-gguf-NAME/` in it, and in the run's by default."""
    fresh: bool = False
    """Generate everything anew, even where equal predictions are there."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate.

    Args:
        arguments: Flags of the command.

    Returns:
        0 when the evaluation has finished.
    """
    import tyro

    flags = tyro.cli(EvalFlags, args=list(arguments), prog="tinyagent-fast eval")
    with launch_environment().main_process_reports():
        _run(flags)
    init_processes().leave()
    return 0


def _run(flags: EvalFlags) -> None:
    found = find_run(flags.run, flags.runs)
    config = _config(found, flags)
    if flags.engine == "vllm":
        from tinyagent_fast.commands.evaluate_vllm import evaluate_with_vllm

        evaluate_with_vllm(found, config, flags, found.base_of(config), _display())
    elif _wants_gguf(flags):
        from tinyagent_fast.commands.evaluate_files import evaluate_files

        evaluate_files(found, config, flags, found.base_of(config), _display())
    else:
        _evaluate_adapter(found, config, flags)


def _evaluate_adapter(found: Run, config: Config, flags: EvalFlags) -> None:
    processes = init_processes()
    adapter = None if flags.adapter == "none" else found.find_adapter(flags.adapter)
    from tinyagent_fast.models.libraries import prepare_libraries

    prepare_libraries(config.model)
    from tinyagent_fast.evaluation.running import evaluate_examples
    from tinyagent_fast.inference.engines import TransformersEngine
    from tinyagent_fast.models.loading import load_for_generation
    from tinyagent_fast.training.inputs import load_test_examples
    from tinyagent_fast.training.session import scoring_tools

    display = _display()
    examples, test_sha256 = processes.main_process_first(lambda: load_test_examples(config))
    base = found.base_of(config)
    display.say(f"run {found.path.name}: {len(examples)} test queries, adapter {adapter or 'none'}")
    loaded = load_for_generation(config, base, adapter)
    for note in loaded.notes:
        display.say(f"note: {note}")
    folder = flags.out or found.evaluation.with_name("eval" if adapter else "eval-base")
    if flags.fresh and processes.is_main_process:
        PredictionFile(folder).forget()
    with display.bar("evaluation", "plans") as update:
        result = evaluate_examples(
            TransformersEngine(loaded, config.eval.lookup_tokens),
            examples,
            config.eval,
            folder,
            made_with={**_made_with(config, base, adapter), "test_sha256": test_sha256},
            tools=scoring_tools(config),
            title=f"Run {found.path.name}",
            on_progress=update,
            say=display.say,
            processes=processes,
        )
    if not processes.is_main_process:
        return
    display.say((folder / "report.md").read_text(encoding="utf-8").split("\n## The first")[0])
    display.say(headline(result.metrics))
    display.say(f"written: {folder}/metrics.json, predictions.jsonl, report.md")


def _display() -> TrainingDisplay:
    from tinyagent_fast.models.libraries import quieten

    quieten()  # before the first import that reaches bitsandbytes
    from rich.console import Console

    from tinyagent_fast.training.display import TrainingDisplay

    if launch_environment().is_main_process:
        return TrainingDisplay(Console(highlight=False))
    return TrainingDisplay(Console(file=StringIO(), quiet=True))


def _wants_gguf(flags: EvalFlags) -> bool:
    """Decide the engine; refuse flags that it would ignore."""
    if flags.model is not None and flags.model.suffix != ".gguf":
        raise ConfigError(
            f"--model {flags.model}", "only GGUF files are evaluated so", "name a .gguf file"
        )
    if flags.engine == "transformers" and flags.model is not None:
        raise ConfigError(
            f"--engine transformers --model {flags.model}",
            "transformers does not run GGUF files here",
            "leave --engine out, or name an adapter with --adapter",
        )
    gguf = flags.engine == "gguf" or flags.model is not None
    if gguf and launch_environment().count > 1:
        raise ConfigError(
            f"a GGUF file in {launch_environment().count} processes",
            "llama.cpp answers several queries at once in a single process",
            "start it without torchrun; --batch says how many at once",
        )
    ignored = {"adapter": flags.adapter != "best", "backend": flags.backend is not None}
    for name in (name for name, given in ignored.items() if gguf and given):
        raise ConfigError(
            f"--{name} with a GGUF file", "the adapter is merged into it", f"leave --{name} out"
        )
    if not gguf and flags.threads is not None:
        raise ConfigError("--threads", "it is for llama.cpp only", "add --engine gguf")
    return gguf


def _made_with(config: Config, base: str, adapter: Path | None) -> dict[str, Any]:
    """Name what predictions depend on, so that others are never mixed with them."""
    weights = adapter / "adapter_model.safetensors" if adapter else None
    return {
        "base": base,
        "adapter_sha256": sha256_of(weights) if weights else None,
        "prompt_format": config.model.prompt_format,
        "weights": config.model.weights,
    }


def _config(found: Run, flags: EvalFlags) -> Config:
    config = found.config()
    changes = {
        name: value
        for name in ("batch", "max_new_tokens", "parity_prompts", "lookup_tokens", "limit")
        if (value := getattr(flags, name)) is not None
    }
    config = replace(config, eval=replace(config.eval, **changes))
    if flags.test is not None:
        config = replace(config, data=replace(config.data, test=flags.test))
    if flags.backend is not None:
        config = replace(config, model=replace(config.model, backend=flags.backend))
    check_config(config)
    return config
