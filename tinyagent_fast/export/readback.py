"""Compare a quantised file with the file it was made from: the last step before it gets its name.

Rows are read from the finished file and decoded by the gguf package, so a mistake of the library
that quantised, of the order of blocks, or of an offset shows, whoever made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from tinyagent_fast.errors import GateError
from tinyagent_fast.export.gguf_file import GgufFile, GgufTensor
from tinyagent_fast.export.quantisers import (
    WORST_RELATIVE_RMSE,
    Float32,
    decode_floats,
    dequantise,
    numpy_rows,
)

_CHECKED_EVERY_ROWS = 256


def compare_with_source(
    source: GgufFile, written: GgufFile, types: Mapping[str, str], weights: Mapping[str, Float32]
) -> dict[str, float]:
    """Compare types, and rows from every part of every tensor.

    Args:
        source: What was quantised.
        written: What came of it.
        types: The type each tensor should have.
        weights: Importance of the columns of the tensors whose rounding was weighed.

    Returns:
        The worst relative error by type.

    Raises:
        GateError: If a type differs, or a row is further from its source than its type explains.
    """
    found = {name: tensor.type for name, tensor in written.tensors.items()}
    if found != dict(types):
        wrong = sorted(set(found.items()) ^ set(types.items()))
        raise GateError(f"{written.path.name} has other tensor types than planned: {wrong[:4]}")
    worst: dict[str, float] = {}
    with source.path.open("rb") as a, written.path.open("rb") as b:
        for name, tensor in source.tensors.items():
            kind = types[name]
            picked = _rows_to_check(tensor.rows)
            raw = b"".join(_read_row(a, tensor, row) for row in picked)
            rows = decode_floats(tensor.type, raw).reshape(len(picked), -1)
            stored = b"".join(_read_row(b, written.tensors[name], row) for row in picked)
            blocks = np.frombuffer(stored, dtype=np.uint8).reshape(len(picked), -1)
            error = _error(rows, dequantise(kind, blocks), weights.get(name))
            if not error <= WORST_RELATIVE_RMSE[kind]:
                raise GateError(
                    f"{name} as {kind} is not its source: relative error {error:.3g}, "
                    f"at most {WORST_RELATIVE_RMSE[kind]} expected"
                )
            if kind == "Q8_0" and not np.array_equal(blocks, numpy_rows(kind, rows, None)):
                raise GateError(f"{name} as Q8_0 differs from the reference in numpy")
            worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


def _rows_to_check(rows: int) -> list[int]:
    """Choose the first and last row, and both sides of every step between them."""
    steps = range(_CHECKED_EVERY_ROWS, rows, _CHECKED_EVERY_ROWS)
    return sorted({0, rows - 1, *steps, *(step - 1 for step in steps)})


def _read_row(file: BinaryIO, tensor: GgufTensor, row: int) -> bytes:
    """Read one row of a tensor as it is stored."""
    file.seek(tensor.offset_bytes + row * tensor.row_bytes)
    return file.read(tensor.row_bytes)


def _error(rows: Float32, back: Float32, weights: Float32 | None) -> float:
    """Return the relative error: of the worst row, or with weights of all rows together.

    A row counts for at least 1 % of a usual one, as scales of tiny rows (unused tokens) round to
    zero. With weights, a single row may be far off in columns that hardly matter.
    """
    exact = rows.astype(np.float64) * (1.0 if weights is None else np.sqrt(weights))
    wrong = rows.astype(np.float64) - back
    norms = np.linalg.norm(exact, axis=1)
    usual = float(np.sqrt(np.mean(norms**2)))
    if usual == 0.0:
        return 0.0 if not wrong.any() else float("inf")
    if weights is None:
        return float(np.max(np.linalg.norm(wrong, axis=1) / np.maximum(norms, 0.01 * usual)))
    return float(np.sqrt(np.mean((wrong**2) @ weights)) / usual)
