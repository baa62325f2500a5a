"""A tiny Llama that can become a GGUF with real K-quants, and its GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Another text than the one it trains on would do; it has braces and a newline, as templates have.
TINY_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """Return a maker of Llama folders with random weights and no tokenizer, made without torch.

    Keywords go into config.json; None removes a key. Weights are drawn by `draw(random, shape)`.
    """
    import numpy as np

    from tinyagent_fast.export.checkpoints import Checkpoint, SafetensorsWriter
    from tinyagent_fast.export.llama import llama_tensors, read_shape

    def standard(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
        return random.standard_normal(shape, np.float32) * np.float32(0.05)

    def make(
        folder: Path, *, dtype: str = "BF16", draw: Callable[..., Any] = standard, **changes: Any
    ) -> Path:
        plain: dict[str, Any] = {
            "model_type": "llama",
            "vocab_size": 700,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }
        config = {k: v for k, v in {**plain, **changes}.items() if v is not None}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = list(llama_tensors(read_shape(Checkpoint(folder, {**plain, **changes}, {}))))
        random = np.random.default_rng(0)
        plan = [(tensor.source, dtype, tensor.shape) for tensor in tensors]
        with SafetensorsWriter(folder / "model.safetensors", plan, {}) as writer:
            for tensor in tensors:
                writer.write_rows(draw(random, tensor.shape))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_merged(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Return the folder of a random Llama whose rows 256 divides, with a byte-level BPE."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyagent_fast.training.nano import save_model, train_bpe_tokenizer

    torch.set_num_threads(1)
    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    points = [point for entry in entries.values() for point in entry["output"]]
    texts = [p["raw_input"] + p["raw_output"] + "<END_OF_PLAN>\n" for p in points]
    tokenizer = train_bpe_tokenizer([*texts, "### Instruction:\n### Input:\n### Response:\n"], 768)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("merged")
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_merged: Path) -> dict[str, Path]:
    """Return the GGUF files of `tiny_merged` by file type, f32 and f16, with a chat template."""
    from tinyagent_fast.export.conversion import convert_to_gguf

    folder = tmp_path_factory.mktemp("gguf")
    files = {}
    for file_type in ("f32", "f16"):
        files[file_type] = convert_to_gguf(
            tiny_merged,
            folder / f"tiny-{file_type}.gguf",
            file_type=file_type,
            name="tiny",
            chat_template=TINY_TEMPLATE,
            extra={"tinyagent_fast.prompt_format": "alpaca"},
        ).path
    return files
