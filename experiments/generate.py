"""Decode prompts plainly and speculatively, and compare them token by token.

    python -m experiments.generate --max_tokens 256 --output runs/first
    python -m experiments.generate --mode speculative --prompts mine.jsonl --n 4

Both modes run in one process on the same prompts, seeds and kernels; plain decoding
is the same engine without drafts. The exit status is 1 if a token differs that must
not. Expected of the demo, the defaults: all of more than 1,000 tokens identical, on any
CPU with 2 cores and 4 GB of memory. After an interruption,
--resume decodes what is missing, if flags, prompts and model are the same: unfinished
requests go on from the tokens in the journal. After Ctrl-C or SIGTERM none is lost,
after a kill those of about a second. What a line of --prompts says beside its prompt
(`id`, `answer`, ...) is in its results too.
"""

from __future__ import annotations

import dataclasses
import itertools
import time

from tqdm import tqdm

from experiments import equality, experiment, models, record, signals
from experiments.config import GenerateConfig
from experiments.contexts import smoke_contexts
from experiments.experiment import Experiment
from experiments.prompts import PromptLine, load_prompts, prepare_lines
from sparsespec_jax import Engine, sizes
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.progress_bar import compiling
from sparsespec_jax.host.results import RequestProgress


def decode(engine, prompts, config, *, mode, wanted, directory):
    """Decode the samples `wanted` of prompts; yield (row, found) as they are finished.

    `wanted` has (index of the prompt, sample) of each. What the others emit goes into
    the journal every `journal_seconds`. Time counts from the first step, after
    compilation.
    """
    journal = Journal(directory, mode, seconds=config.journal_seconds)
    for index, of_prompt in itertools.groupby(wanted, key=lambda place: place[0]):
        samples = [sample for _, sample in of_prompt]
        journal.submit(engine, prompts[index], index, samples)
    bar = tqdm(
        total=len(wanted) * config.max_tokens, desc=mode, unit="tok", mininterval=1
    )
    with bar, signals.at_end(bar.close), signals.at_end(lambda: journal.sync(engine)):
        with compiling(bar):
            engine.warm_up()
        start, num_steps = time.perf_counter(), 0
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
    "mode", "index", "sample", "first", "token_ids", "logprobs", "params_versions",
    "metrics",
}  # fmt: skip


class Journal:
    """What unfinished requests of one mode have emitted, in a run directory."""

    def __init__(self, directory, mode, *, seconds):
        self._directory, self._mode, self._seconds = directory, mode, seconds
        self._known = {}  # request id -> emitted tokens in the journal
        self._written = time.monotonic()

    def submit(self, engine, prepared, index, samples):
        """Queue samples of a prompt where an earlier session left them."""
        progress = {
            sample: progress_of(self._directory, self._mode, index, sample)
            for sample in samples
        }
        if len(samples) == prepared.sampling.n and not any(progress.values()):
            engine.submit(prepared, prompt_index=index)  # they share their pages
            return
        for sample, found in progress.items():
            found = found or nothing_of(prepared, engine.speculation, sample)
            request_id = engine.submit(prepared, prompt_index=index, progress=found)
            self._known[request_id] = len(found.token_ids)

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
                    "sample": progress.sample_index,
                    "first": known,
                    "token_ids": list(progress.token_ids),
                    "logprobs": list(progress.logprobs),
                    "params_versions": list(map(list, progress.params_versions)),
                    "metrics": progress.metrics.to_dict(),
                }
            )
        self._directory.append_to_journal(entries)
        self._written = time.monotonic()


def progress_of(directory, mode, index, sample):
    """RequestProgress of a sample by the journal, None if it has nothing.

    Raises:
        RunError: tokens are missing in between.
    """
    place = mode, index, sample
    entries = [entry for entry in directory.journal if _place_of(entry) == place]
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
        sample_index=sample,
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs),
        params_versions=tuple(map(tuple, last["params_versions"])),
        metrics=RequestMetrics.from_dict(last["metrics"]),
    )


def nothing_of(prepared, speculation, sample):
    """RequestProgress of a sample that has not begun, while others have."""
    return RequestProgress(
        request_id=-1,
        prompt_index=-1,
        sample_index=sample,
        token_ids=(),
        logprobs=(),
        params_versions=(),
        metrics=RequestMetrics(
            max_draft_tokens=speculation.num_draft_tokens,
            max_draft_steps=speculation.cycle - 1,
            num_prompt_tokens=len(prepared.token_ids),
        ),
    )


def _result_record(mode, place, result):
    """(row, found) of a finished request."""
    row = {"mode": mode, "index": result.prompt_index, "sample": result.sample_index}
    return row, {
        **place,
        "prompt_token_ids": list(result.prompt_token_ids),
        "token_ids": list(result.token_ids),
        "text": result.text,
        "logprobs": list(result.logprobs),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "metrics": result.metrics.to_dict(),
    }


# The names that a result has of its own.
_OWN = {
    "mode", "index", "sample", "session", "step", "elapsed_s", "prompt_token_ids",
    "token_ids", "text", "logprobs", "finish_reason", "stop_reason", "metrics", "row",
}  # fmt: skip


def checked_prompts(model, config, lines):
    """PreparedPrompt of each PromptLine, with its SamplingParams.

    Raises:
        ValueError: a prompt is malformed or too long for the model, or has a key that
            its results would have twice.
    """
    laws = [config.sampling(index) for index in range(len(lines))]
    prepared = prepare_lines(model, lines, laws)
    for number, (prompt, line) in enumerate(zip(prepared, lines, strict=True)):
        if twice := sorted(_OWN & line.rest.keys()):
            raise ValueError(
                f"prompt {number} has the key {twice[0]!r}, which is a name of its "
                "result too: rename it"
            )
        if prompt.limit > model.config.max_length:
            raise ValueError(
                f"prompt {number} has {len(prompt.token_ids)} tokens, which with "
                f"max_tokens ({config.max_tokens}) is more than the "
                f"{model.config.max_length} the model was made for: lower --max_tokens"
            )
    return prepared


def check_records(directory, rows):
    """RunError if results or journal hold what a run of these rows cannot have."""
    known = {"session", "step", "elapsed_s", "token_ids", "metrics"}
    wanted, places = set(map(_place_of, rows)), set()
    for number, found in enumerate(directory.records, start=1):
        place = _place(directory, "results", number, found, known, wanted)
        if place in places:
            raise record.RunError(
                f"{directory.path}/results.jsonl:{number} is damaged: prompt "
                f"{place[1]} is there twice"
            )
        places.add(place)
    unfinished = {
        _place(directory, "journal", number, found, _ENTRY, wanted)
        for number, found in enumerate(directory.journal, start=1)
    }
    for place in unfinished - places:
        progress_of(directory, *place)


def _place_of(found):
    """(mode, index, sample) of a row, a record or an entry of the journal."""
    return found.get("mode"), found.get("index"), found.get("sample")


def _place(directory, file, number, found, known, wanted):
    """Place of a line of a file; RunError if it is none of this run."""
    if known <= found.keys() and (place := _place_of(found)) in wanted:
        return place
    raise record.RunError(
        f"{directory.path}/{file}.jsonl:{number} is damaged: no tokens of a prompt of "
        "this run"
    )


class Generate(Experiment):
    """Every prompt in both modes, or in one."""

    claim = "the output is plain decoding's, token for token"
    Config = GenerateConfig
    SMOKE = models.smoke(*models.SMOKE)

    def __init__(self, config, *, model=None, prompts=None, **how):
        """Model and prompts are those of `config` unless they are given."""
        super().__init__(config, **how)
        if self.is_smoke:
            prompts = smoke_contexts()
        if prompts is None:
            variables = config.template_variables()
            self.lines = load_prompts(
                config.prompts, chat=config.chat, chat_template_kwargs=variables
            )[: config.num_prompts or None]
        else:
            self.lines = [PromptLine(prompt) for prompt in prompts]
        self.model = model or models.load(
            config.model, dtype=config.dtype, tensor_parallel=config.tensor_parallel
        )
        self.prompts = checked_prompts(self.model, config, self.lines)
        self.parts["prompts"] = [prompt.token_ids for prompt in self.prompts]
        self._empty = {}  # statistics of an engine of each mode that did nothing
        for mode in config.modes:
            sizes.resolve(self.model, *self._options(mode))

    def _options(self, mode):
        """(SpeculationConfig, EngineConfig) for prompts of any of these lengths."""
        longest = max(prompt.limit for prompt in self.prompts)
        return self.config.speculation(mode), self.config.engine(longest)

    def check(self, directory):
        """RunError if the run directory holds what this run cannot have written."""
        check_records(directory, self.rows())

    def rows(self):
        """Every sample of every prompt in every mode."""
        return [
            {"mode": mode, "index": index, "sample": sample}
            for mode in self.config.modes
            for index in range(len(self.prompts))
            for sample in range(self.config.n)
        ]

    def group(self, row):
        """A prompt is decoded in one process: then both modes can be compared."""
        return str(row["index"])

    def measure_all(self, rows):
        """The prompts of a mode together; a line's own keys stand in its results."""
        for mode in self.config.modes:
            places = [_place_of(row) for row in rows if row["mode"] == mode]
            speculation, config = self._options(mode)
            with Engine(self.model, speculation=speculation, engine=config) as engine:
                if places:
                    for row, found in decode(
                        engine,
                        self.prompts,
                        self.config,
                        mode=mode,
                        wanted=[place[1:] for place in places],
                        directory=self.directory,
                    ):
                        yield row, self.lines[row["index"]].rest | found
                self._empty[mode] = engine.stats(0.0)

    def headline(self, found):
        """Nothing: there is a bar."""
        return ""

    def results(self, records):
        """(DecodeStats by mode, Comparison or None for a single mode)."""
        stats, tokens = {}, {}
        for mode in self.config.modes:
            found = [r for r in records if r["mode"] == mode]
            stats[mode] = equality.stats_of(found, like=self._empty[mode])
            tokens[mode] = {(r["index"], r["sample"]): r["token_ids"] for r in found}
        both = tokens.values()
        return stats, equality.compare(*both) if len(both) == 2 else None

    def describe(self, records):
        """Equality, and the statistics of both modes; of one mode its statistics."""
        stats, comparison = self.results(records)
        summary = {mode: found.to_dict() for mode, found in stats.items()}
        if comparison is None:
            return summary
        return {"comparison": dataclasses.asdict(comparison)} | summary

    def text(self, described, records):
        """Texts, table and the closing lines."""
        stats, comparison = self.results(records)
        spoken = [r for r in records if r["mode"] == self.config.modes[-1]]
        if self.config.quiet:
            parts = ["\n".join(map(equality.one_line, spoken))]
        else:
            parts = [*map(equality.excerpt, spoken)]
        parts.append(equality.table(stats))
        if comparison is not None:
            parts.append(
                equality.closing_lines(
                    comparison,
                    stats["speculative"],
                    is_deterministic=self.config.is_deterministic,
                )
            )
        return "\n\n".join(parts)

    def fault(self, records):
        """A token that differs and must not."""
        _, comparison = self.results(records)
        if comparison is None or comparison.is_identical:
            return ""
        is_wrong = self.config.is_deterministic
        return "tokens differ from plain decoding" if is_wrong else ""


if __name__ == "__main__":
    experiment.run(Generate)
