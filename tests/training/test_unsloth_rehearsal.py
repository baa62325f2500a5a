"""A whole training on Unsloth's GPU code, without a GPU: its kernels by Triton's interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backend_run
import pytest

if TYPE_CHECKING:
    from tinyagent_fast.config import Config

REHEARSED: dict[str, Any] = {
    "name": "rehearsed",
    "model": {"backend": "unsloth", "weights": "nf4", "gradient_checkpointing": "auto"},
    "train": {"max_steps": 2, "batch": 1, "accumulation": 2, "evaluations": 1},
    "eval": {"before_and_after": True, "limit": 2, "sample": 2, "parity_prompts": 2},
}
"""As the presets for GPUs do it; a token costs the interpreter some tens of milliseconds."""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("unsloth") is None or find_spec("triton") is None,
    reason="unsloth or triton is not installed (make setup-unsloth)",
)
def test_a_whole_training_by_unsloth_s_kernels_is_that_of_transformers(
    tiny_config: Callable[..., Config], tmp_path: Path, quiet: Any, no_picture: None
) -> None:
    from tinyagent_fast.config import dump_config
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
    from tinyagent_fast.runs import Run
    from tinyagent_fast.training.fit import train

    spec = GenerationSpec(train_entries=24, test_entries=4, seed=11, single_calls=True)
    files = generate_dataset(spec, tmp_path / "short")
    data = {"data": {"train": files.train, "test": files.test, "validation_entries": 4}}
    config = tiny_config(**REHEARSED, **data)
    (tmp_path / "rehearsed.yaml").write_text(dump_config(config), encoding="utf-8")
    seen = backend_run.start(tmp_path, "kernels", timeout_s=3600, HOME=str(tmp_path))
    said = seen["rehearsed"]["output"]
    assert "shared prefixes on: computes" in said
    assert "2 of 2 QKV, O, MLP fused" in said
    assert "shared prefixes give the loss of whole rows within" in said
    assert "decoding: shared prefix" in (tmp_path / "stdout.txt").read_text(encoding="utf-8")

    model = {**REHEARSED["model"], "backend": "transformers"}
    plain = train(tiny_config(**{**REHEARSED, **data, "name": "plain", "model": model}), quiet)
    runs = [Run(tmp_path / "runs" / "rehearsed"), plain]
    steps = [[r for r in run.history() if r["event"] == "step"] for run in runs]
    assert len(steps[0]) == 2
    for ours, theirs in zip(*steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["tokens_computed"] == theirs["tokens_computed"] < ours["tokens_padded"]
    plans = [(run.path / "test" / "after" / "predictions.jsonl").read_text() for run in runs]
    texts = [[json.loads(line)["prediction"] for line in text.splitlines()] for text in plans]
    assert texts[0] == texts[1]
