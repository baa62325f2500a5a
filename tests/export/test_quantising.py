"""Quantised GGUF files: right types, the same bytes from every library, no silent damage."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinyagent_fast.errors import DataError, GateError, ModelError
from tinyagent_fast.export import quantisers, quantising, readback
from tinyagent_fast.export.gguf_file import GgufFile, encode_value, header_bytes, padding, read_gguf
from tinyagent_fast.export.importance import Importance
from tinyagent_fast.export.quantisers import (
    GgmlLibrary,
    choose_backend,
    decode_floats,
    dequantise,
    find_ggml_library,
    numpy_rows,
)
from tinyagent_fast.export.quantising import quantise
from tinyagent_fast.export.recipe import FILE_TYPES, QUANTS

Arrays = dict[str, np.ndarray]

needs_ggml = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the xllamacpp package is not installed"
)
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


def write_llama(
    path: Path, *, hidden: int = 256, layers: int = 2, rows: int = 64, change: Any = None
) -> Arrays:
    """Write a GGUF file with random weights in f16 and the names of a Llama; give the weights."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {"token_embd.weight": rng.standard_normal((rows, hidden)).astype("<f2")}
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            weight = rng.standard_normal((rows, hidden)) * 0.05
            arrays[f"blk.{layer}.{part}.weight"] = weight.astype("<f2")
        arrays[f"blk.{layer}.attn_norm.weight"] = np.ones(hidden, dtype="<f4")
    arrays["output_norm.weight"] = np.ones(hidden, dtype="<f4")
    arrays["output.weight"] = rng.standard_normal((rows, hidden)).astype("<f2")
    if change:
        change(arrays)
    entries = {
        "general.architecture": encode_value("llama"),
        "general.file_type": encode_value(1),
        "general.name": encode_value("tiny"),
        "llama.block_count": encode_value(layers),
        "tokenizer.ggml.tokens": encode_value(["<unk>", "a", "\u00e9"]),
    }
    types = {np.dtype("<f2"): "F16", np.dtype("<f4"): "F32"}
    table = [(name, one.shape, types[one.dtype]) for name, one in arrays.items()]
    data = [one.tobytes() + padding(one.nbytes) for one in arrays.values()]
    path.write_bytes(header_bytes(entries, table) + b"".join(data))
    return arrays


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "llama-f16.gguf"
    write_llama(path)
    return path


def stored(file: GgufFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    size = tensor.rows * tensor.row_bytes
    raw = file.path.read_bytes()[tensor.offset_bytes : tensor.offset_bytes + size]
    return np.frombuffer(raw, dtype=np.uint8).reshape(tensor.rows, -1)


def weighted_error(file: Path, source: Path, name: str, weights: np.ndarray) -> float:
    written, read = read_gguf(file), read_gguf(source)
    back = dequantise(written.tensors[name].type, stored(written, name))
    wrong = back - dequantise(read.tensors[name].type, stored(read, name))
    return float((wrong.astype(np.float64) ** 2 @ weights).sum())


@pytest.mark.parametrize("quant", ["q8_0", "f32", "f16", "bf16"])
def test_simple_types_need_no_llama_cpp(llama: Path, tmp_path: Path, quant: str) -> None:
    report = quantise(llama, tmp_path / "out.gguf", quant, backend="numpy", threads=1)
    kind = {"q8_0": "Q8_0", "f32": "F32", "f16": "F16", "bf16": "BF16"}[quant]
    assert report.backend == "numpy"
    assert report.types.get(kind, 0) >= 16
    assert set(report.types) <= {kind, "F32"}
    assert report.fallbacks == ()
    assert report.size_bytes == (tmp_path / "out.gguf").stat().st_size


@needs_ggml
@pytest.mark.parametrize("quant", ["q8_0", "f16", "bf16", "f32"])
def test_ggml_and_numpy_write_the_same_file(llama: Path, tmp_path: Path, quant: str) -> None:
    files = [tmp_path / "ggml.gguf", tmp_path / "numpy.gguf"]
    for file in files:
        quantise(llama, file, quant, backend=file.stem, threads=2)  # type: ignore[arg-type]
    assert files[0].read_bytes() == files[1].read_bytes()


@needs_llama_cpp
@pytest.mark.parametrize("quant", QUANTS)
def test_llama_cpp_itself_writes_the_same_file(
    tiny_gguf: dict[str, Path], tmp_path: Path, quant: str
) -> None:
    source = tiny_gguf["f16"]
    weights = {
        name: np.linspace(0.1, 2, tensor.shape[-1], dtype=np.float32)
        for name, tensor in read_gguf(source).tensors.items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    }
    importance = Importance(weights, 1000, "rows")
    for backend in ("ggml", "llama-cpp-python"):
        file = tmp_path / f"{backend}.gguf"
        quantise(source, file, quant, backend=backend, importance=importance, threads=1)  # type: ignore[arg-type]
    assert (tmp_path / "ggml.gguf").read_bytes() == file.read_bytes()


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
def test_an_exported_model_is_quantised_in_all_kinds(
    tiny_gguf: dict[str, Path],
    tmp_path: Path,
    quant: str,
    types: set[str],
    bits: tuple[float, float],
) -> None:
    seen: list[tuple[int, int]] = []
    target = tmp_path / "out.gguf"
    report = quantise(
        tiny_gguf["f16"],
        target,
        quant,
        threads=1,
        backend="ggml",
        on_progress=lambda done, of: seen.append((done, of)),
    )
    assert set(report.types) == {*types, "F32"}
    assert bits[0] < report.bits_per_weight < bits[1]
    assert 0 < report.worst_relative_rmse[min(types)] < 0.15
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0
    before, after = read_gguf(tiny_gguf["f16"]), read_gguf(target)
    assert after.value("general.file_type") == FILE_TYPES[quant]
    assert after.value("general.quantization_version") == 2
    changed = {"general.file_type", "general.quantization_version"}
    for key in set(before.entries) - changed:
        assert after.entries[key] == before.entries[key], key
    assert list(tmp_path.iterdir()) == [target], "the unfinished file is gone"


@needs_ggml
def test_the_package_that_others_read_gguf_with_reads_it(llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    quantise(llama, tmp_path / "out.gguf", "q4_k_m", backend="ggml", threads=1)
    reader = GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["<unk>", "a", "\u00e9"]
    ours = read_gguf(tmp_path / "out.gguf")
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == stored(ours, tensor.name).tobytes()
        assert tensor.tensor_type.name == ours.tensors[tensor.name].type


@needs_ggml
def test_the_number_of_threads_changes_no_byte(llama: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        quantise(llama, tmp_path / f"{threads}", "q4_k_m", backend="ggml", threads=threads)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


@needs_ggml
def test_blocks_of_rows_change_no_byte(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise(llama, tmp_path / "whole", "q4_k_m", backend="ggml", threads=2)
    monkeypatch.setattr(quantising, "_BLOCK_VALUES", 5 * 256)
    quantise(llama, tmp_path / "blocks", "q4_k_m", backend="ggml", threads=2)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


PEAK = """
import resource, sys
from pathlib import Path
from tinyagent_fast.export.quantising import quantise
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
quantise(Path(sys.argv[1]), Path(sys.argv[2]), "q8_0", backend="numpy", threads=1)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in KiB on Linux only")
def test_memory_holds_some_blocks_and_not_the_largest_tensor(tmp_path: Path) -> None:
    def enlarge(arrays: Arrays) -> None:
        arrays["token_embd.weight"] = np.tile(arrays["token_embd.weight"], (2048, 1))

    source = tmp_path / "large.gguf"
    write_llama(source, layers=1, change=enlarge)
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert source.stat().st_size > 64 * 2**20
    assert int(done.stdout) < 32, f"{done.stdout} MiB more than before"


@needs_ggml
def test_a_model_with_rows_of_192_falls_back_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "narrow.gguf"
    write_llama(source, hidden=192)
    report = quantise(source, tmp_path / "out.gguf", "q4_k_m", backend="ggml", threads=1)
    assert "Q4_K" not in report.types
    assert report.types["Q5_0"] > 0
    assert "blk.0.attn_q.weight: Q4_K -> Q5_0" in report.fallbacks
    assert len(report.fallbacks) == sum(report.types.values()) - report.types["F32"]


def swapped(rows: np.ndarray) -> np.ndarray:
    return rows[::-1].copy()


def flipped(rows: np.ndarray) -> np.ndarray:
    return rows ^ np.uint8(0x10)


def shifted(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=1)


def zeroed(rows: np.ndarray) -> np.ndarray:
    return np.zeros_like(rows)


@needs_ggml
@pytest.mark.parametrize("quant", ["q8_0", "q6_k", "q5_k_m", "q4_k_m"])
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
        calls["blocks"] += len(rows) == 64 and kind != "F32"
        return damage(done) if calls["blocks"] == 5 and len(rows) == 64 else done

    target = tmp_path / "out.gguf"
    target.write_bytes(b"from last time")
    monkeypatch.setattr(GgmlLibrary, "rows", sometimes)
    with pytest.raises(GateError, match=r"is not its source|differs from|infinite, NaN"):
        quantise(llama, target, quant, backend="ggml", threads=1)
    assert target.read_bytes() == b"from last time"
    assert not list(tmp_path.glob("*.part"))


def test_every_part_of_a_tensor_is_compared() -> None:
    for rows in (1, 2, 255, 256, 257, 1000, 32000):
        picked = readback._rows_to_check(rows)
        assert picked[0] == 0
        assert picked[-1] == rows - 1
        assert max(np.diff(picked), default=0) <= 256
        assert len(set(picked)) == len(picked) <= rows


@needs_ggml
def test_a_library_that_quantises_otherwise_is_refused_before_it_starts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GgmlLibrary.rows

    def off_by_one(self: GgmlLibrary, kind: str, rows: np.ndarray, weights: Any) -> np.ndarray:
        assert len(rows) == 4, "a model was begun with a library that was not proved"
        done = original(self, kind, rows, weights)
        done[0, 5] += 1
        return done

    monkeypatch.setattr(GgmlLibrary, "rows", off_by_one)
    with pytest.raises(GateError, match="the ggml library writes Q8_0 differently"):
        quantise(llama, tmp_path / "out.gguf", "q8_0", backend="ggml", threads=1)


@pytest.mark.parametrize("value", [np.inf, np.nan, 70000.0])
def test_numbers_that_cannot_be_stored_are_named(tmp_path: Path, value: float) -> None:
    def spoil(arrays: Arrays) -> None:
        arrays["blk.1.ffn_up.weight"] = arrays["blk.1.ffn_up.weight"].astype("<f4")
        arrays["blk.1.ffn_up.weight"][40, 3] = value

    source = tmp_path / "spoiled.gguf"
    write_llama(source, change=spoil)
    with pytest.raises(GateError, match=r"blk\.1\.ffn_up\.weight has values"):
        quantise(source, tmp_path / "out.gguf", "f16", backend="numpy", threads=1)
    assert not (tmp_path / "out.gguf").exists()


@needs_ggml
def test_tiny_rows_beside_usual_ones_pass(tmp_path: Path) -> None:
    def shrink(arrays: Arrays) -> None:
        arrays["token_embd.weight"][10:20] *= np.float16(1e-5)
        arrays["token_embd.weight"][30] = 0

    source = tmp_path / "unused-tokens.gguf"
    write_llama(source, change=shrink)
    report = quantise(source, tmp_path / "out.gguf", "q4_k_m", backend="ggml", threads=1)
    assert report.worst_relative_rmse["Q4_K"] < 0.15


@needs_ggml
@pytest.mark.parametrize("quant", ["q4_k_m", "q5_k_m", "q6_k"])
def test_importance_lowers_the_error_where_inputs_are_large(
    llama: Path, tmp_path: Path, quant: str
) -> None:
    name = "blk.0.ffn_up.weight"
    weights = np.where(np.arange(256) % 4 == 0, 50.0, 0.5).astype(np.float32)
    plain, weighed = tmp_path / "plain.gguf", tmp_path / "weighed.gguf"
    first = quantise(llama, plain, quant, backend="ggml", threads=1)
    second = quantise(
        llama,
        weighed,
        quant,
        backend="ggml",
        threads=1,
        importance=Importance({name: weights}, 2000, "some rows"),
    )
    a, b = read_gguf(plain), read_gguf(weighed)
    assert weighted_error(weighed, llama, name, weights) < 0.9 * weighted_error(
        plain, llama, name, weights
    )
    same = {other: np.array_equal(stored(a, other), stored(b, other)) for other in a.tensors}
    assert [other for other, equal in same.items() if not equal] == [name]
    assert (first.used_importance, second.used_importance) == (False, True)
    assert name not in second.without_importance
    assert "blk.1.ffn_up.weight" in second.without_importance
    assert a.value("quantize.imatrix.dataset") is None
    assert b.value("quantize.imatrix.dataset") == "some rows"
    assert b.value("quantize.imatrix.entries_count") == 1
    assert b.value("quantize.imatrix.chunks_count") == 3


@needs_ggml
def test_importance_changes_nothing_in_types_that_do_not_weigh(llama: Path, tmp_path: Path) -> None:
    importance = Importance({"blk.0.ffn_up.weight": np.arange(256, dtype=np.float32)}, 9, "rows")
    plain, weighed = tmp_path / "plain.gguf", tmp_path / "weighed.gguf"
    quantise(llama, plain, "q8_0", backend="ggml", threads=1)
    report = quantise(llama, weighed, "q8_0", importance=importance, backend="ggml", threads=1)
    assert not report.used_importance
    assert plain.read_bytes() == weighed.read_bytes()


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_up.weight", "blk.7.ffn_up.weight"], ids=["other width", "other layer"]
)
def test_importance_of_another_model_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    importance = Importance({name: np.ones(128, dtype=np.float32)}, 10, "rows")
    with pytest.raises(ModelError, match="collect it with this model"):
        quantise(llama, tmp_path / "out.gguf", "q4_k_m", importance=importance)


def test_without_llama_cpp_k_quants_are_refused_with_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisers, "find_ggml_library", lambda: None)
    monkeypatch.setattr(quantisers, "load_llama_cpp", lambda: None)
    with pytest.raises(ModelError, match="pip install xllamacpp"):
        quantise(llama, tmp_path / "out.gguf", "q4_k_m")
    assert quantise(llama, tmp_path / "out.gguf", "q8_0", threads=1).backend == "numpy"


@needs_ggml
def test_a_library_without_the_functions_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgmlLibrary, "SYMBOLS", (*GgmlLibrary.SYMBOLS, "ggml_of_tomorrow"))
    with pytest.raises(ModelError, match="exports no ggml_of_tomorrow"):
        choose_backend("ggml", {"Q4_K"}, weighted=False)
    monkeypatch.setattr(quantisers, "load_llama_cpp", lambda: None)
    assert choose_backend("auto", {"Q8_0", "F32"}, weighted=False) == "numpy"
    broken = tmp_path / "xllamacpp.so"
    broken.write_bytes(b"no library")
    assert "cannot be loaded" in (GgmlLibrary.missing(broken) or "")


def test_what_cannot_be_a_source_is_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError, match="there is no such file"):
        quantise(tmp_path / "absent.gguf", out, "q8_0")
    with pytest.raises(ModelError, match="use one of f32"):
        quantise(llama, out, "q3_k_s")
    with pytest.raises(ModelError, match="it is also the source"):
        quantise(llama, llama, "q8_0")
    quantise(llama, out, "q8_0", backend="numpy", threads=1)
    with pytest.raises(ModelError, match="are quantised already"):
        quantise(out, tmp_path / "again.gguf", "q8_0")


@pytest.mark.parametrize("keep_bytes", [0, 3, 30, 400, 3000, -1])
def test_a_file_that_is_cut_short_is_refused(llama: Path, tmp_path: Path, keep_bytes: int) -> None:
    cut = tmp_path / "cut.gguf"
    data = llama.read_bytes()
    last = read_gguf(llama).tensors["output.weight"]
    end = last.offset_bytes + last.rows * last.row_bytes
    cut.write_bytes(data[: keep_bytes if keep_bytes >= 0 else end - 1])
    with pytest.raises(ModelError, match=r"ends behind the end|no GGUF file"):
        read_gguf(cut)


def test_numbers_survive_decoding_exactly() -> None:
    values = np.array([[0.0, -1.5, 3.140625, 2.0**-20] * 8], dtype=np.float32)
    for kind in ("F32", "F16", "BF16"):
        raw = numpy_rows(kind, values, None)
        assert np.array_equal(decode_floats(kind, raw.tobytes()), values[0]), kind
        assert raw.shape == (1, prod(values.shape) * (4 if kind == "F32" else 2))


def test_a_source_name_that_llama_cpp_would_cut_is_refused() -> None:
    with pytest.raises(DataError, match="longer than 127 bytes"):
        Importance({"output.weight": np.ones(4, dtype=np.float32)}, 1, "x" * 128)


@needs_ggml
def test_the_library_is_found_without_importing_the_package() -> None:
    path = find_ggml_library()
    assert path is not None
    assert GgmlLibrary.missing(path) is None


@needs_llama_cpp
def test_what_llama_cpp_refuses_is_said_in_its_words(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"llama_model_quantize failed.*key not found"):
        quantise(llama, tmp_path / "out.gguf", "q8_0", backend="llama-cpp-python", threads=1)
    assert list(tmp_path.iterdir()) == [llama]
