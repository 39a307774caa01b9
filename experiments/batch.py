"""Decode a file of prompts of any length: in shards, through kills, in order.

    python -m experiments.batch --input prompts.jsonl --output runs/job
    python -m experiments.batch --input prompts.jsonl --output runs/job --shard 2/5
    python -m experiments.batch --input prompts.jsonl --output runs/job --merge

The same command goes on after a kill at any moment: rows that are there stay as they
are. Each shard may run on a machine of its own; --merge, when all have ended, writes
results.jsonl in the order of the input. Its bytes do not depend on the number of
shards, on the order or on restarts (docs/jobs.md says what they do depend on). A job of
one shard merges by itself. A line that is damaged, or a prompt that is refused, has a
row with "error" and stops nothing.
"""

from __future__ import annotations

import pathlib
import sys
import time
from dataclasses import dataclass

from experiments import fingerprint, job_input, job_rows, launch, record, signals
from experiments.decoder import BatchConfig, Decoder
from experiments.job_input import Shard
from experiments.options import Writes, option
from sparsespec_jax import sizes

_METRICS_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class JobOptions(Writes):
    """Where a job reads and writes; nothing of it is in its rows."""

    input: str = option("", "A .jsonl or .parquet file of prompts.")
    shard: str = option("1/1", "i/n: only every n-th prompt, from the i-th on.")
    merge: bool = option(False, "Only put the rows of all shards in order.")
    parquet: bool = option(False, "Write the merged rows as .parquet too.")
    window: int = option(
        4096, "How many prompts may be begun behind an unfinished one.", at_least=1
    )


class Job:
    """A shard that is ready to run: all that can be checked is.

    Args:
        options: JobOptions.
        config: BatchConfig.
        make_decoder: what makes the Decoder of the config.

    Raises:
        ValueError: something does not fit; nothing was written then.
    """

    def __init__(self, options, config, *, make_decoder=Decoder):
        if not options.input:
            raise ValueError("--input is missing: a .jsonl or .parquet file of prompts")
        self._options, self._shard = options, Shard.parse(options.shard)
        job_input.check(options.input)
        inputs = {"launcher": "batch", "input": job_input.hash_of(options.input)}
        path = job_rows.shard_path(options.output, self._shard)
        kept = dict(config=config.recorded(), resume=path.is_dir())
        record.check(path, inputs=inputs, **kept)  # before a model is loaded
        signals.resumable("the same command goes on")
        self._decoder = make_decoder(config)
        model = self._decoder.model
        impl = sizes.resolve_impl(config.impl or None)
        inputs |= fingerprint.of_run("batch", model, impl=impl)
        self.directory = job_rows.JobDirectory(
            path, config=config.recorded(), inputs=inputs, shard=self._shard,
            num_samples=config.n,
        )  # fmt: skip
        self._num_samples = config.n

    def run(self) -> dict:
        """Decode what is missing; the summary of the shard, which is written too."""
        directory = self.directory
        if (directory.path / "summary.json").exists():
            print(f"{directory.path} is finished", file=sys.stderr)
            return record.read_json(directory.path / "summary.json")
        directory.write_environment(record.describe_environment())
        missing = directory.places.missing
        tasks = job_input.read(self._options.input, self._shard, missing)
        total = []  # of the prompts in the input, once they are read
        with signals.at_end(self._write_metrics), signals.at_end(directory.flush):
            self._decode(_until_total(tasks, total))
        directory.flush()
        self._write_metrics()
        return self._summarise(*total)

    def _decode(self, tasks):
        """Append the rows of Tasks as they come."""
        written = time.monotonic()
        rows = self._decoder.rows(tasks, window=self._options.window)
        while True:
            with signals.deferred():  # a step, and all that is recorded of it
                found = next(rows, None)
                if found is None:
                    return
                self.directory.add(found)
                if time.monotonic() - written > _METRICS_SECONDS:
                    self._write_metrics()
                    written = time.monotonic()

    def _write_metrics(self):
        decoder = self._decoder
        values = {"seconds": decoder.seconds, "errors": decoder.num_errors}
        self.directory.write_metrics(values | {"total": decoder.metrics.to_dict()})

    def _summarise(self, num_prompts):
        shard, places = self._shard, self.directory.places
        own = len(range(shard.number - 1, num_prompts, shard.count))
        metrics = [
            record.read_json(p) for p in self.directory.path.glob("metrics*.json")
        ]
        summary = {
            "experiment": "batch",
            "prompts": num_prompts,
            "rows_wanted": own * self._num_samples,
            "rows_found": places.count,
            "errors": job_rows.count_errors(self.directory.path),
            "seconds": sum(found["seconds"] for found in metrics),
        }
        self.directory.write_summary(summary)
        return summary


def _until_total(tasks, total):
    """The Tasks; what comes behind them joins `total`."""
    for task in tasks:
        if isinstance(task, int):
            total.append(task)
        else:
            yield task


def _main(options, config):
    with launch.checking():
        if not options.merge:
            job = Job(options, config)
    if not options.merge:
        with job.directory:
            summary = job.run()
        count = Shard.parse(options.shard).count
        _tell(summary, f"shard {options.shard}")
        if count > 1:
            print("When all shards have ended, the same command with --merge")
            return
    with launch.checking():
        summary = job_rows.merge(options.output)
        path = pathlib.Path(options.output) / "results.jsonl"
        if options.parquet:
            path = job_rows.write_parquet(path)
    _tell(summary, "job")
    print(f"Results: {path}")


def _tell(summary, what):
    print(f"{what}: {summary['rows_found']} of {summary['rows_wanted']} rows")
    if errors := summary["errors"]:
        print(f'{errors} rows have an "error" in place of an output', file=sys.stderr)


if __name__ == "__main__":
    launch.run(_main, JobOptions, BatchConfig)
