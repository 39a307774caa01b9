"""The product's promise: no option may change an emitted token.

Every case decodes the same requests and compares token by token with plain decoding
(k = 0), itself checked against an oracle that has no engine, cache or pages.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsespec_jax import Engine, EngineConfig, Policy, SamplingParams
from tests.engine_helpers import (
    ENGINE,
    LAWS,
    SPECULATION,
    long_load,
    make_prompts,
    oracle,
    run,
    tokens_of,
)


@pytest.fixture(scope="module")
def plain(tiny_model, prompts):
    return run(tiny_model, prompts, num_draft_tokens=0)


def test_plain_decoding_equals_the_oracle(tiny_model, prompts, plain):
    for prompt, law, result in zip(prompts, LAWS, plain, strict=True):
        tokens, logprobs = oracle(tiny_model, prompt, law)
        assert result.token_ids == tokens
        np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)
        assert result.finish_reason == "length"
        assert len(tokens) == law.max_tokens


# Options of speculation and of the engine by turns, so that each is compiled once.
CASES = {
    "one draft, lag 0": (dict(num_draft_tokens=1), dict(lag=0)),
    "eight drafts, ten slots, lag 2": (
        dict(num_draft_tokens=8),
        dict(num_slots=10, lag=2),
    ),
    "no budget, one slot": (dict(min_budget=0, budget_ratio=1e-6), dict(num_slots=1)),
    "small budget, nine slots, tight pool": (
        dict(min_budget=1, budget_ratio=0.01),
        dict(num_slots=9, num_pages=40),
    ),
    "whole context, pages of one": (dict(budget_ratio=1.0), dict(page_size=1)),
    "edges, large pages": (dict(mass_rows="edges"), dict(page_size=64)),
    "per layer, chunks of one": (dict(scope="layer"), dict(prefill_chunk=1)),
    "recents, large chunks": (
        dict(num_recent=2),
        dict(prefill_chunk=64, prefill_lanes=2),
    ),
    "window, tight pool": (dict(policy="window", num_sinks=1), dict(num_pages=40)),
    "full, long tables": (
        dict(policy="full", budget_ratio=1.0),
        dict(max_length=1000),
    ),
}


@pytest.mark.parametrize("speculation, engine", CASES.values(), ids=CASES)
def test_no_option_changes_a_token(tiny_model, prompts, plain, speculation, engine):
    got = run(tiny_model, prompts, engine=engine, **speculation)
    assert tokens_of(got) == tokens_of(plain)
    for a, b in zip(got, plain, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    total = got.stats.total
    assert 0 < total.num_verify_steps
    assert total.num_accepted_draft_tokens <= total.num_draft_tokens


AS_USERS = """
import json
from experiments import models
from tests.engine_helpers import make_prompts, run, tokens_of

model = models.tiny_model()
prompts = make_prompts(model.config.vocab_size)
plain = run(model, prompts, num_draft_tokens=0)
drafted = run(model, prompts, num_draft_tokens=8, engine=dict(page_size=64))
print(json.dumps([tokens_of(plain), tokens_of(drafted)]))
"""


def test_drafts_change_no_token_where_programs_are_optimised(users_environment):
    """All else here runs programs that XLA optimised less than those of users."""
    command = [sys.executable, "-c", AS_USERS]
    done = subprocess.run(
        command, env=users_environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    plain, drafted = json.loads(done.stdout)
    assert drafted == plain and sum(map(len, plain)) == sum(x.max_tokens for x in LAWS)


def test_batch_order_and_neighbours_change_nothing(tiny_model, prompts, plain):
    order = [4, 0, 6, 2, 5, 1, 3]
    got = run(tiny_model, [prompts[i] for i in order], [LAWS[i] for i in order])
    assert tokens_of(got) == [plain[i].token_ids for i in order]
    alone = run(tiny_model, [prompts[5]], [LAWS[5]])
    assert alone[0].token_ids == plain[5].token_ids


def test_filters_change_the_law_but_not_losslessness(tiny_model, prompts):
    laws = [
        dataclasses.replace(law, temperature=1.5, top_k=20, top_p=0.9, min_p=0.05)
        if i % 2
        else law
        for i, law in enumerate(LAWS)
    ]
    base = run(tiny_model, prompts, laws, num_draft_tokens=0)
    for index in (1, 5):
        assert (
            base[index].token_ids == oracle(tiny_model, prompts[index], laws[index])[0]
        )
    assert tokens_of(run(tiny_model, prompts, laws)) == tokens_of(base)


def test_a_dense_draft_is_always_accepted(tiny_model, prompts):
    speculation, engine = CASES["full, long tables"]
    got = run(tiny_model, prompts, engine=engine, **speculation)
    histogram = got.stats.total.accepted_histogram
    assert histogram[:-1] == [0, 0, 0] and histogram[-1] > 20


def test_greedy_ratio_test_is_plain_greedy(tiny_model, prompts):
    laws = [dataclasses.replace(law, temperature=0) for law in LAWS]
    base = run(tiny_model, prompts, laws, num_draft_tokens=0)
    got = run(tiny_model, prompts, laws, acceptor="ratio_test", draft_top_m=8)
    assert tokens_of(got) == tokens_of(base)


def test_ratio_test_is_reproducible_and_of_the_right_length(tiny_model, prompts, plain):
    options = dict(acceptor="ratio_test", draft_top_m=8)
    first = run(tiny_model, prompts, **options)
    again = run(tiny_model, prompts, engine=dict(lag=2, page_size=8), **options)
    assert [len(t) for t in tokens_of(first)] == [len(t) for t in tokens_of(plain)]
    assert tokens_of(first) == tokens_of(again)


def worst(view, options):
    """The least useful positions, and sometimes none at all."""
    counts = jnp.where(
        view.lengths % 3 == 0, 0, jnp.minimum(view.budgets, view.lengths)
    )
    place = jnp.broadcast_to(jnp.arange(options.cap)[None], (counts.size, options.cap))
    shape = (counts.size, view.num_kv_heads, options.cap)
    indices = jnp.broadcast_to(place[:, None], shape).astype(jnp.int32)
    return indices, jnp.broadcast_to(counts[:, None], shape[:2])


def adversarial_run(model, policy, num_cycles, seed):
    """Decode with garbage in place of drafts; yields results until enough cycles."""
    engine = Engine(
        model,
        speculation=dataclasses.replace(SPECULATION, policy=policy, num_draft_tokens=2),
        engine=EngineConfig(
            num_slots=16, page_size=8, max_length=600, prefill_chunk=16
        ),
    )
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    requests = {}
    results, cycles = [], 0
    while cycles < num_cycles:
        while len(requests) - len(results) < 16:
            prompt = rng.integers(0, vocab, rng.integers(1, 40)).tolist()
            law = SamplingParams(
                temperature=float(rng.choice([0, 0.65, 1])),
                seed=int(rng.integers(1 << 30)),
                max_tokens=int(rng.integers(1, 500)),
            )
            requests[engine.add_request(prompt, law)] = (prompt, law)
        finished = engine.step()
        results += finished
        cycles += sum(r.metrics.num_verify_steps for r in finished)
        state = engine.device_steps.state
        garbage = rng.integers(0, vocab, state.tokens.shape).astype(np.int32)
        pending = jnp.arange(state.tokens.shape[1])[None] == 0
        is_hit = rng.random(state.tokens.shape) < 0.5
        engine.device_steps.state = state._replace(
            tokens=jnp.where(pending | ~is_hit, state.tokens, garbage)
        )
    return requests, results, cycles


@pytest.mark.usefixtures("optimized_programs")  # thousands of steps
@pytest.mark.parametrize("policy", ["random", Policy("worst", (), worst)])
def test_ten_thousand_adversarial_cycles_change_nothing(tiny_model, policy):
    requests, results, cycles = adversarial_run(tiny_model, policy, 5000, seed=1)
    assert cycles >= 5000
    expected = run(
        tiny_model,
        [requests[r.request_id][0] for r in results],
        [requests[r.request_id][1] for r in results],
        num_draft_tokens=0,
        engine=dict(num_slots=16, page_size=8, max_length=600),
    )
    assert tokens_of(results) == tokens_of(expected)
    assert sum(r.metrics.num_accepted_draft_tokens for r in results) < cycles


def test_a_missed_draft_changes_no_token(tiny_model):
    """Ten slots in five of nine phases: in the others all want to draft, in 9 lanes."""
    prompts = make_prompts(tiny_model.config.vocab_size, lengths=range(3, 13))
    laws = [SamplingParams(temperature=t, seed=i, max_tokens=60)
            for i, t in enumerate([0, 0.65, 1, 0.3, 0.8] * 2)]  # fmt: skip
    config = dataclasses.replace(ENGINE, num_slots=10)
    plain = run(tiny_model, prompts, laws, num_draft_tokens=0)
    engine = Engine(
        tiny_model,
        speculation=dataclasses.replace(SPECULATION, num_draft_tokens=8),
        engine=dataclasses.replace(config, max_length=256),  # as `run` has it
    )
    ids = [engine.add_request(*pair) for pair in zip(prompts, laws, strict=True)]
    arrays, results, num_missed = engine._scheduler.arrays, {}, 0
    while engine.has_work:
        if arrays.is_running.all():
            arrays.phase[:] = np.arange(10) // 2
            num_missed += engine._scheduler._step % 9 > 4
        results |= {r.request_id: r for r in engine.step()}
    assert engine.shape.draft_lanes == 9 and num_missed > 5
    assert tokens_of([results[i] for i in ids]) == tokens_of(plain)


def test_a_corrupted_cache_is_noticed(tiny_model, prompts, plain):
    """Power: committing KV that a draft step wrote would change tokens."""
    engine = Engine(
        tiny_model, speculation=SPECULATION, engine=dataclasses.replace(ENGINE, lag=0,
        max_length=256)  # as `run` has it
    )  # fmt: skip
    for prompt, law in zip(prompts, LAWS, strict=True):
        engine.add_request(prompt, law)
    results = {}
    while engine.has_work:
        layer = engine.device_steps.state.layers[0]
        noise = 1 + 0.05 * jnp.sign(jnp.sin(jnp.arange(layer.kv_pages.size)))
        broken = layer._replace(
            kv_pages=layer.kv_pages * noise.reshape(layer.kv_pages.shape)
        )
        engine.device_steps.state = engine.device_steps.state._replace(
            layers=(broken, *engine.device_steps.state.layers[1:])
        )
        results |= {r.request_id: r for r in engine.step()}
    assert tokens_of([results[i] for i in sorted(results)]) != tokens_of(plain)


@pytest.mark.slow
@pytest.mark.timeout(900)  # 4 minutes on two idle cores
def test_default_model_long_outputs(default_model):
    """Greedy and sampled, 600 tokens past a 1,000-token context, real weights."""
    load = long_load(default_model, 600)
    base = run(default_model, **load, num_draft_tokens=0)
    sparse = dict(num_draft_tokens=8, budget_ratio=0.05, min_budget=0)
    got = run(default_model, **load, **sparse)
    assert tokens_of(got) == tokens_of(base)
    jax.clear_caches()
