"""Prompts in, rows out, by one engine that never waits for the last of a batch.

The rows of a prompt follow from its line, the options and the model, and from nothing
else: not from the shard, the order, the other prompts or a restart. So there is no time
and no count of steps in them; those are in the totals (`Decoder.metrics`).

`Decoder` is also what Ray Data calls an actor class: see docs/jobs.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from experiments import models
from experiments.config import Decoding
from experiments.equality import MODES
from experiments.generate import nothing_of
from experiments.job_input import Task, seed_of
from experiments.options import option
from experiments.prompts import PromptLine, completed, parse_value
from sparsespec_jax import Engine, sizes
from sparsespec_jax.host.intake import prepare
from sparsespec_jax.host.metrics import RequestMetrics

COLUMNS = "prompt_token_ids", "token_ids", "text", "logprobs", "prompt_logprobs"
# The names that a row has of its own; a line may have an id.
_OWN = {
    "index", "sample", "seed", "num_prompt_tokens", "finish_reason", "stop_reason",
    "error", "rest", *COLUMNS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Decoding):
    """What the rows of a job follow from, beside its prompts.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    mode: str = option("speculative", "Which decoding.", choices=MODES)
    seed: int = option(0, "Of the job; each prompt's own follows from it and its id.")
    max_length: int = option(
        2048, "Tokens of prompt and output together; longer ones are refused."
    )
    columns: tuple[str, ...] = option(
        ("token_ids", "text"), "What rows have of each output.", choices=COLUMNS
    )

    def __post_init__(self):
        """Check what is more than `Decoding`."""
        super().__post_init__()
        if self.max_tokens >= self.max_length:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no room for a prompt within "
                f"max_length={self.max_length}: raise max_length"
            )

    def law(self, seed):
        """The law of a prompt with this seed, with what the columns need."""
        law = super().law(seed)
        if "prompt_logprobs" not in self.columns:
            return law
        return _changed(law, prompt_logprobs=0)


class Decoder:
    """Decodes prompts by the options of a BatchConfig.

    Args:
        config: a BatchConfig.
        model: a Model in place of the one that the config names.
        make_engine: what makes the engine, for tests of the host's side.

    Attributes:
        model, engine: what it decodes with.
        metrics: RequestMetrics of all requests that finished.
        num_errors: prompts that could not be decoded.
        seconds: spent in steps and with rows, compilation left out.

    Raises (on construction):
        ValueError: options that do not fit together, the model or the memory.
    """

    def __init__(self, config, model=None, *, make_engine=Engine):
        self._config, self._make_engine = config, make_engine
        how = dict(dtype=config.dtype, tensor_parallel=config.tensor_parallel)
        self.model = model or models.load(config.model, **how)
        self._how = config.speculation(config.mode), config.engine(config.max_length)
        self._speculation = sizes.resolve(self.model, *self._how).speculation
        self._variables = config.template_variables()
        self._law = config.law(config.seed)
        self.engine = None
        self.metrics = RequestMetrics(num_requests=0)
        self.num_errors, self.seconds = 0, 0.0

    def start(self):
        """Make the engine and compile."""
        speculation, engine = self._how
        self.engine = self._make_engine(
            self.model, speculation=speculation, engine=engine
        )
        self.engine.warm_up(filters=self._law.filters, sampling=[self._law])

    def rows(self, tasks, *, window):
        """Yield lists of rows, dicts of JSON types, as the prompts of Tasks finish.

        A Task is taken when the engine has use for it, and not while one that is
        `window` Tasks older is unfinished.
        """
        tasks = iter(tasks)
        most = 3 * self._how[1].num_slots  # requests: twice as many wait as decode
        open_ = {}  # index -> [head of its rows, number, missing samples]
        number = num_requests = 0
        task = next(tasks, None)
        if self.engine is None and task is not None:
            self.start()
        start = time.perf_counter()
        while task is not None or open_:
            rows = []
            while task is not None and num_requests < most:
                oldest = next(iter(open_.values()))[1] if open_ else number
                if number - oldest >= window:
                    break
                head = self._head(task)
                if problem := task.problem or self._submit(task, head["seed"]):
                    rows += self._rows_of_error(task, head, problem)
                else:
                    open_[task.index] = [head, number, len(task.samples)]
                    num_requests += len(task.samples)
                task, number = next(tasks, None), number + 1
            for result in self.engine.step() if open_ else ():
                entry = open_[result.prompt_index]
                rows.append(self._row(entry[0], result))
                num_requests, entry[2] = num_requests - 1, entry[2] - 1
                if not entry[2]:
                    del open_[result.prompt_index]
            for metrics in self.engine.take_metrics():
                self.metrics += metrics
            now = time.perf_counter()
            self.seconds, start = self.seconds + now - start, now
            yield rows

    def _submit(self, task, seed):
        """Queue a Task; what is wrong with it, "" if nothing is."""
        line = completed(task.line, self._config.chat, self._variables)
        law = _changed(self._law, seed=seed)
        try:
            if twice := sorted(_OWN & line.rest.keys()):
                raise ValueError(
                    f"the line has the key {twice[0]!r}, which is a name of its result "
                    "too: rename it"
                )
            prepared = prepare(self.model, line.prompt, law, line.chat_template_kwargs)
            if len(task.samples) == law.n:
                self.engine.submit(prepared, prompt_index=task.index)
                return ""
            for sample in task.samples:
                found = nothing_of(prepared, self._speculation, sample)
                more = dict(prompt_index=task.index, progress=found)
                self.engine.submit(prepared, **more)
        except ValueError as error:
            return " ".join(str(error).split())
        return ""

    def _head(self, task):
        """What all rows of a Task have, behind their places."""
        rest = {} if task.line is None else task.line.rest
        if not _OWN.isdisjoint(rest):
            rest = {name: value for name, value in rest.items() if name not in _OWN}
        seed = seed_of(self._config.seed, task.id)
        return {"id": task.id, **rest, "seed": seed}

    def _row(self, head, result):
        return {
            "index": result.prompt_index,
            "sample": result.sample_index,
            **head,
            "num_prompt_tokens": len(result.prompt_token_ids),
            **{name: getattr(result, name) for name in self._config.columns},
            "finish_reason": result.finish_reason,
            "stop_reason": result.stop_reason,
        }

    def _rows_of_error(self, task, head, problem):
        self.num_errors += 1
        end = head | {"finish_reason": "error", "error": problem}
        return [
            {"index": task.index, "sample": sample} | end for sample in task.samples
        ]

    def __call__(self, batch):
        """The rows of a batch of Ray Data, as columns; the order is that of the batch.

        Args:
            batch: columns by name, with one of `prompt`, `messages` and `token_ids`,
                and an `id` for each prompt.

        Raises:
            ValueError: there are no ids: then the seeds would follow from the batches.
        """
        if "id" not in batch:
            raise ValueError("prompts need a column id, which their seeds follow from")
        lines = [_line(values) for values in zip(*batch.values(), strict=True)]
        samples = tuple(range(self._config.n))
        tasks = []
        for index, values in enumerate(lines):
            given = zip(batch, values, strict=True)
            row = {name: value for name, value in given if value is not None}
            try:
                line, problem = parse_value(row, f"prompt {row['id']}"), ""
            except ValueError as error:
                line = PromptLine("", rest={"id": row["id"]})
                problem = " ".join(str(error).split())
            tasks.append(Task(index, line, problem, samples))
        rows = [row for some in self.rows(tasks, window=len(tasks)) for row in some]
        rows.sort(key=lambda row: (row["index"], row["sample"]))
        for row in rows:
            del row["index"]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}


def _line(values):
    """Values of one prompt as JSON types; Ray gives arrays of them."""
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def _changed(law, **fields):
    """A law with other values that need no check: a million of these are made."""
    changed = object.__new__(type(law))
    vars(changed).update(vars(law), **fields)
    return changed
