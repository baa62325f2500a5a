"""The libraries that turn rows of numbers into ggml blocks: llama.cpp's own code, or numpy.

`quantising` asks here for one of three backends. All of them write the same bytes:

- `llama-cpp-python`: llama.cpp's whole-file function, where that package is installed;
- `ggml`: the function under it, exported by the shared library of the xllamacpp package, called
  on blocks of rows. It is undocumented there, so it is proved on a sample before every use;
- `numpy`: the simple types only, without llama.cpp.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from tinyagent_fast.errors import GateError, ModelError
from tinyagent_fast.export.gguf_file import stored_bytes
from tinyagent_fast.export.recipe import BLOCK_VALUES, FILE_TYPES

Backend = Literal["auto", "llama-cpp-python", "ggml", "numpy"]
Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
RowQuantiser = Callable[[str, Float32, Float32 | None], Bytes]
"""Type, rows x row length, weight of each column (or None) -> rows x stored bytes of a row."""

WORST_RELATIVE_RMSE = {
    "F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.025, "Q6_K": 0.08, "Q5_1": 0.12,
    "Q5_0": 0.12, "Q5_K": 0.12, "Q4_K": 0.2,
}  # fmt: skip
"""Largest error of a row by type, relative to the row; two to four times that of normal weights.

Rows swapped or bytes damaged give 0.5 and more. For Q8_0 it is what rounding can do at worst:
half a step of 1/127 of the largest of 32 values, all the others being zero.
"""

WEIGHTED = frozenset({"Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"})
"""Types whose rounding follows an importance matrix; the others ignore it."""

_NUMPY_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1"})
_FLOATS = ("F32", "F16", "BF16")
_FIX = "pip install xllamacpp (or llama-cpp-python)"
_LOG: list[str] = []
_KEPT: list[object] = []
_LLAMA_CPP_NAMES = (
    "llama_model_quantize",
    "llama_model_quantize_default_params",
    "llama_model_imatrix_data",
    "llama_model_kv_override",
    "llama_log_callback",
)
# Where the half-precision scales of a block lie, in bytes.
_SCALES = {
    "Q8_0": (0,), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def choose_backend(wanted: Backend, types: Collection[str], *, weighted: bool) -> Backend:
    """Choose the library to quantise with.

    Args:
        wanted: What was asked for; `auto` takes the first that is installed and can do it.
        types: ggml types that will be written.
        weighted: Whether an importance matrix weighs the rounding.

    Returns:
        A backend that is there, never `auto`.

    Raises:
        ModelError: If the one asked for, or any at all, cannot do it.
    """
    reasons = {}
    for name in ("llama-cpp-python", "ggml", "numpy") if wanted == "auto" else (wanted,):
        reason = _why_not(name, types, weighted)
        if reason is None:
            return name
        reasons[name] = reason
    raise ModelError(
        f"quantise to {', '.join(sorted(types))} with {wanted}",
        "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        _FIX,
    )


def _why_not(name: str, types: Collection[str], weighted: bool) -> str | None:
    """Say why a backend cannot be used, or None."""
    if name == "llama-cpp-python":
        return None if load_llama_cpp() is not None else "not installed, or too old"
    if name == "ggml":
        path = find_ggml_library()
        if path is None:
            return "the xllamacpp package is not installed"
        return GgmlLibrary.missing(path)
    unable = sorted(set(types) - _NUMPY_TYPES)
    if unable:
        return f"cannot write {', '.join(unable)}"
    return "cannot weigh the rounding" if weighted and set(types) & WEIGHTED else None


def decode_floats(type_name: str, raw: bytes) -> Float32:
    """Turn stored F32, F16 or BF16 values into float32, exactly.

    Args:
        type_name: One of these three.
        raw: Bytes as stored.

    Returns:
        A flat array.
    """
    if type_name == "F32":
        return np.frombuffer(raw, dtype="<f4")
    if type_name == "F16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    assert type_name == "BF16", type_name
    return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def dequantise(type_name: str, blocks: Bytes) -> Float32:
    """Turn stored rows back into numbers with the gguf package, not the library that wrote them.

    Args:
        type_name: ggml type.
        blocks: Rows x stored bytes of a row.

    Returns:
        Rows x row length.
    """
    if type_name in _FLOATS:
        return decode_floats(type_name, blocks.tobytes()).reshape(len(blocks), -1)
    numbers: Float32 = quants.dequantize(blocks, GGMLQuantizationType[type_name])
    return numbers


def has_finite_scales(type_name: str, blocks: Bytes) -> bool:
    """Say whether stored rows hold only numbers: half precision ends at 65504.

    Args:
        type_name: ggml type.
        blocks: Rows x stored bytes of a row.

    Returns:
        False if a value or a block's scale is infinite or NaN.
    """
    if type_name in _FLOATS:
        return bool(np.isfinite(decode_floats(type_name, blocks.tobytes())).all())
    per_block = blocks.reshape(-1, stored_bytes(type_name, BLOCK_VALUES[type_name]))
    scales = [np.ascontiguousarray(per_block[:, at : at + 2]) for at in _SCALES[type_name]]
    return all(bool(np.isfinite(one.view("<f2")).all()) for one in scales)


def numpy_rows(type_name: str, rows: Float32, weights: Float32 | None) -> Bytes:
    """Quantise rows without llama.cpp; a `RowQuantiser`.

    Args:
        type_name: One of the types that the gguf package can write.
        rows: Rows x row length.
        weights: Must be None, as numpy does not weigh.

    Returns:
        Rows x stored bytes of a row.
    """
    assert weights is None or type_name not in WEIGHTED
    with np.errstate(over="ignore"):  # What overflows is found by the caller, with its name.
        done = quants.quantize(rows, GGMLQuantizationType[type_name])
    return np.ascontiguousarray(done).view(np.uint8).reshape(len(rows), -1)


def find_ggml_library() -> Path | None:
    """Find the shared library inside the xllamacpp package, without importing the package.

    Returns:
        Its path, or None where the package is not installed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in map(Path, folders):
        for pattern in ("xllamacpp*.so", "xllamacpp*.pyd", "xllamacpp*.dylib"):
            for path in sorted(folder.glob(pattern)):
                return path
    return None


class GgmlLibrary:
    """`ggml_quantize_chunk` of a shared library that contains ggml."""

    SYMBOLS = ("ggml_quantize_init", "ggml_quantize_free", "ggml_quantize_chunk")

    def __init__(self, path: Path) -> None:
        """Load the library and declare its functions.

        Args:
            path: A shared library that exports `SYMBOLS`.
        """
        self._library = ctypes.CDLL(str(path))
        self._library.ggml_quantize_init.argtypes = [ctypes.c_int]
        self._chunk = self._library.ggml_quantize_chunk
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self._chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
        self._chunk.restype = ctypes.c_size_t

    @classmethod
    def missing(cls, path: Path) -> str | None:
        """Say why a shared library cannot be used.

        Args:
            path: The library.

        Returns:
            The reason, or None.
        """
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            return f"{path.name} cannot be loaded: {error}"
        absent = [name for name in cls.SYMBOLS if not hasattr(library, name)]
        return f"{path.name} exports no {', '.join(absent)}" if absent else None

    def rows(self, type_name: str, rows: Float32, weights: Float32 | None) -> Bytes:
        """Quantise rows; a `RowQuantiser`. Other threads run meanwhile.

        Args:
            type_name: ggml type.
            rows: Rows x row length.
            weights: Importance of each column, or None.

        Returns:
            Rows x stored bytes of a row.
        """
        if type_name in _FLOATS:
            return numpy_rows(type_name, rows, None)
        count, length = rows.shape
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        done = np.empty((count, stored_bytes(type_name, length)), dtype=np.uint8)
        columns = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
        assert columns is None or columns.shape == (length,)
        written = self._chunk(
            GGMLQuantizationType[type_name],
            rows.ctypes.data,
            done.ctypes.data,
            0,
            count,
            length,
            None if columns is None else columns.ctypes.data,
        )
        if written != done.nbytes:
            raise GateError(f"ggml wrote {written} bytes of {type_name}, expected {done.nbytes}")
        return done

    def prove(self, types: Collection[str]) -> None:
        """Quantise a sample and compare it with numpy, before minutes are spent on a model.

        Args:
            types: ggml types that will be written.

        Raises:
            GateError: If Q8_0 differs by a byte or another type is further off than it can be.
        """
        sample = np.random.default_rng(0).standard_normal((4, 512), dtype=np.float32)
        for type_name in sorted({*types, "Q8_0"} - set(_FLOATS)):
            self._library.ggml_quantize_init(GGMLQuantizationType[type_name])
            done = self.rows(type_name, sample, None)
            error = np.linalg.norm(dequantise(type_name, done) - sample) / np.linalg.norm(sample)
            same = type_name != "Q8_0" or np.array_equal(done, numpy_rows("Q8_0", sample, None))
            if not same or not error <= WORST_RELATIVE_RMSE[type_name]:
                raise GateError(
                    f"the ggml library writes {type_name} differently: relative error {error:.3g}"
                )

    def close(self) -> None:
        """Free what the library keeps for quantising."""
        self._library.ggml_quantize_free()


def load_llama_cpp() -> Any | None:
    """Import llama-cpp-python where it is installed.

    Returns:
        Its module; None also for a broken build, or another or older package of that name.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    try:
        module = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    return module if all(hasattr(module, name) for name in _LLAMA_CPP_NAMES) else None


def quantise_with_llama_cpp(
    source: Path,
    target: Path,
    quant: str,
    *,
    threads: int,
    weights: Mapping[str, Float32],
    extra: Mapping[str, str | int],
) -> None:
    """Quantise a whole file with llama.cpp's own function.

    Args:
        source: GGUF file of floats.
        target: File to write.
        quant: One of `recipe.QUANTS`.
        threads: How many threads it may use.
        weights: Importance of the columns by tensor name; may be empty.
        extra: Metadata to add, texts of at most 127 bytes.

    Raises:
        GateError: If llama.cpp reports a failure.
    """
    llama: Any = load_llama_cpp()
    callback = llama.llama_log_callback(lambda _level, text, _data: _LOG.append(repr(text)))
    _LOG.clear()
    _KEPT.append(callback)  # llama.cpp goes on calling it, so it must not be collected.
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, FILE_TYPES[quant]
    if hasattr(params, "max_buf_size"):
        params.max_buf_size = 64 * 2**20
    entry = llama.llama_model_imatrix_data
    arrays = {name: np.ascontiguousarray(one, dtype=np.float32) for name, one in weights.items()}
    floats = ctypes.POINTER(ctypes.c_float)
    listed = [entry(n.encode(), a.ctypes.data_as(floats), a.size) for n, a in arrays.items()]
    if listed:
        params.imatrix = (entry * (len(listed) + 1))(*listed, entry(None, None, 0))
    override = llama.llama_model_kv_override
    overrides = (override * (len(extra) + 1))()
    for at, (key, value) in enumerate(extra.items()):
        overrides[at].key = key.encode()
        if isinstance(value, int):
            overrides[at].tag, overrides[at].value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            overrides[at].tag = llama.LLAMA_KV_OVERRIDE_TYPE_STR
            overrides[at].value.val_str = value.encode()
    if extra:
        params.kv_overrides = overrides
    code = llama.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    if code != 0:
        raise GateError(f"llama_model_quantize failed: {' '.join(_LOG[-3:])}")
