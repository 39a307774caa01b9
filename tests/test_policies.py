"""Every policy: valid selections by hand-made numbers, and never another token."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import TINY
from experiments.models import tiny_model as tiny_model_of
from sparsespec_jax import Engine, Policy
from sparsespec_jax.device import filling
from sparsespec_jax.models.transformer import init_params
from sparsespec_jax.policies.base import SelectionOptions, SelectionView, top_tokens
from sparsespec_jax.policies.keys import (
    coded_keys,
    index_step,
    label_scores,
    page_scores,
)
from sparsespec_jax.policies.mass import mass_policy
from sparsespec_jax.policies.select import POLICIES, load_policy, resolve_policy
from tests.engine_helpers import ENGINE, LAWS, SPECULATION, make_prompts
from tests.test_step_aot import compile_step

LANES, HEADS, KEYS, ROWS, SIZE = 3, 2, 40, 4, 8
OPTIONS = SelectionOptions(
    cap=12, per_layer=False, num_recent=0, num_sinks=2, impl="reference"
)
LENGTHS, BUDGETS = (40, 25, 7), (8, 12, 12)


def make_view(*, seed=0, state=None, is_first=True, mass=None, **changes):
    """A view of random numbers: three lanes, two KV heads of two query heads each."""
    rng = np.random.default_rng(seed)
    lengths = jnp.array(LENGTHS, jnp.int32)
    if mass is None:
        mass = rng.exponential(size=(LANES, HEADS, KEYS)).astype(np.float32)
    inside = np.arange(KEYS)[None, None] < np.array(LENGTHS)[:, None, None]
    keys = rng.normal(size=(LANES, HEADS, KEYS, SIZE)).astype(np.float32)
    view = SelectionView(
        mass=jnp.asarray(np.where(inside, mass, 0)),
        queries=jnp.asarray(rng.normal(size=(LANES, ROWS, 4, SIZE)), jnp.float32),
        keys=lambda: jnp.asarray(keys),
        num_queries=jnp.array([4, 3, 1], jnp.int32),
        lengths=lengths,
        budgets=jnp.array(BUDGETS, jnp.int32),
        is_first=jnp.full(LANES, is_first),
        state=state,
        seeds=jnp.zeros((LANES, 2), jnp.uint32),
        layer_index=0,
        num_kv_heads=HEADS,
        num_keys=KEYS,
    )
    return view._replace(**changes)


def zero_state(policy):
    if policy.state_shape is None:
        return None
    return jnp.zeros((LANES, *policy.state_shape(HEADS, KEYS)))


def sets(result, lane, head):
    indices, counts = np.asarray(result[0]), np.asarray(result[1])
    head = min(head, indices.shape[1] - 1)
    chosen = indices[lane, head, : counts[lane, head]].tolist()
    assert len(set(chosen)) == len(chosen)
    return set(chosen)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_returns_distinct_candidates_within_the_budget(name):
    policy = POLICIES[name]
    result = policy.select(make_view(state=zero_state(policy)), OPTIONS)
    assert result[0].dtype == result[1].dtype == jnp.int32
    for lane, (length, budget) in enumerate(zip(LENGTHS, BUDGETS, strict=True)):
        most = min(length, budget)
        for head in range(HEADS):
            chosen = sets(result, lane, head)
            assert chosen <= set(range(length))
            assert len(chosen) <= most
            if policy.fixed_counts or policy.per_step:
                assert len(chosen) == most
    if policy.state_shape:
        assert result[2].shape == zero_state(policy).shape


def top_of(scores, lane, head, count=None):
    scores = np.asarray(scores)[lane, head, : LENGTHS[lane]]
    order = np.argsort(-scores, kind="stable")
    return set(order[: count or min(BUDGETS[lane], LENGTHS[lane])].tolist())


def test_pillar_takes_the_largest_mass_of_each_head():
    view = make_view()
    result = POLICIES["pillar"].select(view, OPTIONS)
    for lane in range(LANES):
        for head in range(HEADS):
            assert sets(result, lane, head) == top_of(view.mass, lane, head)


def test_vegas_shares_one_set_per_layer():
    view = make_view()
    assert POLICIES["vegas"].mass_rows("all") == "edges"
    result = POLICIES["vegas"].select(view, OPTIONS)
    assert result[0].shape == (LANES, 1, OPTIONS.cap)
    total = view.mass.sum(1, keepdims=True)
    assert sets(result, 0, 0) == top_of(total, 0, 0)


def test_last_row_mass_is_that_rows_softmax():
    view = make_view()
    result = POLICIES["pillar_last"].select(view, OPTIONS)
    # Lane 1: its third and last valid row, 25 candidates and 3 rows behind them.
    keys, query = np.asarray(view.keys())[1, 0, :28], np.asarray(view.queries)[1, 2]
    logits = query[:2] @ keys.T / np.sqrt(SIZE)
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = set(np.argsort(-prob.mean(0)[:25])[:12].tolist())
    assert sets(result, 1, 0) == expected


def test_top_p_keeps_the_smallest_set_that_holds_the_mass():
    mass = np.full((LANES, HEADS, KEYS), 0.001, np.float32)
    mass[0, 0, [3, 30]] = 0.5, 0.46  # 0.96 of 0.998 in two keys
    mass[0, 1, 5] = 0.9
    view = make_view(mass=mass)
    result = mass_policy("t", top_p=0.95).select(view, OPTIONS)
    assert sets(result, 0, 0) == {3, 30}
    assert sets(result, 0, 1) == {5}
    assert len(sets(result, 1, 0)) == BUDGETS[1]  # flat mass: the budget is the limit


def test_decay_and_window_add_earlier_masses():
    first, second, third = (make_view(seed=s).mass for s in range(3))
    decay, window = mass_policy("d", decay=0.5), mass_policy("w", window=2)
    state = {p.name: zero_state(p) for p in (decay, window)}
    for seed in range(3):
        for policy in (decay, window):
            view = make_view(seed=seed, state=state[policy.name], is_first=seed == 0)
            *result, state[policy.name] = policy.select(view, OPTIONS)
            if policy is decay:
                decayed = result
    expected = third + 0.5 * (second + 0.5 * first)
    np.testing.assert_allclose(state["d"][:, 0], expected, rtol=1e-6)
    assert sets(decayed, 0, 1) == top_of(expected, 0, 1)
    assert sets(result, 0, 1) == top_of(third + second, 0, 1)


def test_snapkv_keeps_the_first_masses_smoothed():
    policy = mass_policy("s", frozen=True, smooth=5)
    view = make_view(state=zero_state(policy))
    first = policy.select(view, OPTIONS)
    later = policy.select(make_view(seed=9, state=first[2], is_first=False), OPTIONS)
    for lane in range(LANES):
        assert sets(first, lane, 0) == sets(later, lane, 0)
    padded = np.pad(np.asarray(view.mass), ((0, 0), (0, 0), (2, 2)))
    pooled = sum(padded[..., i : i + KEYS] for i in range(5))
    assert sets(first, 0, 1) == top_of(pooled, 0, 1)


def test_h2o_gives_half_of_the_budget_to_the_newest():
    policy = POLICIES["h2o"]
    view = make_view(state=zero_state(policy))
    result = policy.select(view, OPTIONS)
    chosen = sets(result, 0, 0)
    assert chosen >= set(range(36, 40))
    old = np.asarray(view.mass)[0, 0, :36]
    assert chosen - set(range(36, 40)) == set(np.argsort(-old)[:4].tolist())


def test_churn_is_limited():
    policy = mass_policy("c", max_churn=0.25)
    first = policy.select(make_view(state=zero_state(policy)), OPTIONS)
    again = policy.select(make_view(seed=5, state=first[2], is_first=False), OPTIONS)
    free = POLICIES["pillar"].select(make_view(seed=5), OPTIONS)
    for lane, limit in ((0, 2), (1, 3)):
        for head in range(HEADS):
            before, after = sets(first, lane, head), sets(again, lane, head)
            assert len(after) == BUDGETS[lane]
            assert len(after - before) <= limit
            assert len(sets(free, lane, head) - before) > limit  # the limit binds


def test_widening_follows_a_heavy_key():
    mass = np.zeros((LANES, HEADS, KEYS), np.float32)
    mass[:, :, 10] = 1.0
    result = POLICIES["pillar_widened"].select(make_view(mass=mass), OPTIONS)
    assert sets(result, 0, 0) == set(range(10, 18))


def test_coded_keys_by_hand():
    keys = jnp.array([0.0, 1.0, 1.6, 3.0, -1.0, 9.0]).reshape(1, 1, 6, 1)
    used = jnp.array([True] * 5 + [False]).reshape(1, 1, 6)
    coded, ranges = coded_keys(keys, used, bits=2, page_size=4)
    # Levels 0, 1, 2, 3 in the first page; the second holds one key, its own range.
    np.testing.assert_allclose(coded[0, 0, :5, 0], [0, 1, 2, 3, -1], atol=1e-6)
    assert coded[0, 0, 5, 0] == 0
    np.testing.assert_allclose(ranges, 1.5)  # 3 and 0, mean over two pages


def test_an_index_of_many_bits_and_all_channels_is_exact():
    view = make_view()
    result = index_step("i", num_channels=SIZE, bits=16).select(view, OPTIONS)
    query = np.asarray(view.queries)[:, 0].reshape(LANES, HEADS, 2, SIZE)
    logits = np.einsum("lhgd,lhkd->lhgk", query, view.keys()) * SIZE**-0.5
    inside = np.arange(KEYS) < np.array(LENGTHS)[:, None, None, None]
    law = np.exp(np.where(inside, logits, -np.inf))
    mass = (law / law.sum(-1, keepdims=True)).mean(2)
    for lane in range(LANES):
        for head in range(HEADS):
            assert sets(result, lane, head) == top_of(mass, lane, head)


def test_an_index_reads_the_channels_that_tell_keys_apart():
    """Channel 3 varies, channel 5 is larger but the same for all keys of a page."""
    keys = np.zeros((LANES, HEADS, KEYS, SIZE), np.float32)
    keys[..., 3] = np.arange(KEYS) % 10
    keys[..., 5] = 50
    view = make_view(queries=jnp.ones((LANES, 1, 4, SIZE)), keys=lambda: keys)
    result = index_step("i", num_channels=1, bits=4).select(view, OPTIONS)
    assert sets(result, 0, 0) == {8, 9, 18, 19, 28, 29, 38, 39}


def test_quest_scores_are_upper_bounds_of_the_pages_logits():
    view = make_view(num_queries=jnp.array([1, 1, 1], jnp.int32))
    scores = np.asarray(page_scores(view, 8))
    keys, queries = np.asarray(view.keys()), np.asarray(view.queries)
    for lane, length in enumerate(LENGTHS):
        logits = np.einsum("gd,kd->gk", queries[lane, 0, :2], keys[lane, 0])
        for page in range(-(-length // 8)):
            inside = slice(page * 8, min(page * 8 + 8, length))
            assert scores[lane, 0, page * 8] >= logits.sum(0)[inside].max() - 1e-4
            low, high = keys[lane, 0, inside].min(0), keys[lane, 0, inside].max(0)
            q = queries[lane, 0, :2]
            bound = np.maximum(q * low, q * high).sum()
            np.testing.assert_allclose(scores[lane, 0, page * 8], bound, rtol=1e-4)


def test_double_sparsity_with_all_channels_is_the_exact_logit():
    view = make_view(num_queries=jnp.array([1, 1, 1], jnp.int32))
    exact = np.einsum(
        "gd,kd->k", np.asarray(view.queries)[0, 0, :2], np.asarray(view.keys())[0, 0]
    )
    got = np.asarray(label_scores(view, SIZE))[0, 0]
    np.testing.assert_allclose(got[:40], exact[:40], rtol=1e-4, atol=1e-5)
    few = np.asarray(label_scores(view, 2))[0, 0]
    assert not np.allclose(few[:40], exact[:40], rtol=1e-2)


def test_lserve_streams_the_upper_half_of_the_heads():
    result = POLICIES["lserve"].select(make_view(), OPTIONS)
    assert sets(result, 0, 1) == {0, 1, *range(34, 40)}
    assert sets(result, 0, 0) != sets(result, 0, 1)


# -- in the engine ------------------------------------------------------------------


def continued(model, **speculation):
    """Token ids and metrics of short prompts, whose steps never prefill."""
    engine = Engine(
        model,
        speculation=dataclasses.replace(SPECULATION, **speculation),
        engine=dataclasses.replace(ENGINE, max_length=48),
    )
    for prompt, law in zip(make_prompts(97, (1, 2, 4, 3, 4)), LAWS, strict=False):
        engine.add_request(prompt, law)
    results = {}
    while engine.has_work:
        results |= {r.request_id: r for r in engine.step()}
    return [results[i].token_ids for i in sorted(results)], engine.stats(0.0).requests


@pytest.fixture(scope="module")
def by_policy(tiny_model):
    """`continued` of each policy with the same options, run once."""
    return functools.cache(lambda name: continued(tiny_model, policy=name))


@pytest.fixture(scope="module")
def short_plain(tiny_model):
    return continued(tiny_model, num_draft_tokens=0)[0]


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_changes_a_token(by_policy, short_plain, name):
    tokens, metrics = by_policy(name)
    assert tokens == short_plain
    assert sum(m.num_verify_steps for m in metrics) > 20


@pytest.mark.parametrize("name", ["oracle", "quest_step"])
def test_a_per_step_policy_with_the_whole_budget_is_a_dense_draft(tiny_model, name):
    _, metrics = continued(tiny_model, policy=name, budget_ratio=1.0)
    histogram = sum(metrics[1:], start=metrics[0]).accepted_histogram
    assert histogram[:-1] == [0, 0, 0] and histogram[-1] > 20


def test_the_oracle_accepts_more_than_its_round_form(by_policy):
    accepted = {}
    for name in ("oracle", "pillar", "recents"):
        _, metrics = by_policy(name)
        accepted[name] = sum(m.num_accepted_draft_tokens for m in metrics)
    assert accepted["oracle"] > accepted["pillar"] > accepted["recents"]


@pytest.mark.usefixtures("optimized_programs")
def test_a_per_step_policy_compiles_beside_the_gpu_kernels():
    pytest.importorskip("jax_cuda13_plugin")
    compiled, _ = compile_step("h100", 8, policy="oracle")
    assert "mosaic_gpu" in compiled.compiled.as_text()


def test_state_starts_anew_with_each_request(tiny_model, short_plain):
    """More requests than slots: a slot's second request must not inherit."""
    seen = []

    def spy(view, options):
        def note(first, state):
            seen.append((np.asarray(first), np.asarray(state)))

        jax.debug.callback(note, view.is_first, view.state)
        indices, counts = top_tokens(view, view.mass, options)
        return indices, counts, view.state + 1

    policy = Policy("spy", ("mass",), spy, state_shape=lambda heads, keys: (2,))
    assert continued(tiny_model, policy=policy)[0] == short_plain
    assert len(short_plain) > ENGINE.num_slots
    jax.effects_barrier()
    firsts = [state for first, state in seen if first.any()]
    assert len(firsts) == len(short_plain) * tiny_model.config.num_layers
    assert all((state == 0).all() for state in firsts)
    assert max(state.max() for _, state in seen) > 5


def test_anchor_layers_share_the_set_below(tiny_model, short_plain):
    layers = []

    def spy(view, options):
        layers.append(view.layer_index)
        return top_tokens(view, view.mass, options)

    for fixed in (False, True):
        policy = Policy("spy", ("mass",), spy, anchor_every=2, fixed_counts=fixed)
        assert continued(tiny_model, policy=policy)[0] == short_plain
    assert set(layers) == {0}


@pytest.mark.parametrize("anchor_every, num_layers", [(1, 3), (2, 5)])
def test_layers_selected_at_once_select_what_each_would(
    anchor_every, num_layers, monkeypatch
):
    """Three that select, in groups of two: the same tokens after the same drafts."""
    monkeypatch.setattr(filling, "_LAYERS_AT_ONCE", 2)
    config = dataclasses.replace(TINY, num_layers=num_layers)
    model = dataclasses.replace(
        tiny_model_of(), config=config, params=init_params(config, seed=0)
    )
    small = dict(min_budget=6, budget_ratio=1e-3)
    seen = {}
    for at_once in (False, True):
        policy = dataclasses.replace(
            resolve_policy("pillar"), layers_at_once=at_once, anchor_every=anchor_every
        )
        tokens, metrics = continued(model, policy=policy, **small)
        seen[at_once] = tokens, [m.accepted_histogram for m in metrics]
    assert seen[True] == seen[False]
    assert 0 < sum(sum(h[:-1]) for h in seen[True][1])  # some drafts are rejected


# -- refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(needs=("attention",)), "needs must be of .*attention"),
        (dict(needs=("mass", "edge_mass")), "choose one"),
        (dict(needs=("keys",), layers_at_once=True), "needs mass alone"),
        (dict(needs=("mass",), layers_at_once=True), "has fixed_counts"),
        (dict(anchor_every=0), "anchor_every must be an integer in .*, got 0"),
        (
            dict(per_step=True, anchor_every=2),
            "per_step policy remembers",
        ),
        (dict(select=None), "select must be a function"),
    ],
)
def test_a_policy_checks_its_fields(options, message):
    defaults = dict(name="p", needs=(), select=lambda view, options: None)
    with pytest.raises(ValueError, match=message):
        Policy(**defaults | options)


@pytest.mark.parametrize(
    "switches, message",
    [
        (dict(top_p=0.0), r"top_p must be in \(0.0, 1.0\], got 0.0"),
        (dict(smooth=2), "smooth must be odd, got 2"),
        (dict(widen=1), "widen must be below 1"),
        (dict(window=True), "window must be an integer"),
        (dict(decay=0.5, window=2), "exclude each other"),
        (dict(top_p=0.5, recent_share=0.5), "exclude each other"),
    ],
)
def test_mass_switches_are_checked(switches, message):
    with pytest.raises(ValueError, match=message):
        mass_policy("p", **switches)


def test_a_forgotten_state_is_named(tiny_model):
    policy = Policy(
        "short", (), POLICIES["window"].select, state_shape=lambda heads, keys: (1,)
    )
    with pytest.raises(ValueError, match="'short' returned 2 values, expected 3"):
        continued(tiny_model, policy=policy)


def test_what_a_policy_remembers_is_counted(tiny_model):
    huge = Policy(
        "huge", ("mass",), POLICIES["pillar"].select,
        state_shape=lambda heads, keys: (1 << 40,),
    )  # fmt: skip
    with pytest.raises(ValueError, match="0 pages fit beside .* bytes of policy state"):
        Engine(
            tiny_model,
            speculation=dataclasses.replace(SPECULATION, policy=huge),
            engine=dataclasses.replace(ENGINE, max_length=48),
        )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="policy must be one of .*'pillar'.*'pilar'"):
        resolve_policy("pilar")
    with pytest.raises(ValueError, match="policy must be one of"):
        resolve_policy(["pillar"])


# -- the document -------------------------------------------------------------------

DOCUMENT = pathlib.Path(__file__).resolve().parents[1] / "docs" / "policies.md"


def test_the_document_lists_every_policy():
    rows = re.findall(r"^\| (`.*?) \|", DOCUMENT.read_text(), re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(POLICIES)


def test_policies_of_the_document_run_from_a_file(tmp_path, tiny_model, short_plain):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    path = tmp_path / "mine.py"
    path.write_text("\n".join(blocks[1:]))
    for name in ("RECENT_MASS", "SMOOTHED"):
        policy = load_policy(f"{path}:{name}")
        assert continued(tiny_model, policy=policy)[0] == short_plain
    for location, message in {
        f"{path}:NONE": "must define NONE as a Policy, got None",
        "nowhere.py:P": "given as FILE.py:NAME, got 'nowhere.py:P'",
        str(path): "FILE.py:NAME",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_policy(location)
