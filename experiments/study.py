"""A study: rows of policies and settings, measured on the same contexts.

    python -m experiments.study --study policies --output_dir RUN
    python -m experiments.study --study policies --output_dir SMOKE --smoke

The studies are the modules of experiments/studies. A row is measured either by decoding
(mode "decode": drafts follow their own tokens, and every text is compared with plain
decoding) or on a recorded dense text (mode "replay", see experiments/replay.py). Each
finished row is a line of results.jsonl; the same command resumes after an interruption,
and a row that fails stops no other (failures.jsonl, and the exit status). Rows that
cannot be measured, say for lack of contexts of their length, are named before the work.
Figures: `python -m experiments.figures`; a page of all of them: `experiments.report`.

Most of a row's time is compilation, on one core. `--part 2/8` measures the second of
eight parts, rows of one engine staying together; run the parts at the same time, each
in a directory of its own, and join them with `python -m experiments.join_studies`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import traceback

import numpy as np
from absl import flags

from experiments import contexts as contexts_lib
from experiments import fingerprint, launch, measure, record, replay, signals
from experiments.models import tiny_model
from experiments.study_bench import Bench, Setting, without_budget
from experiments.study_config import Row, load_study, smoke_rows, study_names
from sparsespec_jax import load_model, sizes
from sparsespec_jax.policies.select import POLICIES, load_policy, resolve_policy

_AGAIN = "the same command goes on"


def smoke_contexts():
    """Two short texts of random tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n).tolist() for n in (60, 41)]


def as_json(row):
    """The row as it is recorded."""
    return json.loads(json.dumps(dataclasses.asdict(row)))


def recorded(row):
    """A row as it was recorded, with the defaults of fields that came later."""
    return as_json(Row()) | row


def run(directory, bench, rows):
    """Measure the rows that the directory does not hold yet.

    Returns (True if no text differs, number of rows that failed).
    """
    done = [recorded(old["row"]) for old in directory.records]
    num_failed = 0
    for row in rows:
        if as_json(row) in done:
            continue
        try:
            found = bench.measure(row)
        except Exception as error:  # whatever it is, the other rows are worth having
            num_failed += 1
            note_failure(directory, row, "".join(traceback.format_exception(error)))
            continue
        directory.append({"row": as_json(row), **found})
        print(json.dumps(directory.records[-1]["row"]), headline(found), flush=True)
    same = all(
        old.get("identical_contexts") == old.get("num_contexts")
        for old in directory.records
        if old["row"]["acceptor"] == "shared_noise"
    )
    return same, num_failed


def note_failure(directory, row, text):
    """Say on stderr and in failures.jsonl why a row was not measured."""
    print(f"failed: {row}\n{text}", file=sys.stderr, flush=True)
    with signals.deferred(), open(directory.path / "failures.jsonl", "ab") as file:
        line = json.dumps({"row": as_json(row), "error": text[-4000:]})
        file.write(line.encode() + b"\n")


def split(check, rows):
    """([check(row) of those that can be measured], [(row, why not)])."""
    possible, impossible = [], []
    for row in rows:
        try:
            possible.append(check(row))
        except ValueError as error:
            impossible.append((row, str(error)))
    return possible, impossible


def part_of(rows, part):
    """The rows of part "i/n", those that share an engine together; all for None.

    Raises:
      ValueError: not i/n with 1 <= i <= n.
    """
    if part is None:
        return rows
    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--part is i/n with 1 <= i <= n, got {part!r}")
    groups = {}
    for row in rows:
        key = (row.mode, row.policy, without_budget(row.speculation("pillar")))
        groups.setdefault(key, []).append(row)
    return sum(list(groups.values())[int(index) - 1 :: int(count)], [])


def headline(found):
    """One figure of a row, for the terminal."""
    name = "mean_accepted_draft_tokens"
    name = name if name in found else "expected_accepted"
    mean, error = found[name]["mean"], found[name]["standard_error"]
    return f"{name} {mean:.2f} +- {error:.2f}"


def _define_flags():
    flags.DEFINE_enum("study", None, study_names(), "What to run.", required=True)
    flags.DEFINE_string("output_dir", None, "Run directory.", required=True)
    flags.DEFINE_string("model", "smollm2", "Model to measure.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type.")
    flags.DEFINE_string(
        "contexts", None, f"Token ids, JSON; SmolLM2's: {contexts_lib.OF_SMOLLM2}."
    )
    flags.DEFINE_integer(
        "num_contexts", 30, "Use only the first so many.", lower_bound=1
    )
    flags.DEFINE_integer("max_tokens", 96, "New tokens per context.", lower_bound=1)
    flags.DEFINE_string("continuations", None, "Plain texts of experiments.contexts.")
    flags.DEFINE_integer(
        "num_slots", 10, "Requests decoded at the same time.", lower_bound=1
    )
    flags.DEFINE_integer(
        "prefill_chunk", 256, "Prompt tokens per lane and step.", lower_bound=1
    )
    flags.DEFINE_integer(
        "prefill_lanes", 1, "Prompts prefilled in the same step.", lower_bound=1
    )
    flags.DEFINE_integer("page_size", 16, "Tokens per KV page.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the continuations.", lower_bound=0)
    flags.DEFINE_string("impl", None, "Kernels; default: the platform's.")
    flags.DEFINE_string("policy_file", None, "FILE.py:NAME, rows of that policy too.")
    flags.DEFINE_list("skip", [], "Policies to leave out.")
    flags.DEFINE_enum("mode", None, ["decode", "replay"], "Only rows measured so.")
    flags.DEFINE_list("known", [], "Run directories whose rows are left out.")
    flags.DEFINE_string("part", None, "i/n: the i-th of n parts of the rows.")
    flags.DEFINE_bool("smoke", False, "A tiny random model and a few rows only.")
    flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")


def rows_of(study, values, own):
    """The study's rows of the policies and the mode wanted, the user's own first."""
    skip = [resolve_policy(name).name for name in values.skip]
    rows = [row for row in study.rows if row.policy not in skip]
    if own and rows:
        rows.insert(0, dataclasses.replace(rows[0], policy=own.name, less_index=False))
    for row in rows:
        if row.policy != replay.HINDSIGHT and not (own and row.policy == own.name):
            resolve_policy(row.policy)
    part_of([], values.part)
    if values.mode:
        rows = [row for row in rows if row.mode == values.mode]
    return rows


def rows_left(rows, values):
    """Those of the part, without what the runs of --known hold."""
    known = [old for path in values.known for old in record.load(path)[1]]
    measured = [recorded(old["row"]) for old in known]
    rows = [row for row in rows if as_json(row) not in measured]
    rows = part_of(rows, values.part)
    rows = smoke_rows(rows) if values.smoke else rows
    if not rows:
        raise ValueError("--skip, --mode, --known and --part leave no row to measure")
    return rows


def setting_of(values):
    """The Setting that the flags say."""
    return Setting(
        max_tokens=20 if values.smoke else values.max_tokens + 1,
        num_slots=values.num_slots,
        page_size=values.page_size,
        impl=values.impl,
        seed=values.seed,
        prefill_chunk=values.prefill_chunk,
        prefill_lanes=values.prefill_lanes,
    )


def load_checked_model(values, contexts, setting):
    """The model, after a look whether the contexts are for it."""
    if values.smoke:
        model = tiny_model()
    else:
        model = load_model(values.model, dtype=values.dtype)
    contexts_lib.check_contexts(
        contexts,
        model,
        source=values.contexts or contexts_lib.OF_SMOLLM2,
        max_tokens=setting.max_tokens,
    )
    return model


def kv_of(model):
    """Options of `Row.for_model`."""
    return {"head_dim": model.config.head_dim, "kv_bits": measure.kv_bits(model)}


def open_run(values, setting, model, contexts):
    """The RunDirectory, as far as an earlier run got if it is the same one."""
    config = {
        **dataclasses.asdict(setting),
        "study": values.study,
        "model": model.name,
        "dtype": values.dtype,
        "num_contexts": len(contexts),
        "smoke": values.smoke,
        **kv_of(model),
    }
    policy = None
    if values.policy_file:
        policy = pathlib.Path(values.policy_file.rpartition(":")[0]).read_text("utf-8")
    inputs = fingerprint.of_run(
        "study",
        model,
        impl=sizes.resolve_impl(setting.impl),
        contexts=contexts,
        policy_file=policy,
    )
    resume = pathlib.Path(values.output_dir).is_dir()
    directory = record.RunDirectory(
        values.output_dir, config=config, inputs=inputs, resume=resume
    )
    signals.resumable(_AGAIN)
    return directory


def main():
    """Measure all rows of one study."""
    values = flags.FLAGS
    if (pathlib.Path(values.output_dir) / "config.json").exists():
        signals.resumable(_AGAIN)
    with launch.checking():
        own = load_policy(values.policy_file) if values.policy_file else None
        study, header = load_study(values.study)
        rows, setting = rows_of(study, values, own), setting_of(values)
        if values.smoke:
            contexts = smoke_contexts()
        else:
            contexts = contexts_lib.load_contexts(contexts_lib.path_for(values))
            contexts = contexts[: values.num_contexts]
        model = load_checked_model(values, contexts, setting)
        continuations = values.continuations and contexts_lib.load_continuations(
            values.continuations,
            contexts,
            model,
            max_tokens=setting.max_tokens,
            seed=setting.seed,
        )
        rows, impossible = split(lambda row: row.for_model(**kv_of(model)), rows)
        if values.smoke:  # its heads are too small for an index, and few rows are kept
            impossible = []
        rows = rows_left(rows, values)
        policies = POLICIES | ({own.name: own} if own else {})
        bench = Bench(model, contexts, setting, policies, rows, continuations)
        rows, others = split(bench.check, rows)
        if not rows:
            raise ValueError(f"no row can be measured: {others[0][1]}")
        impossible += others
        directory = open_run(values, setting, model, contexts)
    with directory:
        environment = record.describe_environment()
        if values.commit:
            environment["commit"] = values.commit
        directory.write_environment(environment)
        for row, why in impossible:
            note_failure(directory, row, why)
        done = [recorded(old["row"]) for old in directory.records]
        if all(as_json(row) in done for row in rows):
            print(f"{values.output_dir} holds all of these rows: nothing to measure")
        same, num_failed = run(directory, bench, rows)
        summary = {"claim": study.claim, "header": header, "x": study.x}
        summary |= {"series": study.series, "y": study.y}
        directory.write_summary(summary)
    num_failed += len(impossible)
    if num_failed:
        sys.exit(f"{num_failed} rows failed: see failures.jsonl")
    if not same and values.dtype == "float32":
        sys.exit("tokens differ from plain decoding")


if __name__ == "__main__":
    _define_flags()
    launch.run(main)
