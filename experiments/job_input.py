"""Prompts of a job: read one after the other, whatever the number, by any shard.

A prompt's place is its number among the lines that are not blank. A line that is no
prompt is one all the same, with what is wrong in place of the prompt: one damaged line
must not cost a job of a million.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator

from experiments.prompts import PromptLine, parse_json, parse_value

_LONGEST = 2**26  # bytes of a line
_BATCH = 1024  # rows of Parquet at a time
_SEED_BYTES = 6  # a number that every reader of JSON keeps whole


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """A prompt of a job.

    Attributes:
        index: its place in the input, from 0.
        line: the prompt, or None if there is none in the line.
        problem: what is wrong with the line, "" if nothing is.
        samples: which samples of it are wanted.
    """

    index: int
    line: PromptLine | None
    problem: str
    samples: tuple[int, ...]

    @property
    def id(self):
        """What the line says under "id", else its place."""
        return self.index if self.line is None else self.line.rest.get("id", self.index)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The prompts of one process of several: every n-th one."""

    number: int  # from 1
    count: int

    @classmethod
    def parse(cls, text):
        """The shard that "i/n" names; ValueError unless 1 <= i <= n."""
        number, _, count = text.partition("/")
        ok = number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)
        if not ok:
            raise ValueError(f"--shard is i/n with 1 <= i <= n, got {text!r}")
        return cls(int(number), int(count))

    def __contains__(self, index):
        return index % self.count == self.number - 1

    def __str__(self):
        return f"{self.number}/{self.count}"


def seed_of(seed: int, key) -> int:
    """The seed of the prompt with this id: of nothing else, wherever it stands."""
    text = f"{seed}/{json.dumps(key)}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=_SEED_BYTES).digest())


def hash_of(path) -> str:
    """Hash of a file's bytes; ValueError if it cannot be read."""
    found = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            while data := file.read(2**20):
                found.update(data)
    except OSError as error:
        raise ValueError(f"input: cannot read {path}: {error.strerror}") from None
    return found.hexdigest()


def check(path) -> None:
    """ValueError unless the name of a file says that `read` can read it."""
    suffix = pathlib.Path(path).suffix
    if suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"input: {path} must end in .jsonl or .parquet")
    if suffix == ".parquet":
        pyarrow_of("reading .parquet")


def pyarrow_of(purpose):
    """The module pyarrow; ValueError if it is missing."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f'{purpose} needs pyarrow: pip install -e ".[parquet]", or use .jsonl'
        ) from None
    return pyarrow


def read(path, shard: Shard, samples_of) -> Iterator[Task | int]:
    """The Tasks of a shard in order, then the number of prompts in the whole input.

    Args:
        path: a .jsonl file as `prompts.load_prompts` takes them, or a .parquet file
            with a column for each key.
        shard: which prompts.
        samples_of: the samples that are wanted of the prompt at a place; of none of
            them, the line is not looked at.
    """
    lines = _rows(path) if pathlib.Path(path).suffix == ".parquet" else _lines(path)
    count = 0
    for index, (number, line, parse) in enumerate(lines):
        count = index + 1
        if index in shard and (samples := samples_of(index)):
            try:
                found, problem = parse(line, f"line {number}"), ""
            except ValueError as error:
                found, problem = None, " ".join(str(error).split())
            yield Task(index, found, problem, samples)
    yield count


def _lines(path):
    """(number of the line, its bytes, how to parse it) of lines that are not blank."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST):
            number += 1
            is_long = len(line) == _LONGEST and line[-1:] != b"\n"
            while is_long and (more := file.readline(_LONGEST)):
                if more[-1:] == b"\n":
                    break
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if is_long:
                yield number, line, _refuse_long
            elif line.strip():
                yield number, line, _parse_bytes


def _parse_bytes(line, where):
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"prompts: {where} is not UTF-8 text") from None
    return parse_json(text, where)


def _refuse_long(line, where):
    raise ValueError(f"prompts: {where} has more than {_LONGEST} bytes")


def _rows(path):
    """The same of the rows of a Parquet file; what is null is not there."""
    file = pyarrow_of("reading .parquet").parquet.ParquetFile(path)
    number = 0
    for batch in file.iter_batches(_BATCH):
        for row in batch.to_pylist():
            number += 1
            yield number, {k: v for k, v in row.items() if v is not None}, parse_value
