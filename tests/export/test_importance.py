"""Importance matrices: what is averaged, and a file that llama.cpp's tools would read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from tinyagent_fast.errors import DataError, ModelError
from tinyagent_fast.export.importance import (
    Importance,
    collect_importance,
    load_importance,
    save_importance,
)

ROWS = [[1, 5, 9, 300, 2], [1, 7, 7], [1, *range(20, 60)]]


@pytest.fixture(scope="module")
def model(tiny_merged: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_merged, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def collected(model: Any) -> Importance:
    return collect_importance(model, ROWS)


def test_every_matrix_of_every_layer_is_measured(model: Any, collected: Importance) -> None:
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    expected = {f"blk.{layer}.{part}.weight" for layer in range(2) for part in parts}
    assert set(collected.mean_squares) == {*expected, "output.weight"}
    assert collected.tokens == sum(map(len, ROWS))
    assert all(one.dtype == np.float32 for one in collected.mean_squares.values())


def test_names_and_widths_are_those_of_the_exported_file(
    collected: Importance, tiny_gguf: dict[str, Path]
) -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(tiny_gguf["f16"]).tensors}
    for name, one in collected.mean_squares.items():
        assert one.shape == (tensors[name].shape[0],), name


def test_the_average_is_over_all_tokens_of_all_rows(model: Any, collected: Importance) -> None:
    """The inputs of the first layer's q, k and v are the normed embeddings: computed by hand."""
    import torch

    ids = torch.tensor([token for row in ROWS for token in row])
    with torch.inference_mode():
        normed = model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids))
    expected = normed.double().square().mean(0).numpy()
    for part in ("attn_q", "attn_k", "attn_v"):
        found = collected.mean_squares[f"blk.0.{part}.weight"]
        assert np.allclose(found, expected, rtol=1e-5)


def test_the_output_layer_is_measured_after_the_last_norm(
    model: Any, collected: Importance
) -> None:
    import torch

    total = np.zeros(256)
    with torch.inference_mode():
        for row in ROWS:
            hidden = model.model(input_ids=torch.tensor([row])).last_hidden_state[0]
            total += hidden.double().square().sum(0).numpy()
    assert np.allclose(collected.mean_squares["output.weight"], total / 49, rtol=1e-5)


def test_an_embedding_that_is_also_the_output_is_left_out() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    found = collect_importance(LlamaForCausalLM(config), [[1, 2, 3]])
    assert set(found.mean_squares) & {"output.weight", "token_embd.weight"} == set()
    assert found.mean_squares["blk.0.ffn_down.weight"].shape == (24,)


def test_collecting_leaves_no_hook_and_reports_progress(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    collect_importance(model, ROWS, on_progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_families_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)
    with pytest.raises(ModelError, match="does not know this family"):
        collect_importance(GPT2LMHeadModel(small), [[1]])


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_model_that_does_not_work_has_no_importance(tiny_merged: Path, value: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(tiny_merged, dtype=torch.float32).eval()
    torch.nn.init.constant_(broken.model.layers[1].input_layernorm.weight, value)
    with pytest.raises(DataError, match=r"blk\.1\.attn_q.*\n.*infinite, NaN or all zero"):
        collect_importance(broken, ROWS)


def test_a_saved_matrix_comes_back(collected: Importance, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    save_importance(collected, path)
    back = load_importance(path)
    assert back.tokens == collected.tokens
    assert set(back.mean_squares) == set(collected.mean_squares)
    for name, one in collected.mean_squares.items():
        assert np.allclose(back.mean_squares[name], one, rtol=1e-6)
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_layout_of_llama_cpp(collected: Importance, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    save_importance(collected, path)
    reader = GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    assert values["general.type"] == "imatrix"
    assert values["imatrix.datasets"] == ["training prompts"]
    assert (values["imatrix.chunk_count"], values["imatrix.chunk_size"]) == (1, 512)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * len(collected.mean_squares)
    for name, one in collected.mean_squares.items():
        count = tensors[f"{name}.counts"].data
        assert count.tolist() == [collected.tokens]
        assert np.allclose(tensors[f"{name}.in_sum2"].data / count[0], one, rtol=1e-6)
