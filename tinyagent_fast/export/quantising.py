"""Quantised rows: the type of each tensor, and ggml that writes it.

`conversion` asks here while it writes a file. The types are those that llama.cpp's own tool chooses
and the bytes are its own, because both come from ggml.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from tinyagent_fast.errors import GateError, ModelError
from tinyagent_fast.export.checkpoints import Floats
from tinyagent_fast.export.settings import QUANTS
from tinyagent_fast.models.families import Tensor

WORST_RELATIVE_RMSE = {
    "F32": 0.0, "Q8_0": 0.025, "Q6_K": 0.08, "Q5_1": 0.12, "Q5_0": 0.12, "Q5_K": 0.12,
    "Q4_K": 0.2, "F16": 1e-3,
}  # fmt: skip
"""Largest error of a row by type, relative to the row; two to four times that of normal weights.

Rows swapped or bytes damaged give 0.5 and more. For Q8_0 it is what rounding can do at worst:
half a step of 1/127 of the largest of 32 values, all the others being zero.
"""

WEIGHTED = frozenset({"Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"})
"""Types whose rounding follows an importance matrix; the others ignore it."""

_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def file_type(quant: str) -> LlamaFileType:
    """Give what `general.file_type` says of a kind of file, such as `q4_k_m`."""
    return LlamaFileType[f"{'ALL' if quant == 'f32' else 'MOSTLY'}_{quant.upper()}"]


def block_values(kind: str) -> int:
    """Give how many values one block of a ggml type holds; a row is made of whole blocks."""
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0])


def stored_bytes(kind: str, values: int) -> int:
    """Give the bytes that some values take, a multiple of the ggml type's block."""
    return values // block_values(kind) * int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])


def tensor_type(tensor: Tensor, quant: str, layers: int) -> tuple[str, str | None]:
    """Choose the type one tensor is stored as.

    Returns:
        The ggml type's name, and the type that was wanted where rows do not divide into its
        blocks (None where the first choice fits).

    Source:
        llama.cpp, src/llama-quant.cpp: tensor_allows_quantization, llama_tensor_get_type_impl,
        tensor_type_fallback (release 0.5.0).
    """
    if len(tensor.shape) < 2:
        return "F32", None
    wanted, row = QUANTS[quant][0], tensor.shape[-1]
    if block_values(wanted) == 256 and (
        tensor.is_output or (tensor.sensitive and _gets_more_bits(tensor.layer, layers))
    ):
        wanted = "Q6_K"
    if row % block_values(wanted) == 0:
        return wanted, None
    chosen = "Q8_0" if tensor.is_output else _SMALLER_BLOCKS.get(wanted, wanted)
    return (chosen if row % block_values(chosen) == 0 else "F16"), wanted


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Say whether a layer is one that llama.cpp gives more bits: outer ones, and every third."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


class GgmlLibrary:
    """`ggml_quantize_chunk` of a shared library that contains ggml.

    It is exported by the library of the xllamacpp package but documented nowhere, so `conversion`
    compares what it wrote with its source.
    """

    SYMBOLS = ("ggml_quantize_free", "ggml_quantize_chunk")

    def __init__(self, path: Path) -> None:
        """Load a shared library and declare its functions.

        Raises:
            ModelError: It cannot be loaded or does not export them.
        """
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise _no_ggml(f"{path.name} cannot be loaded: {error}") from error
        absent = [name for name in self.SYMBOLS if not hasattr(self._library, name)]
        if absent:
            raise _no_ggml(f"{path.name} exports no {', '.join(absent)}")
        self._chunk = self._library.ggml_quantize_chunk
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self._chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
        self._chunk.restype = ctypes.c_size_t

    def rows(self, kind: str, rows: Floats, weights: Floats | None) -> NDArray[np.uint8]:
        """Quantise rows to rows of stored bytes; other threads run meanwhile.

        Args:
            kind: ggml type.
            rows: Rows x row length.
            weights: Importance of each column, or None.
        """
        count, length = rows.shape
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        done = np.empty((count, stored_bytes(kind, length)), dtype=np.uint8)
        columns = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
        assert columns is None or columns.shape == (length,)
        written = self._chunk(
            GGMLQuantizationType[kind],
            rows.ctypes.data,
            done.ctypes.data,
            0,
            count,
            length,
            None if columns is None else columns.ctypes.data,
        )
        if written != done.nbytes:
            raise GateError(f"ggml wrote {written} bytes of {kind}, expected {done.nbytes}")
        return done

    def close(self) -> None:
        """Free what the library keeps for quantising."""
        self._library.ggml_quantize_free()


@contextmanager
def open_ggml() -> Iterator[GgmlLibrary]:
    """Load ggml from the xllamacpp package, without importing it.

    Raises:
        ModelError: The package or its functions are missing.
    """
    spec = importlib.util.find_spec("xllamacpp")
    folders = list((spec.submodule_search_locations if spec else None) or [])
    found = [path for folder in folders for path in sorted(Path(folder).glob("xllamacpp*"))]
    found = [path for path in found if path.suffix in (".so", ".pyd", ".dylib")]
    if not found:
        raise _no_ggml("the xllamacpp package is not installed")
    library = GgmlLibrary(found[0])
    try:
        yield library
    finally:
        library.close()


def _no_ggml(why: str) -> ModelError:
    return ModelError("quantising needs ggml", why, "pip install xllamacpp, or export f16 only")
