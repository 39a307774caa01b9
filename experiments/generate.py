"""Decode prompts plainly and speculatively, and compare them token by token.

    python -m experiments.generate --max_tokens 256 --output_dir runs/first

Both modes run in one process on the same prompts, seeds and kernels; plain decoding
is the same engine without drafts. The exit status is 1 if a token differs that must
not. Writes results.jsonl, journal.jsonl and summary.json to --output_dir, beside what
they come from (config.json, inputs.json, environment.json). After an interruption,
--resume decodes what is missing, if flags, prompts and model are the same: unfinished
requests go on from the tokens in the journal. After Ctrl-C or SIGTERM none is lost,
after a kill those of about a second.
"""

from __future__ import annotations

import dataclasses
import sys
import time

from absl import flags
from tqdm import tqdm

from experiments import config as config_lib
from experiments import equality, fingerprint, launch, record, signals
from experiments.prompts import load_prompts
from sparsespec_jax import Engine, load_model, sizes
from sparsespec_jax.host.metrics import RequestMetrics
from sparsespec_jax.host.results import RequestProgress
from sparsespec_jax.host.text import encode_prompts

_CONFIG = flags.DEFINE_string(
    "config", "demo", "Name of a module in experiments/configs; flags override it."
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Run directory. Default: runs/generate-DATE-TIME."
)
_JOURNAL_SECONDS = flags.DEFINE_float(
    "journal_seconds",
    1.0,
    "Time between two syncs of what requests have emitted.",
    lower_bound=0,
)
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --output_dir.")


def _define_option_flags():
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
    }
    for field in dataclasses.fields(config_lib.GenerateConfig):
        text = f"{field.metadata['help']} (demo: {field.default!r})"
        define[type(field.default)](field.name, None, text)


_define_option_flags()


def config_from_flags() -> config_lib.GenerateConfig:
    """The named config with the given flags in place of its values."""
    base = config_lib.load_config(_CONFIG.value)
    names = [field.name for field in dataclasses.fields(base)]
    given = {name: flags.FLAGS[name].value for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(base, **given)


def decode_missing(engine, prompts, config, *, mode, directory, journal_seconds):
    """Decode the prompts that `directory` has no record of in this mode.

    Each finished request is recorded before the next step is taken, and what the others
    emit every `journal_seconds`. Time counts from the first step, after compilation.
    """
    done = {r["index"] for r in directory.records if r["mode"] == mode}
    missing = [index for index in range(len(prompts)) if index not in done]
    if not missing:
        return
    journal = Journal(directory, mode, seconds=journal_seconds)
    for index in missing:
        journal.submit(engine, prompts[index], config.sampling(index), index)
    bar = tqdm(
        total=len(missing) * config.max_tokens, desc=mode, unit="tok", mininterval=1
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
                    place = {"session": directory.session, "step": num_steps}
                    place["elapsed_s"] = seconds
                    directory.append(_result_record(mode, place, result))
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

    def submit(self, engine, prompt, sampling, index):
        """Queue a prompt where an earlier session left it."""
        progress = progress_of(self._directory, self._mode, index)
        if progress is None:
            engine.add_request(prompt, sampling, prompt_index=index)
            return
        request_id = engine.resume_request(
            prompt, sampling, progress, prompt_index=index
        )
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
    return {
        "mode": mode,
        "index": result.prompt_index,
        **place,
        "prompt_token_ids": list(result.prompt_token_ids),
        "token_ids": list(result.token_ids),
        "text": result.text,
        "logprobs": list(result.logprobs),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "metrics": result.metrics.to_dict(),
    }


def checked_prompts(model, config) -> list[list[int]]:
    """Token ids of the config's prompts.

    Raises:
        ValueError: a prompt is malformed or too long for the model.
    """
    prompts = load_prompts(config.prompts, chat=config.chat)
    prompts = prompts[: config.num_prompts or None]
    encoded = encode_prompts(prompts, model)
    for number, ids in enumerate(encoded):
        if len(ids) + config.max_tokens > model.config.max_length:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, which with max_tokens "
                f"({config.max_tokens}) is more than the {model.config.max_length} the "
                "model was made for: lower --max_tokens"
            )
    return encoded


def engine_config(config, prompts):
    """The engine's sizes for prompts (token ids) of any of these lengths."""
    return config.engine(max(map(len, prompts)) + config.max_tokens)


def check_records(directory, num_prompts):
    """RunError if results or journal hold what this run cannot have written."""
    known = {"mode", "index", "session", "step", "elapsed_s", "token_ids", "metrics"}
    places = set()
    for number, found in enumerate(directory.records, start=1):
        place = found.get("mode"), found.get("index")
        if not (known <= found.keys() and _is_place(place, num_prompts)):
            raise record.RunError(
                f"{directory.path}/results.jsonl:{number} is damaged: no result of a "
                "prompt of this run"
            )
        if place in places:
            raise record.RunError(
                f"{directory.path}/results.jsonl:{number} is damaged: prompt "
                f"{place[1]} is there twice"
            )
        places.add(place)
    for number, found in enumerate(directory.journal, start=1):
        place = found.get("mode"), found.get("index")
        if not (_ENTRY <= found.keys() and _is_place(place, num_prompts)):
            raise record.RunError(
                f"{directory.path}/journal.jsonl:{number} is damaged: no tokens of a "
                "prompt of this run"
            )
    for mode, index in {(e["mode"], e["index"]) for e in directory.journal} - places:
        progress_of(directory, mode, index)


def _is_place(place, num_prompts):
    mode, index = place
    return mode in equality.MODES and index in range(num_prompts)


def run(model, prompts, config, directory, *, journal_seconds=1.0):
    """Decode in both modes into `directory`; returns (statistics, Comparison).

    Args:
        model: what load_model returns.
        prompts: lists of token ids.
        config: GenerateConfig.
        directory: an open RunDirectory; its records are not decoded again.
        journal_seconds: time between two syncs of what unfinished requests emitted.
    """
    environment = record.describe_environment()
    stats, tokens = {}, {}
    for mode in equality.MODES:
        options = config.speculation(mode), engine_config(config, prompts)
        with Engine(model, speculation=options[0], engine=options[1]) as engine:
            if mode == equality.MODES[0]:
                directory.write_environment(environment | {"impl": engine.impl})
            decode_missing(
                engine,
                prompts,
                config,
                mode=mode,
                directory=directory,
                journal_seconds=journal_seconds,
            )
            empty = engine.stats(0.0)
        records = [r for r in directory.records if r["mode"] == mode]
        stats[mode] = equality.stats_of(records, like=empty)
        tokens[mode] = {r["index"]: r["token_ids"] for r in records}
    comparison = equality.compare(*(tokens[mode] for mode in equality.MODES))
    summary = {mode: stats[mode].to_dict() for mode in equality.MODES}
    directory.write_summary({"comparison": dataclasses.asdict(comparison)} | summary)
    return stats, comparison


def print_report(config, directory, stats, comparison):
    """Print texts, table and the closing lines of a finished run."""
    for item in sorted(directory.records, key=lambda r: r["index"]):
        if item["mode"] == "speculative":
            print(equality.excerpt(item), end="\n\n")
    print(equality.table(stats), end="\n\n")
    print(f"Results: {directory.path}")
    print(
        equality.closing_lines(
            comparison,
            stats["speculative"],
            is_deterministic=config.is_deterministic,
        )
    )


def main():
    """Check everything, then run; a bad flag or input ends it in one line."""
    output_dir = _OUTPUT_DIR.value or time.strftime("runs/generate-%Y%m%d-%H%M%S")
    known = {"launcher": "generate"}
    with launch.checking():
        if _RESUME.value and not _OUTPUT_DIR.value:
            raise ValueError("--resume needs the --output_dir of the run")
        config = config_from_flags()
        of_run = dict(config=dataclasses.asdict(config), resume=_RESUME.value)
        record.check(output_dir, inputs=known, **of_run)
        if _RESUME.value:
            signals.resumable("add --resume to go on")
        load_prompts(config.prompts, chat=config.chat)
        model = load_model(config.model, dtype=config.dtype)
        prompts = checked_prompts(model, config)
        for mode in equality.MODES:
            found = sizes.resolve(
                model, config.speculation(mode), engine_config(config, prompts)
            )
        inputs = fingerprint.of_run("generate", model, impl=found.impl, prompts=prompts)
        directory = record.RunDirectory(output_dir, inputs=inputs, **of_run)
        check_records(directory, len(prompts))
    again = "" if _OUTPUT_DIR.value else f" --output_dir {output_dir}"
    signals.resumable(f"add --resume{again} to go on")
    with directory:
        if len(directory.records) == len(equality.MODES) * len(prompts):
            print(f"{output_dir} is finished: nothing to decode", file=sys.stderr)
        stats, comparison = run(
            model, prompts, config, directory, journal_seconds=_JOURNAL_SECONDS.value
        )
        print_report(config, directory, stats, comparison)
    if config.is_deterministic and not comparison.is_identical:
        sys.exit(1)


if __name__ == "__main__":
    launch.run(main)
