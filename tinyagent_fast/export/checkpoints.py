"""Read and write the weights of a model folder without holding them: rows in, rows out.

Plain reads and writes, block by block, so that the size of a model does not decide how much memory
an export needs. The safetensors package writes only whole files from memory and gives bf16 only
through torch, so it checks headers here and no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tinyagent_fast.errors import ModelError, printable
from tinyagent_fast.prompts.loading import hub_folder, read_model_json, refuse_pickles
from tinyagent_fast.runs import whole_file

Floats = NDArray[np.float32]

VALUE_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""The number formats that a model can be exported from, with the bytes of one value."""

BLOCK_BYTES = 2**20
"""Size of a block of rows as float32: small beside a tensor, large beside the cost of a call."""

# Numbers from here on are nearer to 2**16 than to 65504, and 2**16 is f16's infinity.
_INFINITE_F16 = 65520.0

_FILES = ("*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja")
INDEX = "model.safetensors.index.json"
"""Of a model in several files: which tensor is in which."""
_SINGLE = "model.safetensors"


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
    def values(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """What it takes in its file."""
        return self.values * VALUE_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its config and its tensors by name, over all files."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def base_folder(base: str, revision: str | None) -> Path:
    """Find a base model's folder; what training has put into the hub's cache needs no network.

    Raises:
        ModelError: There is no such folder, and neither the cache nor the hub has it.
    """
    return hub_folder("base model", base, revision, _FILES, cached_first=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a model folder and check that all its weights are there, whole and not quantised.

    No weights are read yet.

    Raises:
        ModelError: The folder holds no whole model in safetensors with float weights.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"folder {folder}",
            "it holds an adapter, which is only the difference to a base model",
            "merge it with its base model first, and name the merged folder",
        )
    config = read_model_json(folder / "config.json")
    if quantised := config.get("quantization_config"):
        method = dict(quantised).get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"model in {folder}",
            f"its weights are quantised ({method}), and rounding them again would cost quality",
            "name the folder of the same model in bf16, f16 or f32",
        )
    if (folder / INDEX).exists():
        return Checkpoint(folder, config, _open_shards(folder))
    if (folder / _SINGLE).exists():
        return Checkpoint(folder, config, stored_tensors(folder / _SINGLE))
    refuse_pickles(folder)
    why = f"it has neither {_SINGLE} nor {INDEX}"
    raise ModelError(f"folder {folder}", why, "copy the weights into it")


def _open_shards(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of all shards, and hold them against the index."""
    where = read_model_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ModelError(f"{folder / INDEX}", "it has no weight_map", "copy the file again")
    for name in where.values():
        plain = isinstance(name, str) and name == Path(name).name and "\0" not in name
        if not plain or name in ("", ".."):
            why = f"it names the file {name!r:.80}, which is no name of a file beside it"
            raise ModelError(f"{folder / INDEX}", why, "copy the file again")
    shards = sorted(set(where.values()))
    if absent := [name for name in shards if not _is_there(folder / name)]:
        listed = ", ".join(printable(name, one_line=True)[:80] for name in absent)
        why = f"its index names files that are not there: {listed}"
        raise ModelError(f"folder {folder}", why, "copy the missing files into it")
    headers = {name: stored_tensors(folder / name) for name in shards}
    for tensor, shard in where.items():
        if tensor not in headers[shard]:
            raise ModelError(
                f"{folder / shard}",
                f"the index says that it holds {tensor}, and it does not",
                "copy the index and the shards from the same model",
            )
    return {tensor: headers[shard][tensor] for tensor, shard in where.items()}


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: a model's, a shard's or an adapter's.

    Raises:
        ModelError: The file is cut off or damaged, or a tensor is not F32, F16 or BF16.
    """
    try:
        with safe_open(path, "np"):  # it holds the header against the size of the file
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in VALUE_BYTES:
            raise ModelError(
                f"tensor {name} in {path}",
                f"it is stored as {entry['dtype']}, so the weights are quantised or of an unknown "
                "kind",
                "name the folder of the same model in bf16, f16 or f32",
            )
        tensors[name] = StoredTensor(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            path=path,
            offset_bytes=8 + length + entry["data_offsets"][0],
        )
    return tensors


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path}", why, "copy or download the file again")


def read_rows(tensor: StoredTensor, start: int, stop: int) -> Floats:
    """Read rows from `start` to before `stop` as float32, which holds all three formats exactly.

    A row is one element for a tensor of one dimension.

    Raises:
        ModelError: The file has become shorter since it was opened.
    """
    assert 0 <= start <= stop <= tensor.rows, f"rows {start}..{stop} of {tensor.shape}"
    row_bytes = tensor.size_bytes // tensor.rows
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset_bytes + start * row_bytes)
        stored = np.fromfile(file, np.uint8, (stop - start) * row_bytes)
    if stored.size != (stop - start) * row_bytes:
        raise _damaged(tensor.path, f"it ends within {tensor.name}")
    rows: NDArray[Any] = stored.view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype])
    if tensor.dtype == "BF16":
        # It is the upper half of a float32. Shifted in place, which takes a third of gguf's time.
        bits = rows.astype(np.uint32)
        bits <<= 16
        rows = bits.view(np.float32)
    return rows.astype(np.float32, copy=False).reshape(stop - start, *tensor.shape[1:])


def row_blocks(tensor: StoredTensor, *, multiple_of_rows: int = 1) -> Iterator[tuple[int, Floats]]:
    """Read a tensor in blocks of about `BLOCK_BYTES`: give the first row of each, and its rows.

    `multiple_of_rows` stay in one block, such as the rows of an attention head.
    """
    unit_bytes = 4 * tensor.values // max(1, tensor.rows) * multiple_of_rows
    step = max(1, BLOCK_BYTES // max(1, unit_bytes)) * multiple_of_rows
    for start in range(0, tensor.rows, step):
        yield start, read_rows(tensor, start, min(start + step, tensor.rows))


def encode_values(block: Floats, dtype: str, name: str) -> NDArray[Any]:
    """Round float32 values to F32, F16 or BF16, to the nearest with ties to even.

    Its bytes are the stored ones. The name is that of the tensor, for messages.

    Raises:
        ModelError: A value is too large for f16.
    """
    if dtype == "F16":
        # NaN is passed over; infinity counts as too large.
        ends = np.fmax.reduce(block, axis=None), -np.fmin.reduce(block, axis=None)
        largest = np.fmax(*ends)
        if largest >= _INFINITE_F16:
            raise ModelError(
                f"tensor {name}",
                f"{largest:g} is beyond the largest f16 number, 65504",
                "write the model as bf16 or f32",
            )
    stored: NDArray[Any] = quants.quantize(np.ascontiguousarray(block), GGMLQuantizationType[dtype])
    return stored


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

    Raises:
        ModelError: A value is too large for f16.
    """
    # transformers asks for this word.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in tensors:
        assert one.name not in header, f"{one.name} occurs twice"
        end = offset + math.prod(one.shape) * VALUE_BYTES[one.dtype]
        offsets = [offset, end]
        header[one.name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": offsets}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in tensors:
            rows = 0
            for block in one.blocks:
                assert block.shape[1:] == one.shape[1:], f"{one.name} gets {block.shape}"
                file.write(encode_values(block, one.dtype, one.name).data)
                rows += len(block)
            assert rows == one.shape[0], f"{one.name} has {rows} of {one.shape[0]} rows"
