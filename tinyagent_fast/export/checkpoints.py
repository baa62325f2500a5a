"""Read and write the weights of a model folder without holding them: rows in, rows out.

Plain reads and writes, block by block, so that the size of a model does not decide how much memory
an export needs. The safetensors package writes only whole files from memory and gives bf16 only
through torch, so it is not used here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyagent_fast.errors import ModelError

Floats = NDArray[np.float32]

VALUE_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""The number formats that a model can be exported from, with the bytes of one value."""

BLOCK_BYTES = 2**20
"""Size of a block of rows as float32: small beside a tensor, large beside the cost of a call."""

# Numbers from here on are nearer to 2**16 than to 65504, and 2**16 is f16's infinity.
_INFINITE_F16 = 65520.0

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The files themselves set no limit; a header beyond this is damage (safetensors refuses it too).
_HEADER_LIMIT_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where the values of one tensor lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset_bytes: int

    @property
    def rows(self) -> int:
        """What `read_rows` counts: the first dimension."""
        return self.shape[0]

    @property
    def row_values(self) -> int:
        """Values of one row; 1 for a tensor of one dimension."""
        return math.prod(self.shape[1:])

    @property
    def size_bytes(self) -> int:
        """What it takes in its file."""
        return self.rows * self.row_values * VALUE_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its config and its tensors by name, over all files."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a model folder and check that all its weights are there, whole and not quantised.

    Args:
        folder: Holds config.json and model.safetensors, or its shards with their index.

    Returns:
        The checkpoint; no weights are read yet.

    Raises:
        ModelError: The folder holds no whole model in safetensors with float weights.
    """
    config = _read_config(folder)
    if (folder / _INDEX).exists():
        tensors = _open_shards(folder)
    elif (folder / _SINGLE).exists():
        tensors = stored_tensors(folder / _SINGLE)
    else:
        raise _no_weights(folder)
    return Checkpoint(folder, config, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"folder {folder}",
            "it holds an adapter, which is only the difference to a base model",
            "merge it with its base model first, and name the merged folder",
        )
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"model in {folder}",
            f"its weights are quantised ({method}), and rounding them again would cost quality",
            "name the folder of the same model in bf16, f16 or f32",
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a model folder that holds one JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ModelError: No such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        fix = "name a model folder as transformers saves it"
        raise ModelError(f"folder {path.parent}", f"it has no {path.name}", fix) from error
    except ValueError as error:
        raise ModelError(f"{path}", f"it is no JSON: {error}", "copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}", "it holds no JSON object", "copy the file again")
    return value


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    why, fix = f"it has neither {_SINGLE} nor {_INDEX}", "copy the weights into it"
    if pickles:
        why = f"its weights are {pickles[0]}, a format that can run code when it is read"
        fix = "load the model with transformers and save it again, which writes model.safetensors"
    return ModelError(f"folder {folder}", why, fix)


def _open_shards(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of all shards, and hold them against the index."""
    index = folder / _INDEX
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ModelError(f"{index}", "it has no weight_map", "copy the file again")
    absent = [name for name in sorted(set(where.values())) if not (folder / name).exists()]
    if absent:
        raise ModelError(
            f"folder {folder}",
            f"its index names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} "
            "not there",
            "copy the missing files into it",
        )
    headers = {name: stored_tensors(folder / name) for name in sorted(set(where.values()))}
    for tensor, shard in where.items():
        if tensor not in headers[shard]:
            raise ModelError(
                f"{folder / shard}",
                f"the index says that it holds {tensor}, and it does not",
                "copy the index and the shards from the same model",
            )
    return {tensor: headers[shard][tensor] for tensor, shard in where.items()}


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header of one safetensors file and check it against the file's size.

    Args:
        path: A model's, a shard's or an adapter's file.

    Returns:
        Its tensors by name.

    Raises:
        ModelError: The file is cut off or damaged, or a tensor is not F32, F16 or BF16.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
            raise _damaged(path, "its header is cut off or is none")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [
                (name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"its header cannot be read: {error}") from error
    data = 8 + length
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        if dtype not in VALUE_BYTES:
            raise ModelError(
                f"tensor {name} in {path}",
                f"it is stored as {dtype}, so the weights are quantised or of an unknown kind",
                "name the folder of the same model in bf16, f16 or f32",
            )
        if end - begin != math.prod(shape) * VALUE_BYTES[dtype] or not 0 <= begin <= end:
            raise _damaged(path, f"the place of {name} does not fit its shape {shape}")
        if data + end > size:
            raise _damaged(path, f"{name} should end at byte {data + end:,} of {size:,}")
        tensors[name] = StoredTensor(
            name=name, dtype=dtype, shape=shape, path=path, offset_bytes=data + begin
        )
    return tensors


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path}", why, "copy or download the file again")


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Floats:
    """Read some rows of a tensor as float32, which holds all three formats exactly.

    Args:
        tensor: A tensor of a checkpoint.
        start: First row; an element for a tensor of one dimension.
        stop: Row after the last one.

    Returns:
        The rows, in an array of their own.

    Raises:
        ModelError: The file has become shorter since it was opened.
    """
    assert 0 <= start <= stop <= tensor.rows, f"rows {start}..{stop} of {tensor.shape}"
    count = (stop - start) * tensor.row_values
    width = VALUE_BYTES[tensor.dtype]
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset_bytes + start * tensor.row_values * width)
        stored = np.fromfile(
            file, np.dtype({"F32": "<f4", "F16": "<f2"}.get(tensor.dtype, "<u2")), count
        )
    if stored.size != count:
        raise _damaged(tensor.path, f"it ends within {tensor.name}")
    if tensor.dtype == "BF16":
        # bf16 is the upper half of a float32.
        bits = stored.astype(np.uint32)
        bits <<= 16
        stored = bits.view(np.float32)
    return stored.astype(np.float32, copy=False).reshape(stop - start, *tensor.shape[1:])


def row_blocks(tensor: StoredTensor, *, multiple_of_rows: int = 1) -> Iterator[tuple[int, Floats]]:
    """Read a tensor in blocks of about `BLOCK_BYTES`, larger only where a single unit is larger.

    Args:
        tensor: A tensor of a checkpoint.
        multiple_of_rows: What must stay in one block, such as the rows of an attention head.

    Yields:
        First row of each block, and its rows.
    """
    unit_bytes = 4 * tensor.row_values * multiple_of_rows
    step = max(1, BLOCK_BYTES // max(1, unit_bytes)) * multiple_of_rows
    for start in range(0, tensor.rows, step):
        yield start, read_rows(tensor, start, min(start + step, tensor.rows))


def encode_values(block: Floats, dtype: str, name: str) -> NDArray[Any]:
    """Round float32 values to a stored format, to the nearest with ties to even.

    Args:
        block: Values.
        dtype: F32, F16 or BF16.
        name: Of their tensor, for messages.

    Returns:
        An array of the same shape whose bytes are the stored ones.

    Raises:
        ModelError: A finite value is too large for f16.
    """
    if dtype == "F32":
        return np.ascontiguousarray(block, "<f4")
    if dtype == "F16":
        largest = _largest_finite(block)
        if largest >= _INFINITE_F16:
            raise ModelError(
                f"tensor {name}",
                f"{largest:g} is beyond the largest f16 number, 65504",
                "write the model as bf16 or f32",
            )
        return np.ascontiguousarray(block.astype("<f2"))
    assert dtype == "BF16", dtype
    bits = np.ascontiguousarray(block, np.float32).view(np.uint32)
    # Half a step less one, plus one where the kept part is odd: nearest, ties to even.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nans = np.isnan(block)
    if nans.any():
        # The sum carried NaNs into infinity; a NaN keeps its upper half, made a quiet one.
        rounded[nans] = (bits[nans] >> 16) | 0x40
    return rounded.astype("<u2")


def _largest_finite(block: Floats) -> float:
    if not block.size:
        return 0.0
    largest = max(-float(block.min()), float(block.max()))
    if not math.isfinite(largest):
        largest = float(np.abs(block[np.isfinite(block)]).max(initial=0.0))
    return largest


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    """F32, F16 or BF16."""
    shape: tuple[int, ...]
    blocks: Iterable[Floats]
    """All its rows, in any number of blocks."""


def write_safetensors(path: Path, tensors: Sequence[NewTensor]) -> None:
    """Write a safetensors file block by block; it gets its name only when it is whole.

    Args:
        path: Target; `path` with `.part` behind it is used on the way.
        tensors: In the order of writing.

    Raises:
        ModelError: A finite value is too large for f16.
    """
    # transformers asks for this word.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in tensors:
        assert one.name not in header, f"{one.name} occurs twice"
        end = offset + math.prod(one.shape) * VALUE_BYTES[one.dtype]
        header[one.name] = {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for one in tensors:
                rows = 0
                for block in one.blocks:
                    assert block.shape[1:] == one.shape[1:], f"{one.name} gets {block.shape}"
                    file.write(encode_values(block, one.dtype, one.name).data)
                    rows += len(block)
                assert rows == one.shape[0], f"{one.name} has {rows} of {one.shape[0]} rows"
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
