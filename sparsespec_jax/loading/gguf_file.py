"""GGUF files on disk: metadata by key and tensors by name, of one file or its parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sparsespec_jax.models.fields import Fields, shown

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.I)


class GgufFile:
    """An open GGUF model; its tensors are read on demand.

    A path whose name ends in -00001-of-00003.gguf stands for all parts, whichever of
    them it is. The metadata are those of the first.

    Raises:
        ValueError: a file is not GGUF, shorter than its own index says, or one of
            several parts of which another is missing or of another model.
    """

    def __init__(self, path: str | Path):
        """Map the files and parse their indices."""
        paths = part_paths(Path(path))
        self.path = paths[0]
        readers = [_open(part) for part in paths]
        self.fields = _fields(self.path, readers[0])
        self.tensors: dict[str, Any] = {}
        self._homes: dict[str, Path] = {}
        for number, (part, reader) in enumerate(zip(paths, readers, strict=True)):
            _require_part(part, reader, number=number, count=len(paths))
            for tensor in reader.tensors:
                if tensor.name in self.tensors:
                    raise ValueError(
                        f"{part}: tensor {tensor.name} is in "
                        f"{self._homes[tensor.name].name} as well"
                    )
                self.tensors[tensor.name], self._homes[tensor.name] = tensor, part
        total = self.fields.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise self.fields.refusal(
                "split.tensors.count", f"{len(self.tensors)}, the tensors of all parts"
            )

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in float32, dequantised, in [out, in] order."""
        tensor = self.tensors[name]
        origin = self.origin(name)
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{origin} is of type {tensor.tensor_type.name}, which the gguf "
                "package cannot dequantise; use a file quantised otherwise (Q4_1, "
                "Q8_0, Q4_K, BF16, ...)"
            ) from error
        # A copy: float32 is a view of the mapped file, which jax would read after this
        # has returned. A file that is cut by then ends the process.
        return np.array(values, np.float32)

    def origin(self, name: str) -> str:
        """What errors call a tensor."""
        return f"{self._homes[name]}: tensor {name}"


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


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # damaged bytes surface as errors of many kinds
        raise ValueError(
            f"{path} cannot be read as GGUF: it is truncated or damaged "
            f"({path.stat().st_size} bytes; {error}); fetch it again"
        ) from error


def _fields(path: Path, reader: gguf.GGUFReader) -> Fields:
    """All metadata as Python values; a text that is no UTF-8 is refused by key."""
    values = {}
    for key in reader.fields:
        try:
            values[key] = reader.get_field(key).contents()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: metadata {shown(key)} is no text: {error}"
            ) from error
    return Fields(path, values)


def _require_part(
    path: Path, reader: gguf.GGUFReader, *, number: int, count: int
) -> None:
    """Raise unless a file's own account of which part it is fits its name."""
    fields = [reader.get_field(key) for key in ("split.no", "split.count")]
    stored = [None if field is None else field.contents() for field in fields]
    if count == 1 and stored[1] in (None, 0, 1):
        return
    if stored != [number, count]:
        raise ValueError(
            f"{path}: split.no and split.count are {shown(stored)}, but its name "
            f"stands for {[number, count]}: parts are found by their names, so give "
            "it the one that it was published with (...-00001-of-00002.gguf)"
        )
