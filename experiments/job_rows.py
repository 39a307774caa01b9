"""Rows of a job: appended as they come, found again after a kill, merged in order.

A shard has a run directory of its own. Rows come nearly in order: no prompt is begun
further than a window behind the oldest one that is unfinished. So what is known of a
million rows is a low mark below which all are there, and the few above it: memory does
not grow with the job, neither while it runs nor when it goes on or is merged.
"""

from __future__ import annotations

import heapq
import json
import pathlib
import re
import time

from experiments import record, signals
from experiments.job_input import Shard, pyarrow_of

_ENCODE = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
_PLACE = re.compile(rb'\{"index": (\d+), "sample": (\d+), ')
_MOST_ROWS = 1000  # that are kept back
_MOST_SECONDS = 0.5  # for which they are
_SYNC_SECONDS = 5.0  # between two waits for the disk
_TABLE_ROWS = 4096  # of a Parquet file that are in memory at once


class Places:
    """Which samples of a shard are there: all below a mark, and some above it."""

    def __init__(self, shard, num_samples):
        self._shard, self._num_samples = shard, num_samples
        self._mark, self._above = 0, set()
        self.count = 0

    def _number(self, index, sample):
        return index // self._shard.count * self._num_samples + sample

    def add(self, index, sample):
        """Note a sample; ValueError if it is none of the shard, or there twice."""
        number = self._number(index, sample)
        if index not in self._shard or sample >= self._num_samples:
            raise ValueError(f"prompt {index}, sample {sample} is none of this shard")
        if number < self._mark or number in self._above:
            raise ValueError(f"prompt {index}, sample {sample} is there twice")
        self.count += 1
        self._above.add(number)
        while self._mark in self._above:
            self._above.remove(self._mark)
            self._mark += 1

    def missing(self, index):
        """The samples of a prompt that are not there, a tuple."""
        first = self._number(index, 0)
        if first + self._num_samples <= self._mark:
            return ()
        numbers = range(first, first + self._num_samples)
        return tuple(
            number - first
            for number in numbers
            if number >= self._mark and number not in self._above
        )


class JobDirectory(record.RunDirectory):
    """The run directory of a shard; goes on with what is there.

    Attributes:
        places: the Places of its rows.
    """

    def __init__(self, path, *, config, inputs, shard, num_samples):
        self.places = Places(shard, num_samples)
        self._waiting, self._written = [], time.monotonic()
        self._synced = self._written
        resume = pathlib.Path(path).is_dir()
        super().__init__(path, config=config, inputs=inputs, resume=resume)

    def _recovered(self, file):
        """Nothing is kept but the places."""
        end = 0
        with open(file.name, "rb") as lines:  # `file` has no buffer: a call a byte
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.places.add(*place_of(line))
                except ValueError as error:
                    where = f"{self.path}/results.jsonl:{number}"
                    raise record.RunError(f"{where} is damaged: {error}") from None
                end += len(line)
        file.truncate(end)
        file.seek(end)
        return []

    def add(self, rows):
        """Append rows, soon if not now; `flush` says when."""
        for row in rows:
            self.places.add(row["index"], row["sample"])
            self._waiting.append(_ENCODE(row))
        late = time.monotonic() - self._written > _MOST_SECONDS
        if late or len(self._waiting) >= _MOST_ROWS:
            self.flush(sync=time.monotonic() - self._synced > _SYNC_SECONDS)

    def flush(self, *, sync=True):
        """Append what was kept back; it survives a kill once this returns.

        With `sync` it survives the machine, too.
        """
        with signals.deferred():
            lines, self._waiting = self._waiting, []
            record.append_lines(self._file, lines, sync=sync)
            self._written = time.monotonic()
            self._synced = self._written if sync else self._synced

    def write_metrics(self, metrics):
        """Write the totals of this session so far."""
        number = self.session
        name = f"metrics.resume{number}.json" if number else "metrics.json"
        record.write_json(self.path / name, metrics)


def place_of(line):
    """(index, sample) of a line of results.jsonl; ValueError if it is none."""
    found = _PLACE.match(line)
    if found is None or line[-2:] != b"}\n":
        raise ValueError("it is no row of a job")
    return int(found[1]), int(found[2])


def count_errors(path):
    """Rows of a run directory that have an error in place of an output."""
    with open(pathlib.Path(path) / "results.jsonl", "rb") as file:
        return sum("error" in json.loads(x) for x in file if b'"error": ' in x)


# -- merging ---------------------------------------------------------------------------


def shard_path(output, shard):
    """The run directory of a shard."""
    return pathlib.Path(output) / f"shard-{shard.number}-of-{shard.count}"


def merge(output) -> dict:
    """Write results.jsonl of all shards below `output`, in the order of the input.

    Returns the summary of the whole job, which is written too.

    Raises:
        RunError: a shard is missing, unfinished, damaged, or of another job.
    """
    shards = _shards_of(output)
    for shard in shards:
        _check_same_job(shard_path(output, shards[0]), shard_path(output, shard))
    summaries = [_finished(output, shard) for shard in shards]
    readers = [_in_order(shard_path(output, shard), shard) for shard in shards]
    path = pathlib.Path(output) / "results.jsonl"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        for _, line in heapq.merge(*readers):
            file.write(line)
    temporary.replace(path)
    names = "rows_wanted", "rows_found", "errors", "seconds"
    totals = {name: sum(found[name] for found in summaries) for name in names}
    summary = summaries[0] | totals | {"shards": len(shards)}
    record.write_json(path.with_name("summary.json"), summary)
    return summary


def _shards_of(output):
    """All shards of the job in a folder."""
    found = sorted(
        (int(match[2]), int(match[1]))
        for path in pathlib.Path(output).glob("shard-*")
        if (match := re.fullmatch(r"shard-(\d+)-of-(\d+)", path.name))
    )
    counts = {count for count, _ in found}
    if not found:
        raise record.RunError(f"{output} holds no shard to merge")
    if len(counts) > 1:
        raise record.RunError(
            f"{output} holds shards of {' and of '.join(map(str, sorted(counts)))}: "
            "keep those of one job"
        )
    (count,) = counts
    numbers = {number for _, number in found}
    if missing := sorted(set(range(1, count + 1)) - numbers):
        raise record.RunError(
            f"{output} lacks shard {missing[0]}/{count}: run it first"
        )
    return [Shard(number, count) for number in range(1, count + 1)]


def _check_same_job(path, other):
    """RunError unless two shards have the same options, prompts and model."""
    for name in ("config.json", "inputs.json"):
        own, same = record.read_json(path / name), record.read_json(other / name)
        names = sorted(same.keys() | own.keys())
        if changed := record.differences(own, same, names):
            raise record.RunError(f"{other} is of another job than {path}: {changed}")


def _finished(output, shard):
    """The summary of a shard; RunError if it is unfinished."""
    path = shard_path(output, shard)
    if not (path / "summary.json").exists():
        raise record.RunError(f"shard {shard} is unfinished: start it again first")
    return record.read_json(path / "summary.json")


def _in_order(path, shard):
    """((index, sample), line) of the rows of a finished shard, in order."""
    config = record.read_json(path / "config.json")
    expected, ahead = (shard.number - 1, 0), []
    with open(path / "results.jsonl", "rb") as file:
        for line in file:
            heapq.heappush(ahead, (place_of(line), line))
            while ahead and ahead[0][0] == expected:
                yield heapq.heappop(ahead)
                index, sample = expected
                is_last = sample + 1 == config["n"]
                expected = (index + shard.count, 0) if is_last else (index, sample + 1)
    if ahead:
        raise record.RunError(f"{path}: prompt {expected[0]} is missing")


# -- Parquet ---------------------------------------------------------------------------

_TEXTS = "id", "text", "finish_reason", "stop_reason", "error"
_LISTS = {"prompt_token_ids": "int32", "token_ids": "int32"}
_LISTS |= {"logprobs": "float64", "prompt_logprobs": "float64"}
_NUMBERS = {"index": "int64", "sample": "int32", "seed": "int64"}
_NUMBERS |= {"num_prompt_tokens": "int32"}


def write_parquet(path) -> pathlib.Path:
    """Write the rows of a results.jsonl beside it as Parquet; the path of the file.

    Columns are the same for every job; keys of a prompt's line are a JSON object in the
    column "rest".
    """
    pa = pyarrow_of("writing .parquet")
    fields = [(name, getattr(pa, kind)()) for name, kind in _NUMBERS.items()]
    fields += [(name, pa.string()) for name in _TEXTS]
    fields += [(name, pa.list_(getattr(pa, kind)())) for name, kind in _LISTS.items()]
    schema = pa.schema([*fields, ("rest", pa.string())])
    path = pathlib.Path(path)
    temporary, target = path.with_suffix(".tmp"), path.with_suffix(".parquet")
    with (
        pa.parquet.ParquetWriter(temporary, schema) as writer,
        open(path, "rb") as file,
    ):
        rows = []
        for line in file:
            rows.append(_cells(json.loads(line), schema.names))
            if len(rows) == _TABLE_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
    temporary.replace(target)
    return target


def _cells(row, names):
    """The cells of a row: texts of what may be text or number, and the rest."""
    cells = {name: row.pop(name) for name in names if name in row}
    for name in ("id", "stop_reason"):
        value = cells.get(name)
        if value is not None and not isinstance(value, str):
            cells[name] = json.dumps(value)
    return cells | {"rest": _ENCODE(row)}
