"""Aligned steps: a cycle of all slots in one program, with the tokens of any other."""

import dataclasses

import numpy as np
import pytest

from sparsespec_jax import Engine, SpeculationConfig
from sparsespec_jax.plan.buffer import orders_of
from sparsespec_jax.tuning import calibrate
from tests.engine_helpers import (
    ENGINE,
    LAWS,
    SPECULATION,
    num_compilations,
    run,
    tokens_of,
)
from tests.fake_device import make_shape
from tests.test_lossless import CASES

ALIGNED = dataclasses.replace(SPECULATION, schedule="aligned")


@pytest.fixture(scope="module")
def plain(tiny_model, prompts):
    return run(tiny_model, prompts, num_draft_tokens=0)


# Several options in each, so that few programs are compiled; all of them: see below.
COMBINED = {
    "nine slots in a tight pool, two chunks, lag 2": (
        dict(min_budget=1, budget_ratio=0.01, num_draft_tokens=8),
        dict(num_slots=9, num_pages=60, lag=2, prefill_lanes=2),
    ),
    "recomputed, pages of one, lag 0": (
        dict(policy="window", num_draft_tokens=1),
        dict(num_pages=130, page_size=1, kv_policy="recompute", lag=0),
    ),
    "a selection for every draft": (dict(policy="quest_step"), dict()),
    "a memory, its own counts": (dict(policy="h2o", mass_rows="edges"), dict()),
    "guesses": (dict(proposer="cascade"), dict(page_size=8)),
}


@pytest.mark.parametrize("speculation, engine", COMBINED.values(), ids=COMBINED)
def test_aligned_steps_change_no_token(tiny_model, prompts, plain, speculation, engine):
    got = run(tiny_model, prompts, engine=engine, schedule="aligned", **speculation)
    assert tokens_of(got) == tokens_of(plain)
    for a, b in zip(got, plain, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert got.stats.total.num_accepted_draft_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("speculation, engine", CASES.values(), ids=CASES)
def test_no_option_changes_a_token(tiny_model, prompts, plain, speculation, engine):
    got = run(tiny_model, prompts, engine=engine, schedule="aligned", **speculation)
    assert tokens_of(got) == tokens_of(plain)


def test_drafts_are_those_of_mixed_steps_in_fewer_calls(tiny_model, prompts, plain):
    """One call a cycle, and no request waits for a phase: no short cycles either."""
    mixed = run(tiny_model, prompts).stats
    aligned = run(tiny_model, prompts, schedule="aligned")
    assert tokens_of(aligned) == tokens_of(plain)
    aligned, names = aligned.stats, ("accepted_histogram", "num_draft_tokens")
    for name in names:
        assert getattr(aligned.total, name) == getattr(mixed.total, name)
    assert aligned.total.num_short_steps == 0
    assert aligned.num_steps < mixed.num_steps / 2


def test_a_greedy_ratio_test_and_a_dense_draft(tiny_model, prompts):
    """Drafts that read everything are all accepted: the KV rows of each are the next's.

    And the law of a draft is kept for the acceptor that needs it.
    """
    laws = [dataclasses.replace(law, temperature=0) for law in LAWS]
    base = run(tiny_model, prompts, laws, num_draft_tokens=0)
    dense = dict(acceptor="ratio_test", draft_top_m=8, policy="full", budget_ratio=1.0)
    got = run(tiny_model, prompts, laws, schedule="aligned", **dense)
    assert tokens_of(got) == tokens_of(base)
    histogram = got.stats.total.accepted_histogram
    assert histogram[:-1] == [0, 0, 0] and histogram[-1] > 20


def test_another_k_and_preemption_at_any_step(tiny_model, prompts, plain):
    """k = 0 is a plain step; prompts then go with it, as ever."""
    engine = Engine(
        tiny_model,
        speculation=dataclasses.replace(ALIGNED, draft_token_choices=(0, 1)),
        engine=dataclasses.replace(ENGINE, max_length=256),
    )
    ids = [engine.add_request(*pair) for pair in zip(prompts, LAWS, strict=True)]
    engine.warm_up()
    compiled = num_compilations(engine)
    rng, results, scheduler = np.random.default_rng(0), {}, engine._scheduler
    while engine.has_work:
        if rng.random() < 0.2:
            engine.set_num_draft_tokens(int(rng.choice([0, 1, 3])))
        active = [r for r in scheduler.slots if r is not None]
        if len(active) > 2 and rng.random() < 0.1:
            scheduler.preempt(active[rng.integers(len(active))])
        results |= {r.request_id: r for r in engine.step()}
    assert tokens_of([results[i] for i in ids]) == tokens_of(plain)
    assert num_compilations(engine) == compiled
    assert engine.kv_usage["preemptions"] > 0
    costs = calibrate.measure(engine, [20])
    assert sorted(costs) == [0, 1, 3] and all(t > 0 for [(_, t)] in costs.values())


def test_a_proposer_that_drafts_at_once_is_aligned_anyway(tiny_model, prompts, plain):
    got = run(tiny_model, prompts, proposer="ngram", schedule="aligned")
    assert tokens_of(got) == tokens_of(plain)
    shape = make_shape(slots=3, k=4, pages=9, is_aligned=True, drafts_at_once=True)
    assert not shape.runs_cycles and shape.parts()[0] == (shape, 0)


def test_lanes_of_the_parts():
    """Rows of every pass are a multiple of 8 where idle lanes can make them one."""
    shape = make_shape(slots=6, k=4, pages=9, is_aligned=True, lanes=2)
    assert (shape.cycle, shape.draft_lanes, shape.verify_lanes) == (1, 6, 6)
    lanes = [(p.part, p.draft_lanes, p.verify_lanes, n) for p, n in shape.parts()]
    assert lanes == [("draft", 6, 0, 0), ("verify", 2, 6, 0), ("prompt", 0, 0, 2)]
    even = make_shape(slots=8, k=4, pages=9, is_aligned=True).of("verify")
    assert even.draft_lanes == 0
    orders = dict(
        draft_slots=np.arange(6), verify_slots=np.arange(6), seed_counts=np.arange(6),
        slot_params=np.zeros((6, 3)),
    )  # fmt: skip
    verified = orders_of(shape.of("verify"), orders)
    assert verified["draft_slots"].tolist() == [6, 6]  # of no slot
    assert verified["verify_slots"].tolist() == list(range(6))
    drafted = orders_of(shape.of("draft"), orders)
    assert drafted["draft_slots"].tolist() == list(range(6))
    assert not drafted["verify_slots"].size and not drafted["seed_counts"].size
    assert len(drafted["slot_params"]) == 6


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule must be one of .*, got 'naive'"):
        SpeculationConfig(schedule="naive")
