"""Every family becomes a GGUF that llama.cpp reads with the same ids and the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_conversion import convert, largest_difference
from test_vocabulary import different, pieces_of, strings
from tiny_families import MODELS

from tinyagent_fast.config import Config
from tinyagent_fast.display import Display
from tinyagent_fast.export.gates import MAX_LOGIT_DIFFERENCE
from tinyagent_fast.export.pipeline import run_export
from tinyagent_fast.export.preparation import prepare_export
from tinyagent_fast.export.settings import ExportSettings
from tinyagent_fast.models.families import FAMILIES
from tinyagent_fast.training.fit import train


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_ids_and_logits_of_every_family(
    name: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    import unicodedata

    folder = tiny_family(name)
    gguf = convert(folder, tmp_path / "m.gguf").path
    noise = FAMILIES[MODELS[name].model_type].logit_noise
    assert largest_difference(folder, gguf) < MAX_LOGIT_DIFFERENCE + noise
    texts = [unicodedata.normalize("NFC", text) for text in strings(2000)]
    assert different(folder, gguf, texts + pieces_of(folder)) == []


@pytest.mark.parametrize(
    ("name", "prompt_format"),
    [
        ("smollm2", "alpaca"),
        ("llama3", "chat"),
        ("qwen2", "chat"),
        ("qwen3", "alpaca"),
        ("gemma3", "alpaca"),
    ],
)
def test_every_family_is_trained_and_exported_through_all_gates(
    name: str,
    prompt_format: str,
    tiny_family: Callable[[str], Path],
    tiny_config: Callable[..., Config],
    no_picture: None,
    quiet: Any,
) -> None:
    base = tiny_family(name)
    config = tiny_config(
        model={"base": str(base), "prompt_format": prompt_format, "max_length_tokens": 1500},
        train={"learning_rate": 2e-2, "max_steps": 8},
    )
    run = train(config, quiet)
    family = FAMILIES[MODELS[name].model_type]
    shared = json.loads((run.path / "shared_prefix.json").read_text(encoding="utf-8"))
    assert shared["on"] is not bool(family.whole_rows)
    settings = ExportSettings(
        quant="f16,q8_0,q4_k_m", gate_prompts=2, quant_prompts=2, importance_rows=2, threads=1
    )
    config = replace(config, eval=replace(config.eval, max_new_tokens=24))
    run_export(prepare_export(run, config, settings, run.adapter, Display(quiet)))
    record = json.loads((run.path / "export" / "export.json").read_text(encoding="utf-8"))
    assert record["passed"] is True
    files = {a["quant"]: a["details"] for a in record["artefacts"] if a["kind"] == "gguf"}
    assert set(files) == {"f16", "q8_0", "q4_k_m"}
    # Rows of 96 are no whole blocks of K-quants, those of 256 are; llama.cpp's own substitutes.
    assert "blk.0.ffn_gate.weight: Q4_K -> Q5_0" in files["q4_k_m"]["fallbacks"]
    assert {"Q4_K", "Q5_0", "Q8_0", "F32"} <= set(files["q4_k_m"]["types"])
    assert not files["q8_0"]["fallbacks"]
