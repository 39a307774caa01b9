"""The head of a GGUF file: its metadata and where its tensors are.

Layout (versions 2 and 3, little-endian): magic, version, number of tensors, number of
metadata; the metadata (key, type, value); of each tensor its name, sizes, type and
offset; then the tensors. Written for whole vocabularies at a time: the gguf package
takes nine seconds for the 300,000 texts of one.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sparsespec_jax.models.fields import shown

_VERSIONS = (2, 3)
_KIND = gguf.GGUFValueType
_NUMBERS = {
    _KIND.UINT8: "<u1", _KIND.INT8: "<i1", _KIND.BOOL: "?", _KIND.UINT16: "<u2",
    _KIND.INT16: "<i2", _KIND.UINT32: "<u4", _KIND.INT32: "<i4", _KIND.UINT64: "<u8",
    _KIND.INT64: "<i8", _KIND.FLOAT32: "<f4", _KIND.FLOAT64: "<f8",
}  # fmt: skip
_ALIGNMENT = "general.alignment"


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where a tensor is in its file, and as what it is stored."""

    path: Path
    name: str
    shape: tuple[int, ...]  # [out, in] order
    kind: gguf.GGMLQuantizationType
    offset: int  # bytes from the beginning of the file

    @property
    def block(self) -> tuple[int, int]:
        """(values, bytes) of what is quantised together."""
        return gguf.GGML_QUANT_SIZES[self.kind]

    @property
    def num_blocks(self) -> int:
        """Blocks, which follow each other row by row."""
        return math.prod(self.shape) // self.block[0]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.num_blocks * self.block[1]


@dataclass(frozen=True, kw_only=True)
class GgufIndex:
    """What the head of one file says."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_index(path: Path) -> GgufIndex:
    """The index of the file at path.

    Raises:
        ValueError: it is not GGUF, damaged, or shorter than its index says.
    """
    try:
        with path.open("rb") as file:
            # Mapped, as nobody says where the head ends.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Head(path, content).index()
    except _DamagedText as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes surface as errors of many kinds
        raise ValueError(
            f"{path} cannot be read as GGUF: it is truncated or damaged "
            f"({path.stat().st_size} bytes; {error}); fetch it again"
        ) from error


class _DamagedText(Exception):
    """Metadata that are no UTF-8."""


class _Head:
    """A place in the head of a file, from which values are read one after another."""

    def __init__(self, path: Path, content: mmap.mmap):
        self._path, self._content = path, content
        self._size, self._place = len(content), 0

    def index(self) -> GgufIndex:
        """What the whole head says."""
        if (magic := self._bytes(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}")
        version = self._number("<u4")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; versions 2 and 3 are known")
        num_tensors, num_metadata = self._count(), self._count()
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self._text()
            if key in metadata:
                raise ValueError(f"metadata {shown(key)} are there twice")
            try:
                metadata[key] = self._value(_KIND(self._number("<u4")))
            except UnicodeDecodeError as error:
                message = f"metadata {shown(key)} is no text: {error}"
                raise _DamagedText(message) from error
        found = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{_ALIGNMENT} is {shown(alignment)}, no power of two")
        start = -(-self._place // alignment) * alignment
        return GgufIndex(
            metadata=metadata,
            tensors=tuple(self._placed(tensor, start) for tensor in found),
        )

    def _tensor(self) -> dict[str, Any]:
        name = self._text()
        sizes = [self._number("<u8") for _ in range(self._number("<u4"))]
        kind = gguf.GGMLQuantizationType(self._number("<u4"))
        values, _ = gguf.GGML_QUANT_SIZES[kind]
        if not sizes or sizes[0] % values:
            raise ValueError(
                f"tensor {shown(name)} has rows of {shown(sizes[:1])} values, "
                f"{kind.name} has blocks of {values}"
            )
        offset = self._number("<u8")
        return dict(name=name, shape=tuple(sizes[::-1]), kind=kind, offset=offset)

    def _placed(self, found: dict[str, Any], start: int) -> GgufTensor:
        found["offset"] += start
        tensor = GgufTensor(path=self._path, **found)
        if tensor.offset + tensor.num_bytes > self._size:
            raise ValueError(
                f"tensor {shown(tensor.name)} ends at byte "
                f"{tensor.offset + tensor.num_bytes}"
            )
        return tensor

    def _value(self, kind: gguf.GGUFValueType) -> Any:
        if kind == _KIND.STRING:
            return self._text()
        if kind != _KIND.ARRAY:
            return self._number(_NUMBERS[kind])
        of, count = _KIND(self._number("<u4")), self._count()
        if of == _KIND.STRING:
            return self._texts(count)
        if of == _KIND.ARRAY:
            raise ValueError("an array of arrays, which no known key has")
        dtype = np.dtype(_NUMBERS[of])
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()

    def _texts(self, count: int) -> list[str]:
        """So many texts; the loop that most of the reading takes place in."""
        content, place, found = self._content, self._place, []
        unpack, size = struct.Struct("<Q").unpack_from, self._size
        for _ in range(count):
            start = place + 8
            place = start + unpack(content, place)[0]
            if place > size:
                raise ValueError("the file ends amid a text")
            found.append(content[start:place].decode())
        self._place = place
        return found

    def _text(self) -> str:
        return self._texts(1)[0]

    def _count(self) -> int:
        """A number of things to come, each of at least a byte."""
        if (count := self._number("<u8")) > self._size - self._place:
            raise ValueError(f"the file ends amid {count} values")
        return count

    def _number(self, dtype: str) -> Any:
        dtype = np.dtype(dtype)
        return np.frombuffer(self._bytes(dtype.itemsize), dtype)[0].item()

    def _bytes(self, count: int) -> bytes:
        end = self._place + count
        if end > self._size:
            raise ValueError("the file ends amid its index")
        self._place = end
        return self._content[end - count : end]
