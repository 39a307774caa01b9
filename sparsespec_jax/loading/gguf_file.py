"""GGUF files on disk: metadata by key and tensors by name, of one file or its parts."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np

from sparsespec_jax.loading.gguf_index import GgufIndex, GgufTensor, read_index
from sparsespec_jax.models.fields import Fields, shown

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.I)
# Values that a thread dequantises at a time: what it makes of them on the way stays in
# its core's cache, and each step is long enough for the others to get their turn.
_CHUNK = 1 << 18
_MAX_THREADS = 16
_CACHE_LINE = 64


class GgufFile:
    """An open GGUF model; its tensors are read on demand.

    A path whose name ends in -00001-of-00003.gguf stands for all parts, whichever of
    them it is. The metadata are those of the first.

    Raises:
        ValueError: a file is not GGUF, shorter than its own index says, or one of
            several parts of which another is missing or of another model.
    """

    def __init__(self, path: str | Path):
        """Read the indices of the files."""
        paths = part_paths(Path(path))
        self.path = paths[0]
        indices = [read_index(part) for part in paths]
        self.fields = Fields(self.path, indices[0].metadata)
        self.tensors: dict[str, GgufTensor] = {}
        for number, (part, index) in enumerate(zip(paths, indices, strict=True)):
            _require_part(part, index, number=number, count=len(paths))
            for tensor in index.tensors:
                if tensor.name in self.tensors:
                    home = self.tensors[tensor.name].path.name
                    raise ValueError(
                        f"{part}: tensor {tensor.name} is in {home} as well"
                    )
                self.tensors[tensor.name] = tensor
        total = self.fields.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise self.fields.refusal(
                "split.tensors.count", f"{len(self.tensors)}, the tensors of all parts"
            )

    def tensor(self, name: str, dtype=np.float32) -> np.ndarray:
        """The tensor, dequantised in float32 and cast to dtype, in [out, in] order.

        Its bytes are read piece by piece, by several threads: nothing of the file stays
        in memory.

        Raises:
            ValueError: its type cannot be dequantised, or the file was cut meanwhile.
        """
        tensor = self.tensors[name]
        values = _aligned(tensor.shape, dtype)
        flat, (width, num_bytes) = values.reshape(-1), tensor.block
        step = max(1, _CHUNK // width)

        def fill(first: int) -> None:
            count = min(step, tensor.num_blocks - first)
            start = tensor.offset + first * num_bytes
            # Not mapped: a file that is cut by now would end the process.
            stored = os.pread(descriptor, count * num_bytes, start)
            if len(stored) < count * num_bytes:
                raise ValueError(f"{self.origin(name)} is cut: the file has changed")
            found = self._dequantise(stored, tensor)
            flat[first * width : (first + count) * width] = found

        with tensor.path.open("rb") as file, ThreadPoolExecutor(_num_threads()) as pool:
            descriptor = file.fileno()
            list(pool.map(fill, range(0, tensor.num_blocks, step)))
        return values

    def origin(self, name: str) -> str:
        """What errors call a tensor."""
        return f"{self.tensors[name].path}: tensor {name}"

    def _dequantise(self, stored: bytes, tensor: GgufTensor) -> np.ndarray:
        # As one row: the package would take sixteen at a time, short ones too.
        row = np.frombuffer(stored, np.uint8)[None]
        try:
            return gguf.quants.dequantize(row, tensor.kind)[0]
        except NotImplementedError as error:
            raise ValueError(
                f"{self.origin(tensor.name)} is of type {tensor.kind.name}, which the "
                "gguf package cannot dequantise; use a file quantised otherwise (Q4_1, "
                "Q8_0, Q4_K, BF16, ...)"
            ) from error


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array that jax on a CPU can take over without a copy."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    space = np.empty(num_bytes + _CACHE_LINE, np.uint8)
    start = -space.ctypes.data % _CACHE_LINE
    return space[start : start + num_bytes].view(dtype).reshape(shape)


def _num_threads() -> int:
    """As many as there are cores for this process, where the system tells which."""
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return min(_MAX_THREADS, len(cores))


def part_paths(path: Path) -> list[Path]:
    """The files of the model that path is a file of, in order.

    Raises:
        ValueError: one of them is not there.
    """
    parts = [path]
    if (named := _PART.fullmatch(path.name)) is not None:
        count = int(named["count"])
        names = (f"{named['stem']}-{n:05}-of-{count:05}" for n in range(1, count + 1))
        parts = [path.with_name(name + path.suffix) for name in names]
        if path not in parts:
            raise ValueError(f"{path} is named as a part that cannot be: give another")
    for part in parts:
        if not part.is_file():
            whole = "" if len(parts) == 1 else f", one of {len(parts)} parts of a model"
            raise ValueError(f"there is no GGUF file at {part}{whole}")
    return parts


def models_in(directory: Path) -> list[Path]:
    """The GGUF models in a directory, one path each: a file, or the first of parts."""
    files = sorted(p for p in directory.glob("*") if p.suffix.lower() == ".gguf")
    first: dict[str, Path] = {}
    for path in files:
        named = _PART.fullmatch(path.name)
        model = path.name if named is None else f"{named['stem']}-of-{named['count']}"
        first.setdefault(model, path)
    return list(first.values())


def _require_part(path: Path, index: GgufIndex, *, number: int, count: int) -> None:
    """Raise unless a file's own account of which part it is fits its name."""
    stored = [index.metadata.get(key) for key in ("split.no", "split.count")]
    if count == 1 and stored[1] in (None, 0, 1):
        return
    if stored != [number, count]:
        raise ValueError(
            f"{path}: split.no and split.count are {shown(stored)}, but its name "
            f"stands for {[number, count]}: parts are found by their names, so give "
            "it the one that it was published with (...-00001-of-00002.gguf)"
        )
