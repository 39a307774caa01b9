"""The choice of k from measured step times, and the measurement itself."""

import dataclasses
import json
import math

import numpy as np
import pytest

from sparsespec_jax import Engine
from sparsespec_jax.host.cost_model import Chooser, CostModel, accepted_drafts
from sparsespec_jax.tuning import calibrate
from tests import engine_helpers
from tests.engine_helpers import ENGINE, LAWS, SPECULATION, make_prompts, run, tokens_of

NAN = math.nan

# Weights take 1 s a step; KV of plain decoding 1 s per 1000 tokens, of k = 4 a fifth
# for verification and a tenth for drafts.
MODEL = CostModel({0: ((0, 1.0), (1000, 2.0)), 4: ((0, 1.0), (1000, 1.3))})


def test_time_is_linear_between_and_beyond_the_points():
    assert MODEL.seconds(0, 0) == 1.0
    assert MODEL.seconds(0, 500) == pytest.approx(1.5)
    assert MODEL.seconds(4, 3000) == pytest.approx(1.9)


def test_expected_acceptance_from_shares_by_position():
    assert accepted_drafts((0.9, 0.8, 0.7), 2) == pytest.approx(1.7)
    assert accepted_drafts((0.5, 0.25, NAN), 3) == pytest.approx(0.875)
    assert accepted_drafts((NAN, NAN), 1) == pytest.approx(0.8)
    assert accepted_drafts((0.0, NAN), 2) == 0.0
    assert accepted_drafts((), 0) == 0.0


def test_rate_of_a_hand_computed_load():
    load = dict(num_running=10, context_tokens=1000, acceptance=(0.9,) * 4)
    assert MODEL.tokens_per_s(0, **load) == pytest.approx(10 / 2.0)
    assert MODEL.tokens_per_s(4, **load) == pytest.approx(10 * 4.6 / (5 * 1.3))


@pytest.mark.parametrize(
    ("context_tokens", "share", "wanted"),
    [(0, 0.9, 0), (1000, 0.9, 4), (1000, 0.2, 0), (100_000, 0.5, 4)],
)
def test_the_chooser_picks_the_faster_k(context_tokens, share, wanted):
    choose = Chooser(MODEL)
    load = dict(num_running=4, acceptance=(share,) * 4)
    assert choose(context_tokens=context_tokens, **load) == wanted


def test_the_chooser_stays_for_less_than_the_margin():
    nearly = CostModel({0: ((0, 1.0), (10, 1.0)), 1: ((0, 1.0), (10, 1.0))})
    load = dict(num_running=1, context_tokens=5)
    choose = Chooser(nearly, margin=0.03)
    assert choose(acceptance=(0.99,), **load) == 1
    assert choose(acceptance=(0.5,), **load) == 0
    assert choose(acceptance=(0.99,), **load) == 0  # 2 % of an equal rate less
    assert choose(num_running=0, context_tokens=0, acceptance=(1.0,)) == 0


def test_a_step_takes_no_less_than_the_host():
    load = dict(num_running=10, context_tokens=1000, acceptance=(0.9,) * 4)
    slow = 1.6
    assert MODEL.tokens_per_s(0, **load, host_seconds=slow) == pytest.approx(10 / 2.0)
    rate = MODEL.tokens_per_s(4, **load, host_seconds=slow)
    assert rate == pytest.approx(10 * 4.6 / (5 * slow))
    # 0.44 tokens a second of k = 4 against 0.5 of none, and 0.54 without a host.
    load["acceptance"] = (0.9, 0.8, 0.5, 0.3)
    choose = Chooser(MODEL)
    assert choose(**load) == 4
    assert choose(**load, host_seconds=slow) == 0
    assert choose(**load, host_seconds=1.0) == 4  # steps of 1.6 s had more to do
    assert choose(**load, host_seconds=slow) == 4


# As SmolLM2 with 256 slots on an H100 (seconds): the device's time of a step, and what
# the loop around it takes.
DEVICE = CostModel(
    {0: ((0, 1.4e-3), (1080e3, 10.8e-3)), 8: ((0, 1.9e-3), (1080e3, 4.0e-3))}
)
HOST = 3.8e-3


def seconds_to_end(new_tokens, shares, choose, host_seconds):
    """Time until 256 requests have ended, 64 steps at a time."""
    shares, total = np.asarray(shares, float), 0.0
    contexts, remaining = (np.full(shares.size, x, float) for x in (128, new_tokens))
    while remaining.size:
        k = choose(
            num_running=remaining.size,
            context_tokens=contexts.sum(),
            acceptance=tuple(np.mean(shares**i) for i in range(1, 9)),
            host_seconds=host_seconds,
        )
        rate = (1 + sum(shares**i for i in range(1, k + 1))) / (k + 1)
        steps = min(64.0, np.max(remaining / rate))
        total += steps * max(HOST, DEVICE.seconds(k, contexts.sum()))
        made = np.minimum(steps * rate, remaining)
        contexts, remaining = contexts + made, remaining - made
        left = remaining > 1e-6
        contexts, remaining, shares = contexts[left], remaining[left], shares[left]
    return total


@pytest.mark.parametrize("new_tokens", [4000, 7600])
@pytest.mark.parametrize(
    ("num_fast", "slow"), [(100, 0.6), (118, 0.7), (100, 0.75), (50, 0.85), (0, 0.86)]
)
def test_a_small_model_is_not_slowed_by_speculation(new_tokens, num_fast, slow):
    """Some requests accept nearly everything, the others a draft with `slow`."""
    shares = [0.999] * num_fast + [slow] * (256 - num_fast)
    plain = seconds_to_end(new_tokens, shares, lambda **load: 0, HOST)
    chosen = seconds_to_end(new_tokens, shares, Chooser(DEVICE), HOST)
    blind = seconds_to_end(new_tokens, shares, Chooser(DEVICE), 0.0)
    assert chosen < plain
    assert chosen < 0.99 * blind


@pytest.mark.parametrize("points", [(), ((0, 1.0),), ((5, 1.0), (5, 2.0))])
def test_a_cost_model_needs_two_context_sizes(points):
    with pytest.raises(ValueError, match="at least two"):
        CostModel({0: points})


@pytest.fixture
def engine(tiny_model):
    speculation = dataclasses.replace(SPECULATION, draft_token_choices=(0, 3))
    config = dataclasses.replace(ENGINE, max_length=160)
    return Engine(tiny_model, speculation=speculation, engine=config)


def test_measured_once_then_read(engine, tmp_path):
    first = calibrate.load_or_measure(engine, tmp_path)
    assert set(first.steps) == {0, 3}
    for points in first.steps.values():
        assert [t for t, _ in points] == sorted({t for t, _ in points})
        assert all(seconds > 0 for _, seconds in points)
    (path,) = tmp_path.glob("*.json")
    recorded = json.loads(path.read_text())
    recorded["steps"]["0"][0][1] = 123.0
    path.write_text(json.dumps(recorded))
    assert calibrate.load_or_measure(engine, tmp_path).steps[0][0][1] == 123.0


def test_an_engine_that_was_measured_and_chooses_emits_the_same(tiny_model, engine):
    prompts = make_prompts(tiny_model.config.vocab_size)
    plain = tokens_of(run(tiny_model, prompts, num_draft_tokens=0))
    engine.warm_up()
    engine.choose_with(Chooser(CostModel(calibrate.measure(engine))))
    compiled = engine_helpers.num_compilations(engine)
    ids = [engine.add_request(p, law) for p, law in zip(prompts, LAWS, strict=True)]
    results = {}
    while engine.has_work:
        results |= {r.request_id: r for r in engine.step()}
    assert [results[i].token_ids for i in ids] == plain
    assert engine_helpers.num_compilations(engine) == compiled


def test_measuring_needs_lengths_that_fit_and_nothing_begun(engine):
    with pytest.raises(ValueError, match="lengths must lie"):
        calibrate.measure(engine, [10**6])
    engine.add_request([1, 2, 3], LAWS[0])
    engine.step()
    with pytest.raises(ValueError, match="begun requests that are unfinished"):
        calibrate.measure(engine)


@pytest.mark.parametrize("spare", range(3))
def test_made_up_caches_lie_within_the_pool(tiny_model, spare):
    pages = 3 * 45 + spare  # 3 slots
    config = dataclasses.replace(ENGINE, num_pages=pages, max_length=160)
    engine = Engine(tiny_model, speculation=SPECULATION, engine=config)
    fields = calibrate._state_fields(engine, calibrate.longest_context(engine))
    full, draft = (fields[name].ravel() for name in ("full_table", "draft_table"))
    used = [int(page) for page in (*full, *draft) if page != pages]
    assert len(used) == len(set(used)) and max(used) < pages
    assert all(page < pages for page in draft.tolist())
