"""Decode prompts plainly and speculatively, and compare them token by token.

    python -m experiments.generate --max_tokens 256 --output runs/first

Both modes run in one process on the same prompts, seeds and kernels; plain decoding
is the same engine without drafts. The exit status is 1 if a token differs that must
not. Expected of the demo, the defaults: all of more than 1,000 tokens identical, on any
CPU with 2 cores and 4 GB of memory. After an interruption,
--resume decodes what is missing, if flags, prompts and model are the same: unfinished
requests go on from the tokens in the journal. After Ctrl-C or SIGTERM none is lost,
after a kill those of about a second.
"""

from __future__ import annotations

import dataclasses
import time

from tqdm import tqdm

from experiments import equality, experiment, models, record, signals
from experiments.config import GenerateConfig
from experiments.contexts import smoke_contexts
from experiments.experiment import Experiment
from experiments.prompts import load_prompts
from sparsespec_jax import Engine, sizes
from sparsespec_jax.host.intake import prepare_all
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.results import RequestProgress


def decode(engine, prompts, config, *, mode, indices, directory):
    """Decode the prompts of these indices; yield (row, found) as they are finished.

    What the others emit goes into the journal every `journal_seconds`. Time counts from
    the first step, after compilation.
    """
    journal = Journal(directory, mode, seconds=config.journal_seconds)
    for index in indices:
        journal.submit(engine, prompts[index], index)
    bar = tqdm(
        total=len(indices) * config.max_tokens, desc=mode, unit="tok", mininterval=1
    )
    with bar, signals.at_end(bar.close), signals.at_end(lambda: journal.sync(engine)):
        engine.warm_up()
        start, num_steps = time.perf_counter(), 0
        bar.unpause()
        while engine.has_work:
            with signals.deferred():  # a step, and all that is recorded of it
                results, num_steps = engine.step(), num_steps + 1
                seconds = time.perf_counter() - start
                for result in results:
                    place = {"step": num_steps, "elapsed_s": seconds}
                    yield _result_record(mode, place, result)
                    bar.total -= config.max_tokens - len(result.token_ids)
                journal.write(engine)
                bar.update(engine.num_emitted_tokens - bar.n)


# What an entry of the journal has; `first` counts the tokens of the entries before.
_ENTRY = {
    "mode", "index", "first", "token_ids", "logprobs", "params_versions", "metrics"
}  # fmt: skip


class Journal:
    """What unfinished requests of one mode have emitted, in a run directory."""

    def __init__(self, directory, mode, *, seconds):
        self._directory, self._mode, self._seconds = directory, mode, seconds
        self._known = {}  # request id -> emitted tokens in the journal
        self._written = time.monotonic()

    def submit(self, engine, prepared, index):
        """Queue a prompt where an earlier session left it."""
        progress = progress_of(self._directory, self._mode, index)
        request_id = engine.submit(prepared, prompt_index=index, progress=progress)
        if progress is not None:
            self._known[request_id] = len(progress.token_ids)

    def write(self, engine):
        """Append what is new, if the last time is long enough ago."""
        if time.monotonic() - self._written >= self._seconds:
            self.sync(engine)

    def sync(self, engine):
        """Append what is new."""
        entries = []
        for progress in engine.progress(self._known):
            known = self._known.get(progress.request_id, 0)
            self._known[progress.request_id] = known + len(progress.token_ids)
            entries.append(
                {
                    "mode": self._mode,
                    "index": progress.prompt_index,
                    "first": known,
                    "token_ids": list(progress.token_ids),
                    "logprobs": list(progress.logprobs),
                    "params_versions": list(map(list, progress.params_versions)),
                    "metrics": progress.metrics.to_dict(),
                }
            )
        self._directory.append_to_journal(entries)
        self._written = time.monotonic()


def progress_of(directory, mode, index):
    """RequestProgress of a prompt by the journal, None if it has nothing.

    Raises:
        RunError: tokens are missing in between.
    """
    entries = [e for e in directory.journal if (e["mode"], e["index"]) == (mode, index)]
    if not entries:
        return None
    tokens, logprobs = [], []
    for entry in entries:
        if entry["first"] != len(tokens):
            raise record.RunError(
                f"{directory.path}/journal.jsonl: tokens {len(tokens)} to "
                f"{entry['first']} of prompt {index} are missing"
            )
        tokens += entry["token_ids"]
        logprobs += entry["logprobs"]
    last = entries[-1]
    return RequestProgress(
        request_id=-1,
        prompt_index=index,
        sample_index=0,
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs),
        params_versions=tuple(map(tuple, last["params_versions"])),
        metrics=RequestMetrics.from_dict(last["metrics"]),
    )


def _result_record(mode, place, result):
    """(row, found) of a finished request."""
    return {"mode": mode, "index": result.prompt_index}, {
        **place,
        "prompt_token_ids": list(result.prompt_token_ids),
        "token_ids": list(result.token_ids),
        "text": result.text,
        "logprobs": list(result.logprobs),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "metrics": result.metrics.to_dict(),
    }


def checked_prompts(model, config, prompts):
    """PreparedPrompts, each with its SamplingParams.

    Raises:
        ValueError: a prompt is malformed or too long for the model.
    """
    laws = [config.sampling(index) for index in range(len(prompts))]
    prepared = prepare_all(model, prompts, laws)
    for number, prompt in enumerate(prepared):
        if prompt.limit > model.config.max_length:
            raise ValueError(
                f"prompt {number} has {len(prompt.token_ids)} tokens, which with "
                f"max_tokens ({config.max_tokens}) is more than the "
                f"{model.config.max_length} the model was made for: lower --max_tokens"
            )
    return prepared


def check_records(directory, num_prompts):
    """RunError if results or journal hold what this run cannot have written."""
    known = {"mode", "index", "session", "step", "elapsed_s", "token_ids", "metrics"}
    places = set()
    for number, found in enumerate(directory.records, start=1):
        place = _place(directory, "results", number, found, known, num_prompts)
        if place in places:
            raise record.RunError(
                f"{directory.path}/results.jsonl:{number} is damaged: prompt "
                f"{place[1]} is there twice"
            )
        places.add(place)
    unfinished = {
        _place(directory, "journal", number, found, _ENTRY, num_prompts)
        for number, found in enumerate(directory.journal, start=1)
    }
    for mode, index in unfinished - places:
        progress_of(directory, mode, index)


def _place(directory, file, number, found, known, num_prompts):
    """(mode, index) of a line of a file; RunError if it is none of this run."""
    mode, index = place = found.get("mode"), found.get("index")
    if known <= found.keys() and mode in equality.MODES and index in range(num_prompts):
        return place
    raise record.RunError(
        f"{directory.path}/{file}.jsonl:{number} is damaged: no tokens of a prompt of "
        "this run"
    )


class Generate(Experiment):
    """Every prompt in both modes."""

    claim = "the output is plain decoding's, token for token"
    Config = GenerateConfig
    SMOKE = models.smoke(*models.SMOKE)

    def __init__(self, config, *, model=None, prompts=None, **how):
        """Model and prompts are those of `config` unless they are given."""
        super().__init__(config, **how)
        if self.is_smoke:
            prompts = smoke_contexts()
        elif prompts is None:
            prompts = load_prompts(config.prompts, chat=config.chat)
            prompts = prompts[: config.num_prompts or None]
        self.model = model or models.load(config.model, dtype=config.dtype)
        self.prompts = checked_prompts(self.model, config, prompts)
        self.parts["prompts"] = [prompt.token_ids for prompt in self.prompts]
        self._empty = {}  # statistics of an engine of each mode that did nothing
        for mode in equality.MODES:
            sizes.resolve(self.model, *self._options(mode))

    def _options(self, mode):
        """(SpeculationConfig, EngineConfig) for prompts of any of these lengths."""
        longest = max(prompt.limit for prompt in self.prompts)
        return self.config.speculation(mode), self.config.engine(longest)

    def check(self, directory):
        """RunError if the run directory holds what this run cannot have written."""
        check_records(directory, len(self.prompts))

    def rows(self):
        """Every prompt in every mode."""
        return [
            {"mode": mode, "index": index}
            for mode in equality.MODES
            for index in range(len(self.prompts))
        ]

    def measure_all(self, rows):
        """The prompts of a mode together."""
        for mode in equality.MODES:
            indices = [row["index"] for row in rows if row["mode"] == mode]
            speculation, config = self._options(mode)
            with Engine(self.model, speculation=speculation, engine=config) as engine:
                if indices:
                    yield from decode(
                        engine,
                        self.prompts,
                        self.config,
                        mode=mode,
                        indices=indices,
                        directory=self.directory,
                    )
                self._empty[mode] = engine.stats(0.0)

    def headline(self, found):
        """Nothing: there is a bar."""
        return ""

    def results(self, records):
        """(DecodeStats by mode, Comparison) of all records."""
        stats, tokens = {}, {}
        for mode in equality.MODES:
            found = [r for r in records if r["mode"] == mode]
            stats[mode] = equality.stats_of(found, like=self._empty[mode])
            tokens[mode] = {r["index"]: r["token_ids"] for r in found}
        return stats, equality.compare(*(tokens[mode] for mode in equality.MODES))

    def describe(self, records):
        """Equality, and the statistics of both modes."""
        stats, comparison = self.results(records)
        summary = {mode: stats[mode].to_dict() for mode in equality.MODES}
        return {"comparison": dataclasses.asdict(comparison)} | summary

    def text(self, described, records):
        """Texts, table and the closing lines."""
        stats, comparison = self.results(records)
        spoken = [record for record in records if record["mode"] == "speculative"]
        closing = equality.closing_lines(
            comparison,
            stats["speculative"],
            is_deterministic=self.config.is_deterministic,
        )
        excerpts = map(equality.excerpt, spoken)
        return "\n\n".join([*excerpts, equality.table(stats), closing])

    def fault(self, records):
        """A token that differs and must not."""
        _, comparison = self.results(records)
        if self.config.is_deterministic and not comparison.is_identical:
            return "tokens differ from plain decoding"
        return ""


if __name__ == "__main__":
    experiment.run(Generate)
