"""A study: rows of policies and settings, measured on the same contexts.

    python -m experiments.study --study policies --output_dir RUN
    python -m experiments.study --study policies --output_dir SMOKE --smoke

The studies are the modules of experiments/studies. A row is measured either by decoding
(mode "decode": drafts follow their own tokens, and every text is compared with plain
decoding) or on a recorded dense text (mode "replay", see experiments/replay.py). Each
finished row is a line of results.jsonl; the same command resumes after an interruption,
and a row that fails stops no other (failures.jsonl, and the exit status).
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
from absl import app, flags

from experiments import contexts as contexts_lib
from experiments import launch, record, replay
from experiments.models import tiny_model
from experiments.study_bench import Bench, Setting, without_budget
from experiments.study_config import Row, load_study, smoke_rows, study_names
from sparsespec_jax import load_model
from sparsespec_jax.selection import POLICIES, load_policy, resolve_policy


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
            _note_failure(directory.path / "failures.jsonl", row, error)
            continue
        directory.append({"row": as_json(row), **found})
        print(json.dumps(directory.records[-1]["row"]), headline(found), flush=True)
    same = all(
        old.get("identical_contexts") == old.get("num_contexts")
        for old in directory.records
        if old["row"]["acceptor"] == "shared_noise"
    )
    return same, num_failed


def _note_failure(path, row, error):
    text = "".join(traceback.format_exception(error))
    print(f"failed: {row}\n{text}", file=sys.stderr, flush=True)
    with open(path, "a") as file:
        file.write(json.dumps({"row": as_json(row), "error": text[-4000:]}) + "\n")


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
        "contexts", "experiments/results/contexts_smollm2.json", "Token ids, JSON."
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
    """The rows to run: the study's, and the user's policy in its first place."""
    skip = [resolve_policy(name).name for name in values.skip]
    rows = [row for row in study.rows if row.policy not in skip]
    if own:
        rows.insert(0, dataclasses.replace(rows[0], policy=own.name))
    for row in rows:
        if row.policy != replay.HINDSIGHT and not (own and row.policy == own.name):
            resolve_policy(row.policy)
    if values.mode:
        rows = [row for row in rows if row.mode == values.mode]
    known = [old for path in values.known for old in record.load(path)[1]]
    measured = [recorded(old["row"]) for old in known]
    rows = [row for row in rows if as_json(row) not in measured]
    rows = part_of(rows, values.part)
    return smoke_rows(rows) if values.smoke else rows


def main():
    """Measure all rows of one study."""
    values = flags.FLAGS
    try:
        own = load_policy(values.policy_file) if values.policy_file else None
        study, header = load_study(values.study)
        rows = rows_of(study, values, own)
        if values.smoke:
            contexts = smoke_contexts()
        else:
            contexts = contexts_lib.load_contexts(values.contexts)
            contexts = contexts[: values.num_contexts]
        setting = Setting(
            max_tokens=20 if values.smoke else values.max_tokens + 1,
            num_slots=values.num_slots,
            page_size=values.page_size,
            impl=values.impl,
            seed=values.seed,
            prefill_chunk=values.prefill_chunk,
            prefill_lanes=values.prefill_lanes,
        )
        continuations = None
        if values.continuations:
            continuations = contexts_lib.load_continuations(
                values.continuations,
                contexts,
                max_tokens=setting.max_tokens,
                seed=setting.seed,
            )
        if values.smoke:
            model = tiny_model()
        else:
            model = load_model(values.model, dtype=values.dtype)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    config = {
        **dataclasses.asdict(setting),
        "study": values.study,
        "model": model.name,
        "dtype": values.dtype,
        "num_contexts": len(contexts),
        "smoke": values.smoke,
    }
    policies = POLICIES | ({own.name: own} if own else {})
    resume = (pathlib.Path(values.output_dir) / "config.json").exists()
    with record.RunDirectory(
        values.output_dir, config=config, resume=resume
    ) as directory:
        environment = record.describe_environment()
        if values.commit:
            environment["commit"] = values.commit
        directory.write_environment(environment)
        bench = Bench(model, contexts, setting, policies, rows, continuations)
        same, num_failed = run(directory, bench, rows)
        summary = {"claim": study.claim, "header": header, "x": study.x}
        summary |= {"series": study.series, "y": study.y}
        directory.write_summary(summary)
    if num_failed:
        sys.exit(f"{num_failed} rows failed: see failures.jsonl")
    if not same and values.dtype == "float32":
        sys.exit("tokens differ from plain decoding")


if __name__ == "__main__":
    _define_flags()
    launch.run(main)
