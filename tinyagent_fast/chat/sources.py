"""Find the model that a user means: a run's adapter, an adapter, a merged folder or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tinyagent_fast.chat.prompts import find_beside
from tinyagent_fast.config import Config, ModelConfig, PromptFormat, Weights
from tinyagent_fast.errors import ConfigError, ModelError
from tinyagent_fast.runs import Run, find_run

_WEIGHTS: Mapping[str, Weights] = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class PlannerChoice:
    """Flags that say which model plans, and with which system text."""

    run: str | None = None
    """Run to try: its name, its folder, or `latest`, which is meant where neither this nor
    `--model` is given. For a `--model` outside any run it gives system text and tools."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    model: Path | None = None
    """A .gguf file, a merged folder or an adapter instead of the run's own adapter."""
    system: str = "auto"
    """`nearest` takes for each request the system text of the run's most similar test query,
    `first` that of the first one for all requests, `auto` the nearest where the test file is
    there, and none elsewhere; anything else is a text file."""
    max_new_tokens: int | None = None
    """Tokens after which a plan is broken off; None takes the run's, or 300."""
    threads: int | None = None
    """CPU threads; None leaves it to torch or llama.cpp."""


@dataclass(frozen=True)
class PlannerSource:
    """What a choice comes to."""

    kind: Literal["adapter", "folder", "gguf"]
    path: Path
    run: Run | None


@dataclass(frozen=True)
class LoadingPlan:
    """How a model in torch is loaded."""

    config: Config
    base: str
    adapter: Path | None


def find_source(choice: PlannerChoice) -> PlannerSource:
    """Find what a choice means.

    Args:
        choice: The flags.

    Returns:
        The model and the run that it belongs to.

    Raises:
        ConfigError: There is no such run or model, or the flags contradict each other.
    """
    for name, value in (("max-new-tokens", choice.max_new_tokens), ("threads", choice.threads)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}", "it must be at least 1", "give another number")
    path = choice.model
    named = None if choice.run is None else find_run(choice.run, choice.runs)
    if path is None:
        run = named or find_run("latest", choice.runs)
        return PlannerSource("adapter", _adapter_of(run), run)
    own = Run(path.resolve()) if (path / "config.yaml").exists() else _run_around(path)
    if named and own and named.path != own.path:
        raise ConfigError(
            f"--model {path} --run {choice.run}",
            f"the model lies in run {own.path.name}, and comes with that one's prompts",
            "leave --run out, or name another text with --system FILE",
        )
    run_or_none = own or named
    if path.suffix == ".gguf":
        return PlannerSource("gguf", path, run_or_none)
    if own and own.path == path.resolve():
        return PlannerSource("adapter", _adapter_of(own), own)
    if (path / "adapter_config.json").exists():
        if run_or_none is None:
            raise ConfigError(
                f"--model {path}",
                "it is an adapter outside a run's folder, so its base and prompts are not known",
                "name its run with --run",
            )
        return PlannerSource("adapter", path, run_or_none)
    if (path / "config.json").exists():
        return PlannerSource("folder", path, run_or_none)
    raise ConfigError(
        f"--model {path}",
        "it is no .gguf file, and no folder with config.yaml (a run), adapter_config.json (an "
        "adapter) or config.json (a merged model)",
        "name one of these, or a run with --run",
    )


def _run_around(path: Path) -> Run | None:
    """Find the run whose folder a file or folder lies in."""
    parents = path.resolve().parents[:4]
    return next((Run(folder) for folder in parents if (folder / "config.yaml").exists()), None)


def _adapter_of(run: Run) -> Path:
    # A run that was broken off has its best adapter only.
    for folder in (run.adapter, run.best):
        if (folder / "adapter_model.safetensors").exists():
            return folder
    raise ConfigError(
        f"run {run.path.name}",
        "it has no adapter yet",
        f"finish it (make train ARGS='--resume {run.path.name}'), or name a --model",
    )


def loading_plan(source: PlannerSource, config: Config) -> LoadingPlan:
    """Say how a model in torch is loaded.

    Args:
        source: An adapter or a merged folder.
        config: Its run's config, or a plain one.

    Returns:
        What `models.loading.load_for_generation` needs. The backend is plain transformers, which
        keeps keys and values from request to request.
    """
    if source.kind == "folder":
        return LoadingPlan(
            replace(config, model=_merged_model(source)), str(source.path), adapter=None
        )
    assert source.run is not None
    model = replace(config.model, backend="transformers")
    return LoadingPlan(replace(config, model=model), _base(source.run, config), adapter=source.path)


def _base(run: Run, config: Config) -> str:
    """Find the folder that `nano` or `random` became in the run."""
    record = run.path / "data.json"
    if not record.exists():
        return config.model.base
    base = str(json.loads(record.read_text(encoding="utf-8"))["base"])
    found = find_beside(base, run)
    return str(found) if found.exists() else base


def _merged_model(source: PlannerSource) -> ModelConfig:
    """Tell a merged folder's precision and prompt format from what lies in and beside it."""
    try:
        content = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        dtype = str(content.get("dtype") or content.get("torch_dtype"))
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"{source.path}/config.json", f"it is no JSON object: {error}", "copy the folder again"
        ) from error
    return ModelConfig(
        base=str(source.path),
        backend="transformers",
        weights=_WEIGHTS.get(dtype, "bf16"),
        prompt_format=_prompt_format(source),
    )


def _prompt_format(source: PlannerSource) -> PromptFormat:
    record = source.path.resolve().parent / "export.json"
    if record.exists():
        known: PromptFormat = json.loads(record.read_text(encoding="utf-8"))["prompt_format"]
        return known
    if source.run is not None:
        return source.run.config().model.prompt_format
    has_template = (source.path / "chat_template.jinja").exists()
    return "chat" if has_template else "alpaca"
