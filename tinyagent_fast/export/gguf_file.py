"""Headers of GGUF files, read and written byte for byte, without mapping the file into memory.

The gguf package reads through a memory map and builds an object for every vocabulary entry; here
metadata stays as raw bytes, so a copy of it is exact, and tensors are read where they are wanted.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little endian).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tinyagent_fast.errors import ModelError

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = 32

Value = str | int | float | bool | list["Value"]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """Rows first, so the last number is the row length."""
    type: str
    offset_bytes: int
    """From the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Size of one row as stored."""
        return stored_bytes(self.type, self.shape[-1])

    @property
    def rows(self) -> int:
        """Number of rows; 1 for a vector."""
        return prod(self.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A file's metadata as raw bytes, and its table of tensors in file order."""

    path: Path
    entries: Mapping[str, bytes]
    """Type and value of each key, as they stand in the file."""
    tensors: Mapping[str, GgufTensor]

    def value(self, key: str) -> Value | None:
        """Decode one metadata value.

        Args:
            key: Its key, such as `llama.block_count`.

        Returns:
            The value; None where the file has no such key.
        """
        raw = self.entries.get(key)
        if raw is None:
            return None
        cursor = _Cursor(io.BytesIO(raw), len(raw), self.path)
        return cursor.value(cursor.number("<I"))


def stored_bytes(type_name: str, values: int) -> int:
    """Return how many bytes a run of values takes.

    Args:
        type_name: ggml type, such as `Q4_K`.
        values: How many values, a multiple of the type's block.

    Returns:
        Bytes.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return values // int(block) * int(size)


def read_gguf(path: Path) -> GgufFile:
    """Read a file's header.

    Args:
        path: A GGUF file.

    Returns:
        Its metadata and tensor table.

    Raises:
        ModelError: If it is missing, no GGUF file of a version known here, or cut short.
    """
    if not path.is_file():
        raise ModelError(f"GGUF file {path}", "there is no such file", "export it first")
    with path.open("rb") as file:
        cursor = _Cursor(file, path.stat().st_size, path)
        if cursor.take(4) != b"GGUF" or cursor.number("<I") not in (2, 3):
            raise ModelError(str(path), "it is no GGUF file of version 2 or 3", "give a .gguf file")
        tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
        entries = {}
        for _ in range(key_count):
            key = cursor.text()
            start = file.tell()
            cursor.skip(cursor.number("<I"))
            length = file.tell() - start
            file.seek(start)
            entries[key] = cursor.take(length)
        tensors = [_read_tensor(cursor) for _ in range(tensor_count)]
        head_bytes = file.tell()
    alignment = GgufFile(path=path, entries=entries, tensors={}).value("general.alignment")
    step = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
    data_start = head_bytes + -head_bytes % step
    placed = {
        tensor.name: replace(tensor, offset_bytes=data_start + tensor.offset_bytes)
        for tensor in tensors
    }
    for tensor in placed.values():
        if tensor.offset_bytes + tensor.rows * tensor.row_bytes > path.stat().st_size:
            raise cursor.cut(f"tensor {tensor.name} ends behind the end of the file")
    return GgufFile(path=path, entries=entries, tensors=placed)


def header_bytes(
    entries: Mapping[str, bytes], tensors: Sequence[tuple[str, tuple[int, ...], str]]
) -> bytes:
    """Build everything that stands before the tensors' data.

    Args:
        entries: Metadata in order, values from `GgufFile.entries` or `encode_value`.
        tensors: Name, shape (rows first) and ggml type of each tensor, in the order of their data.

    Returns:
        The header, padded so that data can follow at once.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(entries))]
    for key, raw in entries.items():
        parts += [_text(key), raw]
    offset = 0
    for name, shape, type_name in tensors:
        parts += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts.append(struct.pack("<IQ", GGMLQuantizationType[type_name], offset))
        size = stored_bytes(type_name, prod(shape))
        offset += size + len(padding(size))
    header = b"".join(parts)
    return header + bytes(-len(header) % _ALIGNMENT)


def padding(size_bytes: int) -> bytes:
    """Return the zeros that follow a tensor, so that the next one is aligned.

    Args:
        size_bytes: Size of the tensor's data.

    Returns:
        0 to 31 zero bytes.
    """
    return bytes(-size_bytes % _ALIGNMENT)


def encode_value(value: str | int | Sequence[str]) -> bytes:
    """Encode a metadata value with its type.

    Args:
        value: Text, a number that fits uint32, or a list of texts.

    Returns:
        What stands behind a key in the file.
    """
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
    return head + b"".join(map(_text, value))


class _Cursor:
    """Reads numbers and texts from the front of a file and says so where it ends too early."""

    def __init__(self, file: BinaryIO, size_bytes: int, path: Path) -> None:
        """Start where the file stands.

        Args:
            file: Opened for reading bytes.
            size_bytes: Its size; longer lengths inside it are not believed.
            path: Named in errors.
        """
        self._file = file
        self._size_bytes = size_bytes
        self._path = path

    def take(self, count: int) -> bytes:
        """Return the next bytes, all of them or an error."""
        if count > self._size_bytes - self._file.tell():
            raise self.cut("its header ends behind the end of the file")
        return self._file.read(count)

    def cut(self, why: str) -> ModelError:
        """Build the error for a file that is not whole."""
        return ModelError(f"GGUF file {self._path}", why, "write or download the file again")

    def number(self, form: str) -> int:
        """Return the next integer."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def text(self) -> str:
        """Return the next text."""
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Value:
        """Decode the next value of a kind."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            return [self.value(inner) for _ in range(count)]
        form = self._form(kind)
        value: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def skip(self, kind: int) -> None:
        """Go past the next value of a kind without decoding it."""
        if kind == _STRING:
            self.take(self.number("<Q"))
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SCALARS:
                self.take(count * struct.calcsize(_SCALARS[inner]))
            else:
                for _ in range(count):
                    self.skip(inner)
        else:
            self.take(struct.calcsize(self._form(kind)))

    def _form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.cut(f"it holds a value of the unknown kind {kind}")
        return _SCALARS[kind]


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """Read one line of the tensor table; the offset still counts from where the data starts."""
    name = cursor.text()
    shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
    while len(shape) > 1 and shape[0] == 1:  # ggml does not count such dimensions.
        shape = shape[1:]
    kind = cursor.number("<I")
    try:
        type_name = GGMLQuantizationType(kind).name
    except ValueError:
        raise cursor.cut(f"tensor {name} has the unknown type {kind}") from None
    return GgufTensor(name=name, shape=shape, type=type_name, offset_bytes=cursor.number("<Q"))


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
