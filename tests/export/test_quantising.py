"""Quantised GGUF files: llama.cpp's types and bytes, importance, and no silent damage."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.errors import GateError
from tinyagent_fast.export import checkpoints, conversion
from tinyagent_fast.export.conversion import ConversionReport, convert_to_gguf
from tinyagent_fast.export.importance import SOURCE, Importance
from tinyagent_fast.export.quantising import (
    WORST_RELATIVE_RMSE,
    GgmlLibrary,
    block_values,
    file_type,
    open_ggml,
    tensor_type,
)
from tinyagent_fast.export.settings import QUANTS
from tinyagent_fast.models.families import LLAMA, ModelShape, Tensor

K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")

needs_ggml = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the xllamacpp package is not installed"
)


# Which type each tensor is stored as.

# The layers of a model of 22 whose attn_v and ffn_down llama_model_quantize stores as Q6_K.
BETTER_OF_22 = {0, 1, 4, 7, 10, 13, 16, 19, 20, 21}


def tensors(layers: int, *, width: int = 2048, tied: bool = False) -> dict[str, Tensor]:
    shape = ModelShape(
        hidden=width,
        intermediate=width,
        layers=layers,
        heads=4,
        kv_heads=4,
        head_dim=width // 4,
        vocab=64,
        tied=tied,
    )
    return {one.gguf: one for one in LLAMA.tensors(shape)}


def chosen(name: str, quant: str, *, layers: int = 22, tied: bool = False) -> str:
    return tensor_type(tensors(layers, tied=tied)[name], quant, layers)[0]


@pytest.mark.parametrize("part", ["attn_v", "ffn_down"])
@pytest.mark.parametrize(("quant", "usual"), [("q4_k_m", "Q4_K"), ("q5_k_m", "Q5_K")])
def test_the_outer_and_every_third_layer_get_more_bits_where_it_matters(
    part: str, quant: str, usual: str
) -> None:
    for layers, better in ((22, BETTER_OF_22), (2, {1})):
        for layer in range(layers):
            expected = "Q6_K" if layer in better else usual
            assert chosen(f"blk.{layer}.{part}.weight", quant, layers=layers) == expected


def test_the_other_matrices_of_a_layer_are_stored_alike() -> None:
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert {chosen(f"blk.{layer}.{part}.weight", "q4_k_m") for layer in range(22)} == {"Q4_K"}


def test_the_output_layer_gets_more_bits_also_when_it_is_the_embedding() -> None:
    assert chosen("output.weight", "q4_k_m") == "Q6_K"
    assert chosen("token_embd.weight", "q4_k_m") == "Q4_K"
    assert chosen("token_embd.weight", "q4_k_m", tied=True) == "Q6_K"
    assert chosen("output.weight", "q8_0") == "Q8_0"


@pytest.mark.parametrize("quant", QUANTS)
def test_norms_stay_exact(quant: str) -> None:
    for name in ("output_norm.weight", "blk.3.attn_norm.weight", "blk.3.ffn_norm.weight"):
        assert tensor_type(tensors(22)[name], quant, 22) == ("F32", None)


@pytest.mark.parametrize(
    ("quant", "name", "row", "expected"),
    [
        ("q4_k_m", "blk.0.attn_q.weight", 192, ("Q5_0", "Q4_K")),
        ("q5_k_m", "blk.0.attn_q.weight", 192, ("Q5_1", "Q5_K")),
        ("q6_k", "blk.0.attn_q.weight", 192, ("Q8_0", "Q6_K")),
        ("q4_k_m", "blk.1.attn_v.weight", 192, ("Q8_0", "Q6_K")),
        ("q4_k_m", "output.weight", 192, ("Q8_0", "Q6_K")),
        ("q4_k_m", "blk.0.attn_q.weight", 80, ("F16", "Q4_K")),
        ("q8_0", "blk.0.attn_q.weight", 80, ("F16", "Q8_0")),
        ("f16", "blk.0.attn_q.weight", 80, ("F16", None)),
    ],
)
def test_rows_that_do_not_divide_into_blocks_fall_back_and_it_is_said(
    quant: str, name: str, row: int, expected: tuple[str, str | None]
) -> None:
    assert tensor_type(tensors(2, width=row)[name], quant, 2) == expected


@given(
    st.sampled_from(list(QUANTS)),
    st.sampled_from(["token_embd.weight", "output.weight", "blk.0.attn_v.weight"]),
    st.integers(1, 40),
    st.integers(1, 2000),
)
def test_whatever_the_shape_the_type_fits_and_a_fallback_is_never_silent(
    quant: str, name: str, layers: int, row: int
) -> None:
    kind, wanted = tensor_type(tensors(layers, width=row)[name], quant, layers)
    assert row % block_values(kind) == 0
    right, nothing = tensor_type(tensors(layers, width=256)[name], quant, layers)
    assert nothing is None
    assert wanted == (None if kind == right else right)


# What is written.


@pytest.fixture(scope="module")
def llama(llama_folder: Callable[..., Path]) -> Path:
    """Return a model whose rows 256 divides."""
    return llama_folder(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        head_dim=32,
        tie_word_embeddings=False,
    )


def convert(source: Path, target: Path, quant: str, **changes: Any) -> ConversionReport:
    plain: dict[str, Any] = {"name": "tiny", "threads": 1}
    return convert_to_gguf(source, target, quant=quant, **{**plain, **changes})


def values(path: Path) -> dict[str, Any]:
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if "." in name}


def type_names(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


@needs_ggml
@pytest.mark.parametrize(
    ("quant", "types", "bits"),
    [
        ("q8_0", {"Q8_0"}, (8.5, 8.6)),
        ("q6_k", {"Q6_K"}, (6.5, 6.7)),
        ("q5_k_m", {"Q5_K", "Q6_K"}, (5.5, 6.2)),
        ("q4_k_m", {"Q4_K", "Q6_K"}, (4.5, 5.6)),
    ],
)
def test_a_model_is_quantised_in_all_kinds(
    tiny_merged: Path, tmp_path: Path, quant: str, types: set[str], bits: tuple[float, float]
) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "out.gguf"
    report = convert(tiny_merged, target, quant, on_progress=lambda *now: seen.append(now))
    assert report.types == Counter(type_names(target).values())
    assert set(report.types) == {*types, "F32"}
    assert bits[0] < report.bits_per_weight < bits[1]
    assert 0 < report.worst_relative_rmse[min(types)] < 0.15
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert list(tmp_path.iterdir()) == [target], "the unfinished file is gone"
    convert(tiny_merged, tmp_path / "f16.gguf", "f16")
    before, after = keys(tmp_path / "f16.gguf"), keys(target)
    assert after == {**before, "general.file_type": file_type(quant)}


@needs_ggml
def test_q8_0_is_what_the_f16_file_would_give(tiny_merged: Path, tmp_path: Path) -> None:
    convert(tiny_merged, tmp_path / "f16.gguf", "f16")
    convert(tiny_merged, tmp_path / "q8_0.gguf", "q8_0")
    halves = {t.name: t.data for t in GGUFReader(tmp_path / "f16.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "q8_0.gguf").tensors:
        if tensor.tensor_type.name == "Q8_0":
            expected = quants.quantize(halves[tensor.name].astype(np.float32), tensor.tensor_type)
            np.testing.assert_array_equal(tensor.data, expected)


def quantise_with_llama_cpp(source: Path, target: Path, quant: str, by: Importance) -> None:
    """Quantise a file with llama.cpp's own function, with the keys that its tool adds."""
    import ctypes
    import os

    llama: Any = pytest.importorskip("llama_cpp")
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(file_type(quant))
    entry, floats = llama.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
    arrays = {name: np.ascontiguousarray(one) for name, one in by.mean_squares.items()}
    listed = [entry(n.encode(), a.ctypes.data_as(floats), a.size) for n, a in arrays.items()]
    params.imatrix = (entry * (len(listed) + 1))(*listed, entry(None, None, 0))
    extra = {
        "quantize.imatrix.dataset": SOURCE,
        "quantize.imatrix.entries_count": len(by.mean_squares),
        "quantize.imatrix.chunks_count": by.chunks,
    }
    overrides = (llama.llama_model_kv_override * (len(extra) + 1))()
    for at, (key, value) in enumerate(extra.items() if quant in K_QUANTS else ()):
        overrides[at].key = key.encode()
        if isinstance(value, int):
            overrides[at].tag, overrides[at].value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            overrides[at].tag = llama.LLAMA_KV_OVERRIDE_TYPE_STR
            overrides[at].value.val_str = value.encode()
    params.kv_overrides = overrides
    done = llama.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    assert done == 0


@needs_ggml
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
@pytest.mark.parametrize("quant", ["q8_0", *K_QUANTS])
def test_llama_cpp_itself_writes_the_same_file(
    tiny_merged: Path, tmp_path: Path, quant: str
) -> None:
    convert(tiny_merged, tmp_path / "f16.gguf", "f16")
    weights = {
        tensor.name: np.linspace(0.1, 2, int(tensor.shape[0]), dtype=np.float32)
        for tensor in GGUFReader(tmp_path / "f16.gguf").tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }
    by = Importance(weights, 1000)
    convert(tiny_merged, tmp_path / "ours.gguf", quant, importance=by)
    quantise_with_llama_cpp(tmp_path / "f16.gguf", tmp_path / "theirs.gguf", quant, by)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@needs_ggml
def test_neither_threads_nor_blocks_change_a_byte(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(llama, tmp_path / "1", "q4_k_m")
    convert(llama, tmp_path / "3", "q4_k_m", threads=3)
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 5 * 256 * 4)
    convert(llama, tmp_path / "blocks", "q4_k_m", threads=2)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()
    assert (tmp_path / "1").read_bytes() == (tmp_path / "blocks").read_bytes()


@needs_ggml
def test_a_model_with_rows_of_192_falls_back_and_says_so(
    llama_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = llama_folder(hidden_size=192, intermediate_size=192, num_hidden_layers=2, head_dim=48)
    report = convert(folder, tmp_path / "out.gguf", "q4_k_m")
    assert "Q4_K" not in report.types
    assert report.types["Q5_0"] > 0
    assert "blk.0.attn_q.weight: Q4_K -> Q5_0" in report.fallbacks
    assert len(report.fallbacks) == sum(report.types.values()) - report.types["F32"]


# What is found and refused.


def swapped(rows: np.ndarray) -> np.ndarray:
    return rows[::-1].copy()


def flipped(rows: np.ndarray) -> np.ndarray:
    return rows ^ np.uint8(0x10)


def shifted(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=1)


def zeroed(rows: np.ndarray) -> np.ndarray:
    return np.zeros_like(rows)


@needs_ggml
@pytest.mark.parametrize("quant", ["q8_0", *K_QUANTS])
@pytest.mark.parametrize("damage", [swapped, flipped, shifted, zeroed])
def test_a_damaged_block_of_rows_fails_the_check(
    llama: Path,
    tmp_path: Path,
    quant: str,
    damage: Callable[[np.ndarray], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = GgmlLibrary.rows
    calls = {"blocks": 0}

    def sometimes(self: GgmlLibrary, kind: str, rows: np.ndarray, weights: Any) -> np.ndarray:
        done = original(self, kind, rows, weights)
        calls["blocks"] += 1
        return damage(done) if calls["blocks"] == 5 else done

    target = tmp_path / "out.gguf"
    target.write_bytes(b"from last time")
    monkeypatch.setattr(GgmlLibrary, "rows", sometimes)
    with pytest.raises(GateError, match=r"is not its source|differs from"):
        convert(llama, target, quant)
    assert calls["blocks"] > 5
    assert target.read_bytes() == b"from last time"
    assert not list(tmp_path.glob("*.part"))


@needs_ggml
@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K"])
def test_one_column_with_all_the_weight_is_no_mistake(kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((8, 512)).astype(np.float32)
    rows[:, 7] = 0.01  # small beside the others of its block
    weights = np.full(512, 1e-9, dtype=np.float32)
    weights[7] = 1.0
    number, limit = GGMLQuantizationType[kind], WORST_RELATIVE_RMSE[kind]
    with open_ggml() as library:
        stored = library.rows(kind, rows, None)
    back = quants.dequantize(stored, number)
    assert conversion._relative_error(rows, back, weights) <= limit
    for damage in (swapped, zeroed):
        wrong = quants.dequantize(damage(stored), number)
        assert not conversion._relative_error(rows, wrong, weights) <= limit


def test_every_part_of_a_tensor_is_compared() -> None:
    for rows in (1, 2, 255, 256, 257, 1000, 32000):
        picked = conversion._rows_to_check(rows)
        assert picked[0] == 0
        assert picked[-1] == rows - 1
        assert max(np.diff(picked), default=0) <= 256
        assert len(set(picked)) == len(picked) <= rows
