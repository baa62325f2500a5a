"""Make a smaller GGUF file: choose types, quantise in blocks of rows, read back and compare.

The source is read block by block and the target written as it comes, so memory stays at a few
blocks whatever the model's size. A target exists under its name only when it passed the check.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tinyagent_fast.errors import GateError, ModelError
from tinyagent_fast.export.gguf_file import (
    GgufFile,
    GgufTensor,
    encode_value,
    header_bytes,
    padding,
    read_gguf,
    stored_bytes,
)
from tinyagent_fast.export.importance import Importance
from tinyagent_fast.export.quantisers import (
    WEIGHTED,
    Backend,
    Float32,
    GgmlLibrary,
    RowQuantiser,
    choose_backend,
    decode_floats,
    find_ggml_library,
    has_finite_scales,
    numpy_rows,
    quantise_with_llama_cpp,
)
from tinyagent_fast.export.readback import compare_with_source
from tinyagent_fast.export.recipe import FILE_TYPES, QUANTS, layer_of, tensor_type

_BLOCK_VALUES = 2**18


@dataclass(frozen=True, kw_only=True)
class QuantisationReport:
    """What was written, with which types, and how far it is from the source."""

    path: Path
    quant: str
    backend: str
    types: Mapping[str, int]
    """Tensors by ggml type, as read back from the file."""
    fallbacks: tuple[str, ...]
    """Tensors whose rows did not fit the type wanted, each as `name: wanted -> written`."""
    bits_per_weight: float
    size_bytes: int
    seconds: float
    worst_relative_rmse: Mapping[str, float]
    """By type: the worst of the rows compared with the source."""
    used_importance: bool
    without_importance: tuple[str, ...]
    """Tensors that could be weighed but are not in the importance matrix, if one was used."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values for a record.

        Returns:
            All fields, the file by its name.
        """
        return {**asdict(self), "path": self.path.name, "seconds": round(self.seconds, 2)}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that is decided before the first byte is written."""

    source: GgufFile
    quant: str
    tensors: tuple[GgufTensor, ...]
    types: Mapping[str, str]
    fallbacks: tuple[str, ...]
    weights: Mapping[str, Float32]
    extra: Mapping[str, str | int]

    @property
    def source_bytes(self) -> int:
        """Bytes of tensor data to read."""
        return sum(tensor.rows * tensor.row_bytes for tensor in self.tensors)


def quantise(
    source_gguf: Path,
    target: Path,
    quant: str,
    *,
    importance: Importance | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> QuantisationReport:
    """Write a quantised copy of a GGUF file and check it against the source.

    Args:
        source_gguf: GGUF file of a Llama in f32, f16 or bf16.
        target: File to write; replaced when the new one is whole.
        quant: One of `recipe.QUANTS`.
        importance: Weighs the rounding of the types that can be weighed.
        backend: Library to quantise with; `auto` takes the first that is installed.
        threads: Threads to use; all usable cores where None.
        on_progress: Told how many bytes of the source are done, and of how many.

    Returns:
        What was written.

    Raises:
        ModelError: If the source, the quant or the backend cannot be used.
        GateError: If what was written is not the source within the type's error.
    """
    started = time.perf_counter()
    if source_gguf.resolve() == target.resolve():
        raise ModelError(str(target), "it is also the source", "give another target")
    plan = _make_plan(read_gguf(source_gguf), quant, importance)
    chosen = choose_backend(backend, set(plan.types.values()), weighted=bool(plan.weights))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        _write(plan, part, chosen, threads or _usable_cores(), on_progress)
        written = read_gguf(part)
        worst = compare_with_source(plan.source, written, plan.types, plan.weights)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    values = sum(prod(tensor.shape) for tensor in plan.tensors)
    data_bytes = sum(tensor.rows * tensor.row_bytes for tensor in written.tensors.values())
    weighable = [name for name, kind in plan.types.items() if plan.weights and kind in WEIGHTED]
    return QuantisationReport(
        path=target,
        quant=quant,
        backend=chosen,
        types=dict(Counter(tensor.type for tensor in written.tensors.values())),
        fallbacks=plan.fallbacks,
        bits_per_weight=data_bytes * 8 / values,
        size_bytes=target.stat().st_size,
        seconds=time.perf_counter() - started,
        worst_relative_rmse=worst,
        used_importance=bool(plan.weights),
        without_importance=tuple(name for name in weighable if name not in plan.weights),
    )


def _make_plan(source: GgufFile, quant: str, importance: Importance | None) -> _Plan:
    """Decide on types, order and metadata; refuse what cannot be quantised."""
    if quant not in QUANTS:
        raise ModelError(f"quant {quant}", "it is not known", f"use one of {', '.join(QUANTS)}")
    layers = source.value("llama.block_count")
    if not isinstance(layers, int):
        raise ModelError(
            str(source.path),
            f"its architecture is {source.value('general.architecture')}, with no Llama layers",
            "quantise the GGUF file of a Llama",
        )
    # llama.cpp writes tensors layer by layer, so files of all backends are the same.
    tensors = sorted(source.tensors.values(), key=lambda one: (layer_of(one.name), one.name))
    coarse = [one for one in tensors if one.type not in ("F32", "F16", "BF16")]
    if coarse:
        raise ModelError(
            str(source.path),
            f"{len(coarse)} tensors are quantised already, {coarse[0].name} as {coarse[0].type}",
            "start from the f16, bf16 or f32 file",
        )
    tied = "output.weight" not in source.tensors
    choices = {one.name: tensor_type(one.name, one.shape, quant, layers, tied) for one in tensors}
    types = {name: chosen for name, (chosen, _) in choices.items()}
    fallbacks = [f"{name}: {wanted} -> {got}" for name, (got, wanted) in choices.items() if wanted]
    weights = _weights(tensors, types, importance)
    extra: dict[str, str | int] = {}
    if importance is not None and weights:
        extra = {
            "quantize.imatrix.dataset": importance.source,
            "quantize.imatrix.entries_count": len(importance.mean_squares),
            "quantize.imatrix.chunks_count": importance.chunks,
        }
    return _Plan(
        source=source,
        quant=quant,
        tensors=tuple(tensors),
        types=types,
        fallbacks=tuple(fallbacks),
        weights=weights,
        extra=extra,
    )


def _weights(
    tensors: list[GgufTensor], types: Mapping[str, str], importance: Importance | None
) -> dict[str, Float32]:
    """Pick the weights of the tensors that can be weighed; refuse those of another model."""
    if importance is None:
        return {}
    lengths = {tensor.name: tensor.shape[-1] for tensor in tensors}
    for name, one in importance.mean_squares.items():
        if lengths.get(name) != len(one):
            raise ModelError(
                f"importance of {name} with {len(one)} columns",
                f"the model has {lengths.get(name, 'no such tensor')}",
                "collect it with this model",
            )
    return {name: one for name, one in importance.mean_squares.items() if types[name] in WEIGHTED}


def _write(
    plan: _Plan,
    part: Path,
    backend: Backend,
    threads: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Write the whole target with the backend chosen."""
    if backend == "llama-cpp-python":
        on_progress(0, plan.source_bytes)
        quantise_with_llama_cpp(
            plan.source.path,
            part,
            plan.quant,
            threads=threads,
            weights=plan.weights,
            extra=plan.extra,
        )
        on_progress(plan.source_bytes, plan.source_bytes)
    elif backend == "numpy":
        _stream(plan, part, numpy_rows, threads, on_progress)
    else:
        path = find_ggml_library()
        assert path is not None
        library = GgmlLibrary(path)
        try:
            library.prove(set(plan.types.values()))
            _stream(plan, part, library.rows, threads, on_progress)
        finally:
            library.close()


def _stream(
    plan: _Plan,
    part: Path,
    quantise_rows: RowQuantiser,
    threads: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Read blocks of rows, quantise them in threads, and write them in their order."""
    done = 0
    pending: deque[tuple[int, Future[bytes]]] = deque()
    with ThreadPoolExecutor(threads) as pool, part.open("wb") as out:

        def write_oldest() -> None:
            nonlocal done
            size, future = pending.popleft()
            out.write(future.result())
            done += size
            on_progress(done, plan.source_bytes)

        out.write(_header(plan))
        for tensor, raw, is_last in _blocks(plan):
            job = pool.submit(_quantise_block, plan, tensor, raw, is_last, quantise_rows)
            pending.append((len(raw), job))
            if len(pending) > threads:
                write_oldest()
        while pending:
            write_oldest()


def _header(plan: _Plan) -> bytes:
    """Build the target's header: the source's metadata with the keys that change at the end."""
    entries = dict(plan.source.entries)
    for key in ("general.alignment", "general.quantization_version", "general.file_type"):
        entries.pop(key, None)
    entries["general.quantization_version"] = encode_value(2)
    entries["general.file_type"] = encode_value(FILE_TYPES[plan.quant])
    entries |= {key: encode_value(value) for key, value in plan.extra.items()}
    return header_bytes(
        entries, [(one.name, one.shape, plan.types[one.name]) for one in plan.tensors]
    )


def _blocks(plan: _Plan) -> Iterator[tuple[GgufTensor, bytes, bool]]:
    """Read all tensors in blocks of whole rows; the flag marks the last block of a tensor."""
    with plan.source.path.open("rb") as file:
        for tensor in plan.tensors:
            step = max(1, _BLOCK_VALUES // tensor.shape[-1])
            file.seek(tensor.offset_bytes)
            for start in range(0, tensor.rows, step):
                stop = min(start + step, tensor.rows)
                yield tensor, file.read((stop - start) * tensor.row_bytes), stop == tensor.rows


def _quantise_block(
    plan: _Plan, tensor: GgufTensor, raw: bytes, is_last: bool, quantise_rows: RowQuantiser
) -> bytes:
    """Turn one block of the source into what the target stores, alignment included."""
    kind = plan.types[tensor.name]
    rows = decode_floats(tensor.type, raw).reshape(-1, tensor.shape[-1])
    done = quantise_rows(kind, rows, plan.weights.get(tensor.name))
    if not np.isfinite(rows).all() or not has_finite_scales(kind, done):
        raise GateError(f"{tensor.name} has values that are infinite, NaN or too large for {kind}")
    size = stored_bytes(kind, prod(tensor.shape))
    return done.tobytes() + (padding(size) if is_last else b"")


def _usable_cores() -> int:
    """Count the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
