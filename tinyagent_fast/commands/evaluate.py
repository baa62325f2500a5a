"""`eval`: plan success of a run's adapter on the test file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyagent_fast.config import Backend, Config, check_config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.runs import Run, find_run


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    """Flags of `eval`; what is not given comes from the run's config."""

    run: str = "latest"
    """Run to evaluate: its name, its folder, or `latest`."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    adapter: str = "best"
    """`best` for the run's adapter, `none` for the bare base model, or a folder."""
    test: Path | None = None
    """Another test file in the published schema."""
    batch: int | None = None
    """Prompts generated together."""
    max_new_tokens: int | None = None
    """Tokens after which a plan counts as truncated."""
    parity_prompts: int | None = None
    """Prompts generated at batch 1 and at batch N before the sweep; 0 skips the comparison."""
    limit: int | None = None
    """Evaluate only the first so many entries."""
    backend: Backend | None = None
    """Another backend than the run's."""
    out: Path | None = None
    """Folder for predictions and report; by default `eval/` in the run's folder."""
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
    found = find_run(flags.run, flags.runs)
    config = _config(found, flags)
    adapter = _adapter(found, flags)
    from tinyagent_fast.training.libraries import prepare_libraries

    prepare_libraries(config.model)
    from rich.console import Console

    from tinyagent_fast.evaluation.report import headline
    from tinyagent_fast.evaluation.running import evaluate_examples
    from tinyagent_fast.training.display import TrainingDisplay
    from tinyagent_fast.training.inputs import load_test_examples
    from tinyagent_fast.training.models import load_for_generation
    from tinyagent_fast.training.session import scoring_tools

    display = TrainingDisplay(Console(highlight=False))
    examples, test_sha256 = load_test_examples(config)
    base = _base(found, config)
    display.say(f"run {found.path.name}: {len(examples)} test queries, adapter {adapter or 'none'}")
    loaded = load_for_generation(config, base, adapter)
    for note in loaded.notes:
        display.say(f"note: {note}")
    folder = flags.out or found.evaluation.with_name("eval" if adapter else "eval-base")
    if flags.fresh:
        (folder / "made_with.json").unlink(missing_ok=True)
    with display.bar("evaluation", "plans") as update:
        result = evaluate_examples(
            loaded,
            examples,
            config.eval,
            folder,
            made_with={
                **_made_with(config, base, adapter),
                "test_sha256": test_sha256,
                "backend": loaded.backend,
            },
            tools=scoring_tools(config),
            title=f"Run {found.path.name}",
            on_progress=update,
            say=display.say,
        )
    display.say((folder / "report.md").read_text(encoding="utf-8").split("\n## The first")[0])
    display.say(headline(result.metrics))
    display.say(f"written: {folder}/metrics.json, predictions.jsonl, report.md")
    return 0


def _made_with(config: Config, base: str, adapter: Path | None) -> dict[str, Any]:
    """Name what predictions depend on, so that others are never mixed with them."""
    weights = adapter / "adapter_model.safetensors" if adapter else None
    return {
        "base": base,
        "adapter_sha256": _sha256(weights) if weights else None,
        "prompt_format": config.model.prompt_format,
        "weights": config.model.weights,
    }


def _config(found: Run, flags: EvalFlags) -> Config:
    config = found.config()
    changes = {
        name: value
        for name in ("batch", "max_new_tokens", "parity_prompts", "limit")
        if (value := getattr(flags, name)) is not None
    }
    config = replace(config, eval=replace(config.eval, **changes))
    if flags.test is not None:
        config = replace(config, data=replace(config.data, test=flags.test))
    if flags.backend is not None:
        config = replace(config, model=replace(config.model, backend=flags.backend))
    check_config(config)
    return config


def _adapter(found: Run, flags: EvalFlags) -> Path | None:
    if flags.adapter == "none":
        return None
    folder = found.adapter if flags.adapter == "best" else Path(flags.adapter)
    if flags.adapter == "best" and not folder.exists():
        folder = found.best  # a run that was broken off has its best adapter there
    if not (folder / "adapter_model.safetensors").exists():
        raise ConfigError(
            f"adapter {folder}",
            "it holds no adapter_model.safetensors",
            f"finish the run (make train ARGS='--resume {found.path.name}'), or name a folder",
        )
    return folder


def _base(found: Run, config: Config) -> str:
    """Find the folder that `nano` or `random` became in this run."""
    data = found.path / "data.json"
    if data.exists():
        record: dict[str, Any] = json.loads(data.read_text(encoding="utf-8"))
        return str(record["base"])
    return config.model.base


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
