"""Accepted drafts per verification, by policy and budget, on contexts of known length.

    python -m experiments.acceptance --output experiments/results/acceptance.json

Re-measures the paper's acceptance claim (arXiv 2512.01278, section 5: 6.16 of 8 drafts
at s = 0.05 on Qwen3 reasoning traces) on a model small enough for any machine. Expected
on SmolLM2-135M, k = 8, T = 0.65, no budget floor: PillarAttn 3.1-4.2 at s = 0.05,
4.1-5.2 at 0.1, 4.9-6.1 at 0.2; sliding window 2.3-3.3 at 0.05; a full-attention draft
exactly 8 in float32. About 4 minutes on an H100, 90 on two CPU cores.

Every policy decodes the same contexts with the same seeds, so the tokens must be the
same too: the exit status is 1 if one differs from plain decoding (shared noise).
"""

from __future__ import annotations

import pathlib
import sys
import time

from absl import flags

from experiments import contexts as contexts_lib
from experiments import launch, record
from experiments import measure as measure_lib
from sparsespec_jax import (
    Engine,
    EngineConfig,
    SamplingParams,
    SpeculationConfig,
    load_model,
    sizes,
)
from sparsespec_jax.policies.select import load_policy, resolve_policy

_MODEL = flags.DEFINE_string("model", "smollm2", "Model to measure.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type.")
_ROWS = flags.DEFINE_list(
    "rows",
    ["pillar:0.05", "window:0.05", "full:1", "pillar:0.1", "pillar:0.2", "random:0.05"],
    "What to measure, in order: policy:budget_ratio.",
)
_POLICY_FILE = flags.DEFINE_string(
    "policy_file", None, "FILE.py:NAME of a Policy of your own, to use in --rows."
)
_CONTEXTS = flags.DEFINE_string(
    "contexts", None, "JSON file of contexts (token ids): read, or written if missing."
)
_K = flags.DEFINE_integer("num_draft_tokens", 8, "Drafts per cycle.", lower_bound=1)
_FLOOR = flags.DEFINE_integer(
    "min_budget", 0, "Tokens a draft reads at least.", lower_bound=0
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.65, "Temperature; 0 is greedy.")
_PROPOSER = flags.DEFINE_enum(
    "proposer", "self", ["self", "ngram", "cascade"], "Who drafts."
)
_STEPS = flags.DEFINE_integer(
    "draft_steps", None, "Cascade: draft steps of a cycle.", lower_bound=1
)
_GUESSES = flags.DEFINE_integer(
    "num_guesses", None, "Cascade: guesses per draft step.", lower_bound=1
)
_ACCEPTOR = flags.DEFINE_string("acceptor", "shared_noise", "Acceptor.")
_MASS_ROWS = flags.DEFINE_string("mass_rows", "all", "Verify rows that count.")
_SCOPE = flags.DEFINE_string("scope", "kv_head", "Selection per kv_head or layer.")
_PREFIXES = flags.DEFINE_integer(
    "num_prefixes", 24, "Texts that contexts come from.", lower_bound=1
)
_LENGTH = flags.DEFINE_integer(
    "prefix_length", 3000, "Tokens of those texts.", lower_bound=1
)
_TOKENS = flags.DEFINE_integer(
    "max_tokens", 96, "New tokens per context.", lower_bound=1
)
_SLOTS = flags.DEFINE_integer(
    "num_slots", 8, "Requests decoded at the same time.", lower_bound=1
)
_LANES = flags.DEFINE_integer(
    "prefill_lanes", 1, "Prompts prefilled per step.", lower_bound=1
)
_PAGE = flags.DEFINE_integer("page_size", 16, "Tokens per KV page.", lower_bound=1)
_IMPL = flags.DEFINE_string("impl", None, "Kernels; default: the platform's.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of texts, cuts and continuations.", lower_bound=0
)
_COMMIT = flags.DEFINE_string("commit", None, "Commit to record if git cannot say.")
_OUTPUT = flags.DEFINE_string("output", None, "Results file.", required=True)


def continue_contexts(engine, contexts):
    """DecodeResults of all contexts under the flags' law, in order."""
    return contexts_lib.continue_contexts(
        engine,
        contexts,
        temperature=_TEMPERATURE.value,
        max_tokens=_TOKENS.value + 1,
        seed=_SEED.value,
    )


def make_speculation(policy, ratio):
    """How a row drafts."""
    return SpeculationConfig(
        num_draft_tokens=_K.value,
        budget_ratio=ratio,
        min_budget=_FLOOR.value,
        proposer=_PROPOSER.value,
        policy=policy,
        acceptor=_ACCEPTOR.value,
        mass_rows=_MASS_ROWS.value,
        scope=_SCOPE.value,
        draft_steps=_STEPS.value,
        num_guesses=_GUESSES.value,
    )


def engine_config(longest):
    """The engine's sizes for contexts of up to `longest` tokens."""
    return EngineConfig(
        num_slots=_SLOTS.value,
        page_size=_PAGE.value,
        max_length=longest + _TOKENS.value + 1,
        prefill_chunk=256,
        prefill_lanes=_LANES.value,
        impl=_IMPL.value,
    )


def make_engine(model, speculation, contexts):
    """An engine for these contexts."""
    config = engine_config(max(map(len, contexts)))
    return Engine(model, speculation=speculation, engine=config)


def measure(model, contexts, wanted, write):
    """All rows of the table for the (Policy, budget_ratio) pairs `wanted`.

    `write(rows, num_looping)` is called after each row.
    """
    plain = continue_contexts(
        make_engine(model, SpeculationConfig(num_draft_tokens=0), contexts), contexts
    )
    tokens = [r.token_ids for r in plain]
    keep = [i for i, ids in enumerate(tokens) if not contexts_lib.is_looping(ids)]
    if not keep:
        sys.exit("every continuation loops: use other contexts or another temperature")
    lengths = [len(contexts[i]) for i in keep]
    rows, engines = [], {}
    for policy, ratio in wanted:
        if policy not in engines:
            largest = max(r for p, r in wanted if p == policy)
            speculation = make_speculation(policy, largest)
            engines[policy] = make_engine(model, speculation, contexts)
        engines[policy].set_budget(budget_ratio=ratio, min_budget=_FLOOR.value)
        start = time.perf_counter()
        results = continue_contexts(engines[policy], contexts)
        same = sum(r.token_ids == t for r, t in zip(results, tokens, strict=True))
        row = {
            "policy": policy.name,
            "budget_ratio": ratio,
            "identical_contexts": same,
            "wall_time_s": time.perf_counter() - start,
            **measure_lib.summarise(
                [results[i] for i in keep],
                lengths,
                policy=policy,
                model=model,
            ),
        }
        rows.append(row)
        write(rows, len(contexts) - len(keep))
        mean = row["mean_accepted_draft_tokens"]
        print(
            f"{policy.name:8s} s={ratio:<5g} accepted {mean['mean']:.2f} "
            f"+- {mean['standard_error']:.2f} of {_K.value}; "
            f"{same} of {len(contexts)} contexts identical to plain decoding",
            flush=True,
        )
    return rows


def load_contexts(model):
    """Contexts of --contexts if that file exists, else None; ValueError if unfit."""
    if not (_CONTEXTS.value and pathlib.Path(_CONTEXTS.value).exists()):
        return None
    contexts = contexts_lib.load_contexts(_CONTEXTS.value)
    contexts_lib.check_contexts(
        contexts, model, source=_CONTEXTS.value, max_tokens=_TOKENS.value + 1
    )
    return contexts


def plain_options():
    """Options of the engine that writes texts to cut contexts from."""
    return contexts_lib.plain_options(
        length=_LENGTH.value,
        num_slots=_PREFIXES.value,
        page_size=_PAGE.value,
        impl=_IMPL.value,
    )


def make_contexts(model, prompts):
    """Fresh contexts, written to --contexts if that is given."""
    start = time.perf_counter()
    speculation, config = plain_options()
    engine = Engine(model, speculation=speculation, engine=config)
    texts = contexts_lib.free_runs(
        engine, prompts, length=_LENGTH.value, seed=_SEED.value
    )
    contexts = contexts_lib.cut(texts, seed=_SEED.value)
    print(
        f"{len(contexts)} contexts in {time.perf_counter() - start:.0f} s", flush=True
    )
    if _CONTEXTS.value:
        contexts_lib.write_contexts(_CONTEXTS.value, contexts)
    return contexts


def parse_row(text, own=None):
    """(Policy, budget_ratio) of "policy:budget_ratio", checked before any work.

    `own` is a user's Policy, known by its name besides the project's.
    """
    name, _, ratio = text.partition(":")
    try:
        ratio = float(ratio)
    except ValueError:
        raise ValueError(f"--rows takes policy:budget_ratio, got {text!r}") from None
    policy = own if own and name == own.name else resolve_policy(name)
    return policy, SpeculationConfig(budget_ratio=ratio).budget_ratio


def prepare():
    """(model, wanted rows, contexts or None, prompts to make contexts from).

    Everything that can be known before the work is checked here.

    Raises:
        ValueError: an option, the model or a file does not fit.
    """
    own = load_policy(_POLICY_FILE.value) if _POLICY_FILE.value else None
    wanted = [parse_row(row, own) for row in _ROWS.value]
    speculations = [make_speculation(*row) for row in wanted]
    for (policy, _), speculation in zip(wanted, speculations, strict=True):
        sizes.check_cascade(speculation, policy)
    SamplingParams(temperature=_TEMPERATURE.value)
    model = load_model(_MODEL.value, dtype=_DTYPE.value)
    contexts, prompts = load_contexts(model), None
    if contexts is None:
        contexts_lib.check_length(_LENGTH.value)
        prompts = contexts_lib.encode_chats(
            model, contexts_lib.prompts(_PREFIXES.value), length=_LENGTH.value
        )
        sizes.resolve(model, *plain_options())
    longest = max(map(len, contexts)) if contexts else _LENGTH.value
    for speculation in (SpeculationConfig(num_draft_tokens=0), *speculations):
        sizes.resolve(model, speculation, engine_config(longest))
    return model, wanted, contexts, prompts


def main():
    """Make contexts, measure every policy, write the results file."""
    with launch.checking():
        model, wanted, contexts, prompts = prepare()
    if contexts is None:
        contexts = make_contexts(model, prompts)
    own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    header = record.results_header(own_flags, commit=_COMMIT.value)

    def write(rows, num_looping):
        counts = {
            "num_contexts": len(contexts),
            "num_looping_excluded": num_looping,
        }
        record.write_results(_OUTPUT.value, header | counts | {"rows": rows})

    rows = measure(model, contexts, wanted, write)
    lossless = _ACCEPTOR.value == "shared_noise" and _DTYPE.value == "float32"
    if lossless and any(r["identical_contexts"] < len(contexts) for r in rows):
        sys.exit("tokens differ from plain decoding")


if __name__ == "__main__":
    launch.run(main)
