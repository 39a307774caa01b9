"""Another k between any two steps: no token changes, nothing compiles."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsespec_jax import Engine, SpeculationConfig
from tests import engine_helpers
from tests.engine_helpers import ENGINE, LAWS, SPECULATION, run, tokens_of

CHOICES = (0, 1, 3)


def make_engine(model, *, lag=1, choose=None, **speculation):
    return Engine(
        model,
        speculation=dataclasses.replace(
            SPECULATION, draft_token_choices=CHOICES, **speculation
        ),
        engine=dataclasses.replace(ENGINE, lag=lag, max_length=100),
        choose_num_draft_tokens=choose,
    )


def decode_switching(engine, prompts, laws, switches):
    """Tokens in order; `switches` yields the k of a step, or None to keep it."""
    ids = [engine.add_request(p, law) for p, law in zip(prompts, laws, strict=True)]
    results = {}
    while engine.has_work:
        k = next(switches, None)
        if k is not None:
            engine.set_num_draft_tokens(k)
            assert engine.num_draft_tokens == k
        results |= {r.request_id: r for r in engine.step()}
    return [results[i] for i in ids]


def random_switches(seed, share):
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.choice(CHOICES)) if rng.random() < share else None


@settings(max_examples=12, deadline=None)
@given(
    lag=st.integers(0, 2),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.05, 0.3]),
)
def test_random_switches_change_no_token(tiny_model, prompts, plain, lag, seed, share):
    engine = make_engine(tiny_model, lag=lag)
    got = decode_switching(engine, prompts, LAWS, random_switches(seed, share))
    assert tokens_of(got) == plain
    assert engine._scheduler.kv.num_free == engine.shape.num_pages


@pytest.mark.parametrize("first, then", [(3, 0), (0, 3), (3, 1), (1, 3)])
def test_one_switch_goes_on_drafting_with_the_new_k(
    tiny_model, prompts, plain, first, then
):
    engine = make_engine(tiny_model)
    switches = iter([first] + [None] * 24 + [then])
    got = decode_switching(engine, prompts, LAWS, switches)
    assert tokens_of(got) == plain
    histograms = np.sum([r.metrics.accepted_histogram for r in got], axis=0)
    most = max(first, then)
    assert histograms[: most + 1].sum() > 0 and not histograms[most + 1 :].any()
    assert sum(r.metrics.num_short_steps for r in got) > 0  # the pending token alone


def test_switches_with_the_ratio_test_keep_greedy_text(tiny_model, prompts):
    laws = [dataclasses.replace(law, temperature=0) for law in LAWS]
    base = run(tiny_model, prompts, laws, num_draft_tokens=0)
    engine = make_engine(tiny_model, acceptor="ratio_test", draft_top_m=4)
    got = decode_switching(engine, prompts, laws, random_switches(1, 0.2))
    assert tokens_of(got) == tokens_of(base)


def test_nothing_compiles_after_warm_up(tiny_model, prompts):
    engine = make_engine(tiny_model, lag=2)
    engine.warm_up()
    compiled = engine_helpers.num_compilations(engine)
    assert compiled >= 2 * len(CHOICES)
    decode_switching(engine, prompts, LAWS, random_switches(2, 0.3))
    assert engine_helpers.num_compilations(engine) == compiled


def test_a_chooser_sees_the_load_and_sets_k(tiny_model, prompts, plain):
    calls = []

    def choose(**load):
        calls.append(load)
        return CHOICES[len(calls) % 3]

    engine = make_engine(tiny_model, choose=choose)
    got = decode_switching(engine, prompts, LAWS, iter(()))
    assert tokens_of(got) == plain
    assert len(calls) >= 2 and engine.num_draft_tokens == CHOICES[len(calls) % 3]
    assert calls[0]["num_running"] == 0
    assert 1 <= calls[1]["num_running"] <= 3 and calls[1]["context_tokens"] > 30
    assert len(calls[1]["acceptance"]) == 3
    known = [a for a in calls[-1]["acceptance"] if not np.isnan(a)]
    assert known and all(0 <= a <= 1 for a in known)
    assert calls[0]["host_seconds"] == 0
    assert all(0 < call["host_seconds"] < 60 for call in calls[1:])


def test_other_values_of_k_are_refused(tiny_model):
    engine = make_engine(tiny_model)
    with pytest.raises(ValueError, match=r"one of \(0, 1, 3\), got 2"):
        engine.set_num_draft_tokens(2)
    with pytest.raises(ValueError, match=r"draft_token_choices must be .* in \[0, 3\]"):
        SpeculationConfig(num_draft_tokens=3, draft_token_choices=(4,))
