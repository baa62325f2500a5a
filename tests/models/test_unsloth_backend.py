"""The Unsloth branch, for real: with its CPU backend here, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backend_run
import pytest

if TYPE_CHECKING:
    from tinyagent_fast.config import Config

MakeConfig = Callable[..., "Config"]

QUANTISED: dict[str, Any] = {
    "name": "quantised",
    "model": {"backend": "unsloth", "weights": "nf4", "gradient_checkpointing": "unsloth"},
    "train": {"batching": "packed", "optimizer": "adamw_8bit", "evaluations": 1},
    "eval": {"before_and_after": True, "limit": 2, "parity_prompts": 2},
}
PLAIN: dict[str, Any] = {
    "name": "plain",
    "model": {"backend": "unsloth", "weights": "bf16"},
    "train": {"batching": "length-grouped", "accumulation": 2, "evaluations": 2},
}


@pytest.fixture(scope="module")
def folder(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a process that trained both configs, or skip."""
    if find_spec("unsloth") is None:
        pytest.skip("the package unsloth is not installed")
    from importlib.metadata import version

    from tinyagent_fast.config import dump_config

    # Only looked for: asking for a part of unsloth_zoo would import it, and so before unsloth.
    zoo = find_spec("unsloth_zoo")
    if zoo is None or zoo.origin is None or not (Path(zoo.origin).parent / "cpu").is_dir():
        pytest.skip(f"unsloth {version('unsloth')} has no CPU backend")
    here = tmp_path_factory.mktemp("unsloth")
    for settings in (QUANTISED, PLAIN):
        config = config_in(here, **settings)
        (here / f"{config.name}.yaml").write_text(dump_config(config), encoding="utf-8")
    backend_run.start(here, timeout_s=240, HOME=str(here))
    return here


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    return loaded


def history_of(folder: Path, name: str, event: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == event]


@pytest.mark.parametrize("name", ["quantised", "plain"])
def test_training_goes_through_unsloth_and_leaves_a_whole_run(
    name: str, folder: Path, seen: dict[str, Any]
) -> None:
    assert seen[name]["unsloth"]
    assert seen[name]["backend"] == "unsloth"
    assert seen[name]["only_adapter"]
    assert len(history_of(folder, name, "step")) == 4
    assert history_of(folder, name, "evaluation")[-1]["step"] == 4
    run = folder / "runs" / name
    for path in ("adapter/adapter_model.safetensors", "best/best.json", "training.png"):
        assert (run / path).exists(), path


def test_the_base_is_held_in_four_bits(seen: dict[str, Any]) -> None:
    assert seen["quantised"]["four_bit"] == 2 * 7
    assert seen["plain"]["four_bit"] == 0


def test_what_unsloth_changes_without_a_gpu_is_said(seen: dict[str, Any]) -> None:
    quantised = seen["quantised"]
    assert quantised["optimizer"] == "adamw_torch_fused"
    assert quantised["packing"] is False
    assert any("instead of adamw_8bit" in note for note in quantised["notes"])
    assert any("does not pack" in note for note in quantised["notes"])
    for note in quantised["notes"]:
        assert f"note: {note}" in quantised["output"]


def test_nothing_is_said_where_nothing_was_changed(seen: dict[str, Any]) -> None:
    assert seen["plain"]["notes"] == ["no GPU: weights are held in fp32 instead of bf16"]


def test_plans_are_decoded_over_shared_prefixes(folder: Path) -> None:
    """Without a GPU, Unsloth leaves transformers' layers as they are."""
    said = (folder / "stdout.txt").read_text(encoding="utf-8")
    assert said.count("decoding: shared prefix") == 2


def test_prefixes_are_shared_in_training_too(seen: dict[str, Any]) -> None:
    assert "shared prefixes on: computes" in seen["plain"]["output"]
    assert "shared prefixes off: rows are packed" in seen["quantised"]["output"]


def test_unsloth_trains_just_as_transformers_and_peft_do(
    folder: Path, tiny_config: MakeConfig, quiet: Any, no_picture: None
) -> None:
    """Same weights, adapter, order of rows and loss: only the implementation differs."""
    from tinyagent_fast.training import fit

    model = {**PLAIN["model"], "backend": "transformers"}
    run = fit.train(tiny_config(**{**PLAIN, "model": model}), quiet)
    ours = [r["loss"] for r in run.history() if r["event"] == "step"]
    theirs = [r["loss"] for r in history_of(folder, "plain", "step")]
    assert len(set(ours)) == 4
    assert theirs == pytest.approx(ours, rel=1e-4)
    last = [r for r in run.history() if r["event"] == "evaluation"][-1]
    other = history_of(folder, "plain", "evaluation")[-1]
    assert other["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert other["success"] == last["success"]


def test_the_eval_command_generates_with_unsloth_in_batches_that_equal_single_prompts(
    folder: Path,
) -> None:
    metrics = json.loads((folder / "runs/quantised/eval/metrics.json").read_text())
    made_with = json.loads((folder / "runs/quantised/eval/made_with.json").read_text())
    assert metrics["n"] == 4
    assert metrics["generation"]["parity"]["safe_batch"] == 4
    assert metrics["generation"]["parity"]["tried"] == [[4, 0]]
    assert made_with["backend"] == "unsloth"
    assert "plan success" in (folder / "stdout.txt").read_text(encoding="utf-8")


def test_nothing_is_written_into_the_current_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert not {n for n in names if "unsloth" in n}


def test_unsloth_that_is_not_installed_is_an_error_with_a_fix(
    config_in: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.errors import ModelError
    from tinyagent_fast.models import loading as models

    monkeypatch.setattr(models, "find_spec", lambda _: None)
    config = config_in(tmp_path, model={"backend": "unsloth"})
    with pytest.raises(ModelError, match=r"not installed[\s\S]*--model.backend transformers"):
        models.load_for_training(config, config.model.base)


def test_auto_is_transformers_without_a_gpu(config_in: MakeConfig, tmp_path: Path) -> None:
    from tinyagent_fast.models import loading as models

    config = config_in(tmp_path, model={"backend": "auto"})
    assert models.load_for_training(config, config.model.base).backend == "transformers"


@pytest.mark.parametrize("weights", ["bf16", "fp16"])
def test_weights_that_a_cpu_holds_otherwise_are_said(
    weights: str, config_in: MakeConfig, tmp_path: Path
) -> None:
    from tinyagent_fast.models import loading as models

    config = config_in(tmp_path, model={"weights": weights, "gradient_checkpointing": "unsloth"})
    loaded = models.load_for_training(config, config.model.base)
    assert loaded.compute_dtype == "float32"
    assert loaded.notes == (
        f"no GPU: weights are held in fp32 instead of {weights}",
        "gradient checkpointing `unsloth` needs that backend: using plain `true`",
    )
    assert loaded.model.is_gradient_checkpointing


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    config_in: MakeConfig, tiny_base: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import PreTrainedTokenizerFast

    from tinyagent_fast.errors import ModelError
    from tinyagent_fast.models import loading as models

    shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tiny_base))
    tokenizer.add_tokens(["<END_OF_PLAN>"])
    tokenizer.save_pretrained(str(tmp_path / "base"))
    config = config_in(tmp_path)
    config = replace(config, model=replace(config.model, base=str(tmp_path / "base")))
    with pytest.raises(ModelError, match=r"769 tokens but the model only 768"):
        models.load_for_training(config, config.model.base)
