"""Measures the rows of a study on contexts: by decoding, or in replay."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from experiments import contexts as contexts_lib
from experiments import measure, models, replay
from experiments.experiment import Experiment
from experiments.options import Options, option
from experiments.study_config import as_json, as_row, split
from sparsespec_jax import Engine, EngineConfig, SpeculationConfig, sizes
from sparsespec_jax.config import NUMERICS
from sparsespec_jax.plan.shape import pages_for
from sparsespec_jax.policies.base import SelectionOptions
from sparsespec_jax.policies.select import POLICIES, load_policy


@dataclass(frozen=True, kw_only=True)
class Setting(Options):
    """What all rows of a run share: model, contexts and engines."""

    model: str = option("smollm2")
    dtype: str = option("float32", "Type.", choices=models.DTYPES)
    contexts: str | None = option(
        None,
        f"Token ids, JSON; SmolLM2's: {contexts_lib.OF_SMOLLM2}.",
        is_recorded=False,  # their hashes are
    )
    num_contexts: int = option(30, "Use only the first so many.", at_least=1)
    max_tokens: int = option(96, "Tokens behind the first one.", at_least=1)
    continuations: str | None = option(
        None, "Plain texts of experiments.contexts.", is_recorded=False
    )
    num_slots: int = option(10, "Requests decoded at the same time.", at_least=1)
    prefill_chunk: int = option(256, "Prompt tokens per lane and step.", at_least=1)
    prefill_lanes: int = option(1, "Prompts prefilled in the same step.", at_least=1)
    page_size: int = option(16, "Tokens per KV page.", at_least=1)
    seed: int = option(0, "Seed of the continuations.", at_least=0)
    impl: str | None = option(None, "Kernels; default: the platform's.")
    numerics: str = option("fast", "Of the engine.", choices=NUMERICS)
    policy_file: str | None = option(
        None, "FILE.py:NAME of a Policy of your own.", is_recorded=False
    )

    @property
    def num_new(self):
        """Tokens that every context is continued by."""
        return self.max_tokens + 1


class OnContexts(Experiment):
    """An experiment whose rows are `study_config.Row`s, measured by a Bench.

    Rows that cannot be measured, say for lack of contexts of their length, are wanted
    too: they fail, and are named before the work.
    """

    def __init__(self, config, **how):
        super().__init__(config, **how)
        own = load_policy(config.policy_file) if config.policy_file else None
        wanted = self.wanted(own)
        contexts = self._contexts()
        self.model = models.load(config.model, dtype=config.dtype)
        contexts_lib.check_contexts(
            contexts,
            self.model,
            source=config.contexts or contexts_lib.OF_SMOLLM2,
            max_tokens=config.num_new,
        )
        continuations = config.continuations and contexts_lib.load_continuations(
            config.continuations,
            contexts,
            self.model,
            max_tokens=config.num_new,
            seed=config.seed,
        )
        policies = POLICIES | ({own.name: own} if own else {})
        rows, impossible = self.for_model(wanted)
        self.bench = Bench(self.model, contexts, config, policies, rows, continuations)
        self.possible, others = split(self.bench.check, rows)
        self.impossible = impossible + others
        for row, why in self.impossible:
            print(f"cannot be measured: {row}: {why}", file=sys.stderr)
        if not self.possible:
            raise ValueError(f"no row can be measured: {self.impossible[0][1]}")
        self.parts = {"contexts": contexts, "policy_file": None}
        if own:
            path = pathlib.Path(config.policy_file.rpartition(":")[0])
            self.parts["policy_file"] = path.read_text("utf-8")

    def _contexts(self):
        if self.is_smoke:
            return contexts_lib.smoke_contexts()
        contexts = contexts_lib.load_contexts(contexts_lib.path_for(self.config))
        return contexts[: self.config.num_contexts]

    def wanted(self, own):
        """The Rows to measure; `own` is the user's Policy, or None."""
        raise NotImplementedError

    def for_model(self, rows):
        """(those rows as they are measured on the model, [(row, why it cannot be)])."""
        return split(lambda row: row.for_model(**self.cache()), rows)

    def cache(self):
        """Options of `Row.for_model`."""
        return {
            "head_dim": self.model.config.head_dim,
            "kv_bits": measure.kv_bits(self.model),
        }

    def inputs(self):
        """With the sizes that the bytes of an index follow from."""
        return super().inputs() | self.cache()

    def rows(self):
        """Those that can be measured, then the others."""
        others = [row for row, _ in self.impossible]
        return [as_json(row) for row in (*self.possible, *others)]

    def measure(self, row):
        """What the bench finds."""
        row = as_row(row)
        for other, why in self.impossible:
            if row == other:
                raise ValueError(why)
        return self.bench.measure(row)

    def headline(self, found):
        """One figure of a row."""
        name = "mean_accepted_draft_tokens"
        name = name if name in found else "expected_accepted"
        mean, error = found[name]["mean"], found[name]["standard_error"]
        return f"{name} {mean:.2f} +- {error:.2f}"

    def fault(self, records):
        """Texts that are not plain decoding's, where they must be."""
        differ = any(
            found.get("identical_contexts") != found.get("num_contexts")
            for found in records
            if found["acceptor"] == "shared_noise"
        )
        exact = self.config.dtype == "float32"
        return "tokens differ from plain decoding" if differ and exact else ""


class Bench:
    """Measures rows; keeps plain texts, recordings, and the engine of the last row.

    `continuations` are plain texts by temperature; others are decoded when needed.
    """

    def __init__(self, model, contexts, setting, policies, rows, continuations=None):
        self.model, self.contexts, self.setting = model, contexts, setting
        self.policies, self.rows = policies, rows
        self._continuations = continuations or {}
        self._plain = functools.cache(self._decode_plainly)
        self._held = None  # (speculation, Engine) of the last row
        self._results = None  # (what was decoded, DecodeResults) of the last row
        self._replayed = {}  # (row but for its temperature): {temperature: figures}
        self.num_engines = 0
        self._recording_of = functools.cache(self._record)

    def measure(self, row):
        """The row's figures as JSON types."""
        return getattr(self, f"_{row.mode}")(row, self._chosen(row))

    def check(self, row):
        """The row; ValueError if it is clear before any work that it will fail."""
        policy = self._policy(row)
        chosen, k = self._chosen(row), row.num_draft_tokens
        if row.mode == "decode":
            plain = SpeculationConfig(num_draft_tokens=0)
            for speculation in (plain, self._largest(row.speculation(policy))):
                sizes.resolve(self.model, speculation, self._config(speculation))
            return row
        self._num_cycles(k)
        # The rows of the first cycle are the context's last tokens, and select keys.
        short = [i for i in chosen if len(self.contexts[i]) < k + 2]
        if short:
            raise ValueError(
                f"context {short[0]} has {len(self.contexts[short[0]])} tokens, a "
                f"replay of {k} drafts needs {k + 2}"
            )
        return row

    def _policy(self, row):
        name = "pillar" if row.policy == replay.HINDSIGHT else row.policy
        return self.policies[name]

    def _chosen(self, row):
        """Numbers of the contexts of a row."""
        low, high = row.contexts
        chosen = [i for i, c in enumerate(self.contexts) if low <= len(c) < high]
        if not chosen:
            raise ValueError(f"no context has a length in [{low}, {high})")
        return chosen

    def _num_cycles(self, k):
        """Cycles of a replay."""
        num_cycles = (self.setting.num_new - k) // (k + 1)
        if num_cycles < 2:
            raise ValueError(
                f"a replay of two cycles of {k} drafts needs {3 * k + 2} tokens, "
                f"--max_tokens gives {self.setting.num_new}"
            )
        return num_cycles

    def _largest(self, speculation):
        """`speculation` with the largest budget of the rows that share its engine."""
        key = without_budget(speculation)
        alike = [
            other
            for other in (
                row.speculation(speculation.policy)
                for row in self.rows
                if self.policies.get(row.policy) == speculation.policy
                and row.mode == "decode"
            )
            if without_budget(other) == key
        ] or [speculation]
        return dataclasses.replace(
            speculation,
            budget_ratio=max(other.budget_ratio for other in alike),
            min_budget=max(other.min_budget for other in alike),
        )

    def _engine(self, speculation):
        """An engine that was, or now is, built for the largest budget of such rows."""
        largest = self._largest(speculation)
        if self._held is None or self._held[0] != largest:
            self._held = None  # free its pool before the next one is taken
            self.num_engines += 1
            config = self._config(largest)
            engine = Engine(self.model, speculation=largest, engine=config)
            self._held = largest, engine
        engine = self._held[1]
        engine.set_budget(
            budget_ratio=speculation.budget_ratio, min_budget=speculation.min_budget
        )
        return engine

    def _config(self, speculation):
        """EngineConfig for rows that draft so, with the pages that they can need."""
        config = EngineConfig(
            num_slots=min(self.setting.num_slots, len(self.contexts)),
            page_size=self.setting.page_size,
            max_length=self._longest,
            prefill_chunk=self.setting.prefill_chunk,
            prefill_lanes=self.setting.prefill_lanes,
            kv_policy="reserve",
            impl=self.setting.impl,
            numerics=self.setting.numerics,
        )
        impl = sizes.resolve_impl(config.impl)
        shape = sizes.make_shape(speculation, config, self._longest, impl)
        pages = min(self._pages(shape), shape.num_pages)
        return dataclasses.replace(config, num_pages=pages)

    @property
    def _longest(self):
        return max(map(len, self.contexts)) + self.setting.num_new

    def _pages(self, shape):
        """Pages that the slots need at most with these contexts."""
        ahead = self.setting.num_new + 3 * shape.num_queries
        needed = (pages_for(len(c) + ahead, shape.page_size) for c in self.contexts)
        longest = sorted(needed)[-shape.num_slots :]
        return sum(longest) + shape.num_slots * shape.draft_table_width

    def _continue(self, speculation, contexts, temperature):
        return contexts_lib.continue_contexts(
            self._engine(speculation),
            contexts,
            temperature=temperature,
            max_tokens=self.setting.num_new,
            seed=self.setting.seed,
        )

    def _decode_plainly(self, temperature):
        if temperature in self._continuations:
            return self._continuations[temperature]
        plain = SpeculationConfig(num_draft_tokens=0)
        results = self._continue(plain, self.contexts, temperature)
        return [r.token_ids for r in results]

    def _decode(self, row, chosen):
        plain = self._plain(row.temperature)
        policy = self.policies[row.policy]
        decoded = row.speculation(policy), row.temperature
        if self._results is None or self._results[0] != decoded:  # ranges share it
            results = self._continue(decoded[0], self.contexts, decoded[1])
            self._results = decoded, results
        results = self._results[1]
        same = [[*r.token_ids] == [*t] for r, t in zip(results, plain, strict=True)]
        keep = self._not_looping(chosen, row.temperature)
        return {
            "identical_contexts": sum(same),
            "num_contexts": len(same),
            "num_looping_excluded": len(chosen) - len(keep),
            **measure.summarise(
                [results[i] for i in keep],
                [len(self.contexts[i]) for i in keep],
                policy=policy,
                model=self.model,
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
        """Figures of a row; those that differ in the temperature alone are shared."""
        if row.text_temperature is None:  # another temperature has another text
            return self._replay_at(row, chosen, (row.temperature,))[row.temperature]
        key = dataclasses.replace(row, temperature=0.0)
        if key not in self._replayed:
            alike = [
                r
                for r in (row, *self.rows)
                if dataclasses.replace(r, temperature=0.0) == key
            ]
            temperatures = tuple(sorted({r.temperature for r in alike}))
            self._replayed[key] = self._replay_at(row, chosen, temperatures)
        return self._replayed[key][row.temperature]

    def _replay_at(self, row, chosen, temperatures):
        """{temperature: figures} of a row at each of the temperatures."""
        k = row.num_draft_tokens
        num_keys = -(-self._longest // 256) * 256
        num_cycles, policy = self._num_cycles(k), self._policy(row)
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
            hindsight=row.policy == replay.HINDSIGHT,
        )
        num_rows = replay.rows_needed(num_cycles, k)
        heat = row.temperature if row.text_temperature is None else row.text_temperature
        texts = [
            replay.replay(
                self.model,
                self._recording_of(index, heat, k, num_rows, num_keys),
                policy=policy,
                options=options,
                speculation=speculation,
                temperatures=temperatures,
                num_cycles=num_cycles,
            )
            for index in self._not_looping(chosen, heat)
        ]
        return {
            temperature: self._means([replay.summarise(text, i) for text in texts])
            for i, temperature in enumerate(temperatures)
        }

    def _means(self, texts):
        """Means over texts of what `replay.summarise` says of each."""
        found = {}
        for name, value in texts[0].items():
            values = [text[name] for text in texts]
            if isinstance(value, list):
                found[name] = np.mean(values, axis=0).tolist()
            else:
                found[name] = measure.mean_and_error(values)
        return found


def without_budget(speculation):
    """What an engine is built for, its budget aside."""
    return dataclasses.replace(speculation, budget_ratio=1.0, min_budget=0)
