"""The host's side of a job of a million prompts, with a step that takes no time.

    python -m experiments.job_cost
    python -m experiments.job_cost --num_prompts 10000 --num_shards 1

Everything of `experiments.batch` runs but the engine: lines are read, checked and
queued, rows are written, every process is killed half-way and started again, and the
shards are merged. Time is that of the slowest process, once the tiny model is there and
its hash is compiled; memory is the peak of a process, Python and JAX included.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import random
import resource
import time
from collections import deque
from dataclasses import dataclass

from experiments import drawing, experiment, fingerprint, job_rows, models, signals
from experiments.batch import Job, JobOptions
from experiments.decoder import BatchConfig, Decoder
from experiments.experiment import Experiment
from experiments.options import Options, option
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.results import DecodeResult

_KILLED = 9


@dataclass(frozen=True, kw_only=True)
class JobCostConfig(Options):
    """How many prompts, and in how many processes."""

    num_prompts: tuple[int, ...] = option(
        (100_000, 1_000_000), "Sizes of the job.", at_least=10
    )
    num_shards: int = option(2, "Processes at the same time.", at_least=1)
    prompt_tokens: int = option(16, "Of each prompt.", at_least=1)
    max_tokens: int = option(16, "Of each output.", at_least=1)
    num_slots: int = option(256, "Requests that a step ends.", at_least=1)


class FakeEngine:
    """Ends requests in a step, first come first served; tokens follow from the seed."""

    def __init__(self, model, *, speculation, engine):
        self._num_slots, self._vocab_size = engine.num_slots, model.config.vocab_size
        self._queue, self._metrics = deque(), RequestMetrics()

    def warm_up(self, **_):
        """Nothing to compile."""

    def take_metrics(self):
        """None: there is nothing to count."""
        return []

    def submit(self, prepared, *, prompt_index, progress=None):
        """Queue all samples of a prompt, or the one of a RequestProgress."""
        samples = range(prepared.sampling.n)
        for sample in samples if progress is None else [progress.sample_index]:
            self._queue.append((prepared, prompt_index, sample))

    def step(self):
        """DecodeResults of as many requests as there are slots."""
        queue = self._queue
        return [
            self._result(*queue.popleft())
            for _ in range(min(self._num_slots, len(queue)))
        ]

    def _result(self, prepared, index, sample):
        law = prepared.sampling
        start, size = law.seed + sample, self._vocab_size
        tokens = tuple([(start + i) % size for i in range(law.max_tokens)])
        return DecodeResult(
            request_id=0, prompt_index=index, sample_index=sample,
            prompt_token_ids=prepared.token_ids, token_ids=tokens, logprobs=(),
            finish_reason="length", stop_reason=None, metrics=self._metrics,
            params_versions=(), output_text=None,
        )  # fmt: skip


def write_input(path, num_prompts, num_tokens, vocab_size=models.TINY.vocab_size):
    """A .jsonl file of random prompts, with an id and an answer each."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for index in range(num_prompts):
            ids = [rng.randrange(vocab_size) for _ in range(num_tokens)]
            line = {"id": f"p{index}", "token_ids": ids, "answer": str(index)}
            file.write(json.dumps(line) + "\n")


def run_shard(output, shard, config, *, die_after=None):
    """Run a shard of `output`/input.jsonl with fake steps.

    Killed after so many rows, if that is said; else (seconds, MB at most).
    """
    model = models.tiny_model()
    fingerprint.of_model(model)  # compiled now
    start, output = time.perf_counter(), pathlib.Path(output)
    options = JobOptions(
        input=str(output / "input.jsonl"), output=str(output), shard=shard
    )
    make = functools.partial(Decoder, model=model, make_engine=FakeEngine)
    job = Job(options, config, make_decoder=make)
    if die_after is not None:
        _die_after(job.directory, die_after, start, output / f"{shard[0]}.seconds")
    with job.directory:
        job.run()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _die_after(directory, num_rows, start, path):
    """End this process as a kill would, when so many rows have come."""
    add = directory.add

    def add_or_die(rows):
        add(rows)
        if directory.places.count >= num_rows:
            path.write_text(str(time.perf_counter() - start))
            os._exit(_KILLED)

    directory.add = add_or_die


def _run_and_die(*arguments, **options):
    run_shard(*arguments, **options)
    os._exit(1)  # it should have died


def killed_half_way(output, shards, config, num_rows):
    """Seconds of the slowest of all shards, each killed after half of its rows."""
    context = multiprocessing.get_context("spawn")
    half = num_rows // len(shards) // 2
    processes = [
        context.Process(
            target=_run_and_die,
            args=(output, shard, config),
            kwargs={"die_after": half},
        )
        for shard in shards
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode != _KILLED for process in processes):
        raise RuntimeError("a shard ended before it was killed")
    return max(float(p.read_text()) for p in pathlib.Path(output).glob("*.seconds"))


def run_to_the_end(output, shards, config):
    """[(seconds, MB at most)] of the shards, started again."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(shards), context) as pool:
        run = functools.partial(run_shard, output, config=config)
        return list(pool.map(run, shards))


class JobCost(Experiment):
    """Rows a second and memory, by the size of the job."""

    claim = "a job's host side makes 50,000 rows a second on two cores, in fixed memory"
    Config = JobCostConfig
    SMOKE = dict(num_prompts=(40,), num_shards=1, num_slots=2)

    def rows(self):
        """One for each size."""
        return [{"num_prompts": count} for count in self.config.num_prompts]

    def measure(self, row):
        """Seconds of the parts, rows a second of all of them, and memory."""
        options, count = self.config, row["num_prompts"]
        config = BatchConfig(
            model="tiny", max_tokens=options.max_tokens, max_length=256,
            num_slots=options.num_slots, columns=("token_ids",),
        )  # fmt: skip
        shards = [f"{i}/{options.num_shards}" for i in range(1, options.num_shards + 1)]
        with signals.temporary_directory() as output:
            path = pathlib.Path(output) / "input.jsonl"
            write_input(path, count, options.prompt_tokens)
            first = killed_half_way(output, shards, config, count)
            ended = run_to_the_end(output, shards, config)
            start = time.perf_counter()
            summary = job_rows.merge(output)
            merging = time.perf_counter() - start
            _check_merged(output, count)
        second = max(seconds for seconds, _ in ended)
        return {
            "rows_merged": summary["rows_found"],
            "seconds_until_killed": first,
            "seconds_after": second,
            "seconds_merging": merging,
            "rows_per_second": count / (first + second),
            "rows_per_second_merged": count / (first + second + merging),
            "peak_mb": max(mb for _, mb in ended),
        }

    def describe(self, records):
        """The largest job's rate, and what memory a larger job takes more."""
        small, large = (
            pick(records, key=lambda r: r["num_prompts"]) for pick in (min, max)
        )
        return {
            "rows_per_second": large["rows_per_second"],
            "rows_per_second_merged": large["rows_per_second_merged"],
            "peak_mb": large["peak_mb"],
            "peak_mb_of_the_smallest": small["peak_mb"],
        }

    @staticmethod
    def figure(axes, summary, records):
        """Peak memory by the size of the job."""
        del summary
        points = [(record["num_prompts"], record["peak_mb"]) for record in records]
        drawing.curves(axes, {"a process": points}, x="prompts", y="MB at most")


def _check_merged(output, count):
    """RuntimeError unless every prompt has its row, in order."""
    with open(pathlib.Path(output) / "results.jsonl", "rb") as file:
        places = [job_rows.place_of(line) for line in file]
    if places != [(index, 0) for index in range(count)]:
        raise RuntimeError(f"{len(places)} rows of {count}, or not in order")


if __name__ == "__main__":
    experiment.run(JobCost)
