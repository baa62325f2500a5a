"""Fixtures that tests of several stages share: a tiny base model, a small data set, real data.

Nothing heavy is imported here, so tests of the pure stages stay fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tinyagent_fast.config import Config

REAL_DATA = "TINYAGENT_FAST_REAL_DATA"
"""Environment variable that names the folder with the published data and tokenizer."""

# Read by OpenMP when torch is imported, so it must be set before; tests share their cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Give torch one thread, also after a test that let it have more."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder with the published data, or skip."""
    folder = os.environ.get(REAL_DATA)
    if not folder:
        pytest.skip(f"set {REAL_DATA} to a folder with the published data to run this test")
    path = Path(folder)
    assert path.is_dir(), f"{REAL_DATA}={folder} is no folder"
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with small generated training_data.json and testing_data.json."""
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset

    folder = tmp_path_factory.mktemp("data")
    generate_dataset(GenerationSpec(train_entries=40, test_entries=6, seed=11), folder)
    return folder


@pytest.fixture(scope="session")
def spm_folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return a folder with a tokenizer.model as Llama's: SentencePiece BPE with byte fallback."""
    import json

    import sentencepiece

    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    texts = [p["raw_output"] for e in entries.values() for p in e["output"]]
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return the folder of a random Llama of 0.2 M parameters with a byte-level BPE."""
    import json

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyagent_fast.training.nano import save_model, train_bpe_tokenizer

    torch.set_num_threads(1)
    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    points = [point for entry in entries.values() for point in entry["output"]]
    texts = [p["raw_input"] + p["raw_output"] + "<END_OF_PLAN>\n" for p in points]
    tokenizer = train_bpe_tokenizer([*texts, "### Instruction:\n### Input:\n### Response:\n"], 768)
    torch.manual_seed(0)
    # Wide initial weights: with those of a real model, 64 dimensions give no confident logits.
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base")
    save_model(LlamaForCausalLM(shape), tokenizer, folder)
    return folder


@pytest.fixture
def tiny_config(
    tmp_path: Path, tiny_base: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """Return a maker of complete configs for the tiny base; keywords change sections' fields.

    The test runs in its own folder, where runs and caches go. A keyword is a section with a
    mapping of fields, as in `tiny_config(train={"batch": 4})`, or a field of `Config` itself.
    """
    from tinyagent_fast.config import (
        Config,
        DataConfig,
        EvalConfig,
        LoraConfig,
        ModelConfig,
        TrainConfig,
    )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    plain = Config(
        preset="smoke",
        name="tiny",
        runs=tmp_path / "runs",
        data=DataConfig(
            train=tiny_data / "training_data.json",
            test=tiny_data / "testing_data.json",
            validation_entries=8,
        ),
        model=ModelConfig(
            base=str(tiny_base), backend="transformers", weights="fp32", max_length_tokens=768
        ),
        lora=LoraConfig(rank=4, alpha=8),
        train=TrainConfig(
            max_steps=4,
            batch=2,
            accumulation=1,
            learning_rate=1e-3,
            schedule="constant",
            warmup=0.0,
            optimizer="adamw_torch",
            evaluations=0,
            threads=1,
        ),
        eval=EvalConfig(batch=4, max_new_tokens=6, sample=3, parity_prompts=0),
    )

    def make(**changes: Any) -> Config:
        sections = {
            name: replace(getattr(plain, name), **value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return replace(plain, **sections)

    return make


@pytest.fixture
def quiet() -> Any:
    """Return a console that keeps what it is given, to be read with `.file.getvalue()`."""
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=200, highlight=False)
