"""Page pressure, spills and restores in the engine: no token changes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import pressure
from sparsespec_jax import Engine, EngineConfig, SamplingParams
from sparsespec_jax.device import offload
from sparsespec_jax.device.offload import HostPages, check_flags
from sparsespec_jax.host.intake import make_request, prepare
from sparsespec_jax.plan.buffer import PageMove
from tests import engine_helpers
from tests.engine_helpers import SPECULATION, run, tokens_of

NUM_REQUESTS = 64
CONFIG = EngineConfig(
    num_slots=16, page_size=4, prefill_chunk=16, prefill_lanes=2, max_length=72,
    host_chunk_pages=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def load(tiny_model):
    """(prompts, laws) of 64 requests, greedy and sampled, some of one prompt."""
    rng = np.random.default_rng(3)
    vocab = tiny_model.config.vocab_size
    prompts = [rng.integers(0, vocab, rng.integers(1, 30)).tolist() for _ in range(64)]
    laws = [
        SamplingParams(
            temperature=float(rng.choice([0, 0.65, 1])),
            seed=i,
            max_tokens=int(rng.integers(2, 40)),
        )
        for i in range(NUM_REQUESTS)
    ]
    return prompts, laws


def plain_run(model, prompts, laws):
    """What a pool large enough for everything gives."""
    config = dict(dataclasses.asdict(CONFIG), kv_policy="reserve")
    return run(model, prompts, laws, engine=config, num_draft_tokens=0)


@pytest.fixture(scope="module")
def plain(tiny_model, load):
    return tokens_of(plain_run(tiny_model, *load))


@pytest.fixture(scope="module")
def make_engine(tiny_model, load):
    """Makes engines whose pages are 15 % of what all requests can need together."""
    probe = Engine(tiny_model, speculation=SPECULATION, engine=CONFIG)
    needed = [
        probe._scheduler.kv.pages_needed(
            make_request(prepare(tiny_model, prompt, law), SPECULATION, 0)
        )
        for prompt, law in zip(*load, strict=True)
    ]
    pages = int(0.15 * sum(needed))
    assert max(needed) <= pages

    def make(*, speculation=SPECULATION, **options):
        config = dataclasses.replace(CONFIG, num_pages=pages, **options)
        return Engine(tiny_model, speculation=speculation, engine=config)

    return make


def decode(engine, load, *, share=0.0, seed=0):
    """Tokens in order; with `share` a random request is preempted before a step."""
    rng = np.random.default_rng(seed)
    ids = [engine.add_request(p, law) for p, law in zip(*load, strict=True)]
    results, scheduler = {}, engine._scheduler
    while engine.has_work:
        active = [r for r in scheduler.slots if r is not None]
        if len(active) > 2 and rng.random() < share:  # or one alone would never end
            scheduler.preempt(active[rng.integers(len(active))])
        results |= {r.request_id: r for r in engine.step()}
    assert scheduler.kv.num_free == engine.shape.num_pages
    return [results[i] for i in ids]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_pool_of_15_percent_changes_no_token(make_engine, load, plain, lag):
    engine = make_engine(lag=lag)
    assert tokens_of(decode(engine, load)) == plain
    usage = engine.kv_usage
    assert usage["restored_pages"] == usage["spilled_pages"] > 50
    assert usage["recomputed_tokens"] == 0


@settings(max_examples=12, deadline=None)
@given(
    lag=st.integers(0, 2),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    host_pages=st.sampled_from([None, 12, 0]),
    seed=st.integers(0, 1000),
)
def test_preemption_at_any_step_changes_no_token(
    make_engine, load, plain, lag, share, host_pages, seed
):
    """At every step too; with host memory for all, for some and for none."""
    few = [items[:20] for items in load]
    engine = make_engine(lag=lag, host_pages=host_pages)
    assert tokens_of(decode(engine, few, share=share, seed=seed)) == plain[:20]
    usage = engine.kv_usage
    assert usage["preemptions"] > 5
    assert (usage["recomputed_tokens"] > 0) == (host_pages == 0) or host_pages == 12


@pytest.mark.parametrize("policy", ["recompute", "reserve"])
def test_other_policies_change_no_token(make_engine, load, plain, policy):
    engine = make_engine(kv_policy=policy)
    assert tokens_of(decode(engine, load)) == plain
    usage = engine.kv_usage
    assert usage["spilled_pages"] == 0
    assert (usage["recomputed_tokens"] > 0) == (policy == "recompute")


def test_the_oracle_is_told_the_lengths_and_never_preempts(make_engine, load, plain):
    engine = make_engine(kv_policy="oracle")
    # The limit is far off, the stop token comes where plain decoding has it.
    ids = [
        engine.add_request(prompt, law, expected_tokens=len(tokens))
        for prompt, law, tokens in zip(*load, plain, strict=True)
    ]
    results = {}
    while engine.has_work:
        results |= {r.request_id: r for r in engine.step()}
    assert [results[i].token_ids for i in ids] == plain
    assert engine.kv_usage["preemptions"] == 0


def test_pressure_with_the_ratio_test_keeps_greedy_text_and_lengths(
    make_engine, load, plain
):
    """What is promised: the law, and so the very text where the law is one token.

    Where a cycle begins depends on preemptions, and with it what a draft is.
    """
    speculation = dataclasses.replace(SPECULATION, acceptor="ratio_test", draft_top_m=8)
    engine = make_engine(speculation=speculation)
    got = tokens_of(decode(engine, load, share=0.3))
    assert engine.kv_usage["spilled_pages"] > 0
    assert [len(t) for t in got] == [len(t) for t in plain]
    greedy = [i for i, law in enumerate(load[1]) if law.temperature == 0]
    assert greedy and all(got[i] == plain[i] for i in greedy)


def test_samples_share_pages_and_still_differ(tiny_model, make_engine, load):
    prompt = load[0][0] + list(range(30))
    law = SamplingParams(temperature=1, seed=5, n=4, max_tokens=12)
    base = plain_run(tiny_model, [prompt], law)
    engine = make_engine()
    ids = engine.add_request(prompt, law)
    results = {}
    while engine.has_work:
        results |= {r.request_id: r for r in engine.step()}
    assert [results[i].token_ids for i in ids] == tokens_of(base)
    assert len({results[i].token_ids for i in ids}) == 4
    assert engine.kv_usage["shared_pages"] >= 3 * 5


def test_after_warm_up_preemption_compiles_nothing(make_engine, load):
    engine = make_engine(prefill_chunk=7, host_chunk_pages=3)  # no other test
    engine.warm_up()
    compiled = engine_helpers.num_compilations(engine)
    assert compiled == 2
    functions = offload._touched, offload._gather, offload._scatter
    sizes = [f._cache_size() for f in functions]
    decode(engine, [items[:12] for items in load], share=0.5)
    assert engine.kv_usage["restored_pages"] > 0
    assert engine_helpers.num_compilations(engine) == compiled
    assert sizes == [f._cache_size() for f in functions]


def test_pages_come_back_as_they_went(tiny_model):
    check_that_pages_come_back(tiny_model)


@pytest.mark.gpu
def test_pages_come_back_from_the_host_of_a_gpu(tiny_model):
    check_that_pages_come_back(tiny_model)


def check_that_pages_come_back(model):
    config = dataclasses.replace(CONFIG, impl="reference")
    engine = Engine(model, speculation=SPECULATION, engine=config)
    rng = np.random.default_rng(0)

    def fill(layer):
        rows = rng.normal(size=layer.kv_pages.shape)
        return layer._replace(kv_pages=jnp.asarray(rows, layer.kv_pages.dtype))

    state = engine.device_steps.state
    state = state._replace(layers=tuple(fill(layer) for layer in state.layers))
    before = [np.asarray(layer.kv_pages) for layer in state.layers]
    host = HostPages(state, num_chunks=2, chunk_pages=3)
    state = host.warm_up(state, [])
    state = host.move(state, [PageMove(True, 1, (4, 2, 9)), PageMove(True, 0, (7,))])
    state = host.move(state, [PageMove(False, 1, (0, 1, 2)), PageMove(False, 0, (5,))])
    state = host.move(state, [])
    for old, layer in zip(before, state.layers, strict=True):
        new = np.asarray(layer.kv_pages)
        np.testing.assert_array_equal(new[[0, 1, 2, 5]], old[[4, 2, 9, 7]])
        rest = [i for i in range(len(old)) if i not in (0, 1, 2, 5)]
        np.testing.assert_array_equal(new[rest], old[rest])


def test_flags_that_take_host_memory_from_the_device_are_refused():
    flag = "--xla_gpu_command_buffer_update_mode=SKIP_TEMP"
    check_flags("cpu", flag)
    check_flags("gpu", "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT")
    with pytest.raises(RuntimeError, match="leave it out of XLA_FLAGS"):
        check_flags("gpu", f"--xla_dump_to=x {flag}")


def test_a_plan_arrives_before_the_pages_of_its_step(make_engine, load, monkeypatch):
    engine, sent = make_engine(), []
    put, step = jax.device_put, engine.device_steps.step_function
    touched = offload._touched

    def note_put(x, *where):
        if x.ndim == 1:
            sent.extend(["plan"] * (not where))  # page ids name a device
        elif where[0].memory_kind != "pinned_host":
            sent.append("pages")
        return put(x, *where)

    def note_touched(buffer):
        sent.append("plan touched")
        return touched(buffer)

    def note_step(*args):
        sent.append("step")
        return step(*args)

    monkeypatch.setattr(jax, "device_put", note_put)
    monkeypatch.setattr(engine.device_steps, "step_function", note_step)
    monkeypatch.setattr(offload, "_touched", note_touched)
    decode(engine, load)
    assert sent.count("pages") > 10 and sent.count("plan") == sent.count("step")
    pairs = set(itertools.pairwise(sent))
    assert {("plan", "pages"), ("step", "pages")}.isdisjoint(pairs)
    assert ("plan touched", "pages") in pairs


def test_a_lost_page_would_be_noticed(make_engine, load, plain, monkeypatch):
    monkeypatch.setattr(
        "sparsespec_jax.device.offload._scatter", lambda pools, *_: pools
    )
    engine = make_engine()
    assert tokens_of(decode(engine, load)) != plain


def test_weights_may_change_between_steps(tiny_model, make_engine, load):
    engine = make_engine()
    prompts, _ = load
    law = SamplingParams(temperature=1, max_tokens=30, seed=1)
    base = decode(make_engine(), (prompts[:1], [law]))[0].token_ids
    engine.add_request(prompts[0], law)
    results = []
    for _ in range(12):
        results += engine.step()
    results += engine.pause()
    given = engine.num_emitted_tokens
    assert 0 < given < 30 and not results
    scaled = {
        **engine.params,
        "embed": {"weight": engine.params["embed"]["weight"] * 2},
    }
    engine.update_params(scaled)
    while engine.has_work:
        results += engine.step()
    assert results[0].params_versions == ((0, given), (1, 30 - given))
    assert results[0].token_ids[:given] == base[:given]
    assert results[0].token_ids != base
    with pytest.raises(ValueError, match="names, shapes and types"):
        engine.update_params({"embed": scaled["embed"]})


def test_without_copies_the_schedule_is_the_same(tiny_model):
    """The yardstick of experiments.offload differs in the copies alone."""
    load = pressure.make_load(97, num_requests=12, prompt_length=20, new_tokens=24)
    speculation = dataclasses.replace(
        SPECULATION, acceptor="forced", forced_acceptance=2.0
    )
    pages = pressure.pool_pages(load, share=0.5, page_size=4, speculation=speculation)
    config = dataclasses.replace(CONFIG, num_slots=12, num_pages=pages)
    runs = {
        copies: pressure.run_mode(tiny_model, load, speculation, config, copies=copies)
        for copies in (True, False)
    }
    assert runs[True]["spilled_gib"] > 0
    for name in ("steps", "tokens", "spilled_gib", "restored_gib", "mean_running"):
        assert runs[True][name] == runs[False][name]
    metrics = pressure.metrics_of(
        {"offload": [runs[True]], "offload_without_copies": [runs[False]]}
    )
    assert metrics["offload_over_offload"] == 1
    assert metrics["offload_over_offload_without_copies"] > 0


def test_host_memory_that_is_not_there_is_refused(tiny_model):
    with pytest.raises(ValueError, match="at most [0-9]+ pages of [0-9]+ bytes fit"):
        Engine(
            tiny_model,
            speculation=SPECULATION,
            engine=dataclasses.replace(CONFIG, host_pages=2**31 - 1),
        )
