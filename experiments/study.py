"""A study: rows of policies and settings, measured on the same contexts.

    python -m experiments.study --study policies --output_dir RUN
    python -m experiments.study --study policies --output_dir SMOKE --smoke

The studies are the modules of experiments/studies. A row is measured either by decoding
(mode "decode": drafts follow their own tokens, and every text is compared with plain
decoding) or on a recorded dense text (mode "replay", see experiments/replay.py). Each
finished row is a line of results.jsonl; the same command resumes after an interruption.
Figures: `python -m experiments.figures`; a page of all of them: `experiments.report`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import time
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import contexts as contexts_lib
from experiments import measure, record, replay
from experiments.models import tiny_model
from experiments.study_config import load_study, smoke_rows, study_names
from sparsespec_jax import (
    Engine,
    EngineConfig,
    SpeculationConfig,
    load_model,
)
from sparsespec_jax.policy import SelectionOptions
from sparsespec_jax.selection import POLICIES, load_policy, resolve_policy


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of a run share."""

    max_tokens: int
    num_slots: int
    page_size: int
    impl: str | None
    seed: int


class Bench:
    """Measures rows; keeps plain texts, recordings, and the engine of the last row."""

    def __init__(self, model, contexts, setting, policies, rows):
        self.model, self.contexts, self.setting = model, contexts, setting
        self.policies, self.rows = policies, rows
        self._plain = functools.cache(self._decode_plainly)
        # One at a time: each holds a pool for all contexts.
        self._engine_of = functools.lru_cache(maxsize=1)(self._make_engine)
        self._recording_of = functools.cache(self._record)

    def measure(self, row):
        """The row's figures as JSON types."""
        low, high = row.contexts
        chosen = [i for i, c in enumerate(self.contexts) if low <= len(c) < high]
        if not chosen:
            raise ValueError(f"no context has a length in [{low}, {high})")
        start = time.perf_counter()
        found = getattr(self, f"_{row.mode}")(row, chosen)
        return found | {"wall_time_s": time.perf_counter() - start}

    def _engine(self, speculation):
        """An engine that was, or now is, built for the largest budget of such rows."""
        unbudgeted = dict(budget_ratio=1.0, min_budget=0)
        key = dataclasses.replace(speculation, **unbudgeted)
        alike = [
            other
            for other in (
                row.speculation(speculation.policy)
                for row in self.rows
                if self.policies.get(row.policy) == speculation.policy
            )
            if dataclasses.replace(other, **unbudgeted) == key
        ] or [speculation]
        largest = dataclasses.replace(
            speculation,
            budget_ratio=max(other.budget_ratio for other in alike),
            min_budget=max(other.min_budget for other in alike),
        )
        engine = self._engine_of(largest)
        engine.set_budget(
            budget_ratio=speculation.budget_ratio, min_budget=speculation.min_budget
        )
        return engine

    def _make_engine(self, speculation):
        config = EngineConfig(
            num_slots=min(self.setting.num_slots, len(self.contexts)),
            page_size=self.setting.page_size,
            max_length=self._longest,
            prefill_chunk=256,
            impl=self.setting.impl,
        )
        return Engine(self.model, speculation=speculation, engine=config)

    @property
    def _longest(self):
        return max(map(len, self.contexts)) + self.setting.max_tokens

    def _continue(self, speculation, contexts, temperature):
        return measure.continue_contexts(
            self._engine(speculation),
            contexts,
            temperature=temperature,
            max_tokens=self.setting.max_tokens,
            seed=self.setting.seed,
        )

    def _decode_plainly(self, temperature):
        plain = SpeculationConfig(num_draft_tokens=0)
        results = self._continue(plain, self.contexts, temperature)
        return [r.token_ids for r in results]

    def _decode(self, row, chosen):
        plain = self._plain(row.temperature)
        policy = self.policies[row.policy]
        results = self._continue(
            row.speculation(policy), self.contexts, row.temperature
        )
        same = [r.token_ids == t for r, t in zip(results, plain, strict=True)]
        keep = self._not_looping(chosen, row.temperature)
        return {
            "identical_contexts": sum(same),
            "num_contexts": len(same),
            "num_looping_excluded": len(chosen) - len(keep),
            **measure.summarise(
                [results[i] for i in keep],
                [len(self.contexts[i]) for i in keep],
                policy=policy,
                model_config=self.model.config,
            ),
        }

    def _record(self, index, temperature, k, num_rows, num_keys):
        """A Recording whose first rows are the last k + 1 tokens of the context."""
        context = self.contexts[index]
        text = [*context, *self._plain(temperature)[index]]
        tokens = jnp.asarray(text + [0] * (num_keys - len(text)), jnp.int32)
        config, params = self.model.config, self.model.params
        first = len(context) - k - 1
        return replay.record_text(config, params, tokens, first, num_rows=num_rows)

    def _not_looping(self, chosen, temperature):
        plain = self._plain(temperature)
        keep = [i for i in chosen if not contexts_lib.is_looping(plain[i])]
        if not keep:
            raise ValueError("every continuation loops: use other contexts")
        return keep

    def _replay(self, row, chosen):
        k = row.num_draft_tokens
        num_keys = -(-self._longest // 256) * 256
        num_cycles = (self.setting.max_tokens - k) // (k + 1)
        if num_cycles < 2:
            raise ValueError(f"max_tokens must be at least {3 * k + 2} for two cycles")
        hindsight = row.policy == replay.HINDSIGHT
        policy = self.policies["pillar" if hindsight else row.policy]
        speculation = row.speculation(policy)
        cap = max(row.min_budget, int(np.ceil(row.budget_ratio * num_keys)))
        options = replay.ReplayOptions(
            num_draft_tokens=k,
            mass_rows=row.mass_rows,
            selection=SelectionOptions(
                cap=min(num_keys, cap),
                per_layer=row.scope == "layer",
                num_recent=row.num_recent,
                num_sinks=speculation.num_sinks,
                impl="reference",
            ),
            hindsight=hindsight,
        )
        num_rows = replay.rows_needed(num_cycles, k)
        texts = [
            replay.summarise(
                replay.replay(
                    self.model,
                    self._recording_of(index, row.temperature, k, num_rows, num_keys),
                    policy=policy,
                    options=options,
                    speculation=speculation,
                    temperature=row.temperature,
                    num_cycles=num_cycles,
                )
            )
            for index in self._not_looping(chosen, row.temperature)
        ]
        found = {}
        for name, value in texts[0].items():
            values = [text[name] for text in texts]
            if isinstance(value, list):
                found[name] = np.mean(values, axis=0).tolist()
            else:
                found[name] = measure.mean_and_error(values)
        return found


def smoke_contexts():
    """Two short texts of random tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n).tolist() for n in (60, 41)]


def as_json(row):
    """The row as it is recorded."""
    return json.loads(json.dumps(dataclasses.asdict(row)))


def run(directory, bench, rows):
    """Measure the rows that the directory does not hold yet; False if texts differ."""
    done = [old["row"] for old in directory.records]
    for row in rows:
        if as_json(row) in done:
            continue
        found = bench.measure(row)
        directory.append({"row": as_json(row), **found})
        print(json.dumps(directory.records[-1]["row"]), headline(found), flush=True)
    return all(
        old.get("identical_contexts") == old.get("num_contexts")
        for old in directory.records
        if old["row"]["acceptor"] == "shared_noise"
    )


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
    flags.DEFINE_integer("num_contexts", 30, "Use only the first so many.")
    flags.DEFINE_integer("max_tokens", 96, "New tokens per context.")
    flags.DEFINE_integer("num_slots", 10, "Requests decoded at the same time.")
    flags.DEFINE_integer("page_size", 16, "Tokens per KV page.")
    flags.DEFINE_integer("seed", 0, "Seed of the continuations.")
    flags.DEFINE_string("impl", None, "Kernels; default: the platform's.")
    flags.DEFINE_string("policy_file", None, "FILE.py:NAME, rows of that policy too.")
    flags.DEFINE_list("skip", [], "Policies to leave out.")
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
    return smoke_rows(rows) if values.smoke else rows


def main(argv):
    """Measure all rows of one study."""
    del argv
    values = flags.FLAGS
    try:
        own = load_policy(values.policy_file) if values.policy_file else None
        study, header = load_study(values.study)
        rows = rows_of(study, values, own)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if values.smoke:
        model, contexts = tiny_model(), smoke_contexts()
    else:
        contexts = json.loads(pathlib.Path(values.contexts).read_text())
        contexts = contexts[: values.num_contexts]
        model = load_model(values.model, dtype=values.dtype)
    setting = Setting(
        max_tokens=20 if values.smoke else values.max_tokens + 1,
        num_slots=values.num_slots,
        page_size=values.page_size,
        impl=values.impl,
        seed=values.seed,
    )
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
        bench = Bench(model, contexts, setting, policies, rows)
        same = run(directory, bench, rows)
        summary = {"claim": study.claim, "header": header, "x": study.x}
        summary |= {"series": study.series, "y": study.y}
        directory.write_summary(summary)
    if not same and values.dtype == "float32":
        sys.exit("tokens differ from plain decoding")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
