"""The acceptors: prefix logic exhaustively, the ratio test by chi-square."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sparsespec_jax import SpeculationConfig, sampling
from sparsespec_jax.device import acceptance
from tests.test_sampling import law


def test_count_prefix_on_every_pattern():
    for drafts in range(4):
        patterns = np.array(list(itertools.product([False, True], repeat=3)))
        got = acceptance.count_prefix(
            jnp.asarray(patterns), jnp.full(len(patterns), drafts)
        )
        want = [
            next((i for i, ok in enumerate(row[:drafts]) if not ok), drafts)
            for row in patterns.tolist()
        ]
        assert got.tolist() == want


def test_shared_noise_accepts_exactly_the_agreeing_prefix():
    lanes, drafts, vocab = 64, 3, 4
    logits = jax.random.normal(jax.random.key(0), (lanes, drafts + 1, vocab))
    positions = jnp.arange(lanes * (drafts + 1)).reshape(lanes, drafts + 1)
    laws = law(lanes * (drafts + 1))
    choice = sampling.choose(
        logits.reshape(-1, vocab), laws, positions.ravel(), filters=False
    ).reshape(lanes, drafts + 1)
    offered = jnp.asarray(list(itertools.product(range(vocab), repeat=drafts)))
    got = acceptance.shared_noise(
        logits, laws, positions, offered, jnp.full(lanes, drafts), filters=False
    )
    np.testing.assert_array_equal(got.tokens, choice)
    for lane in range(lanes):
        wanted = 0
        while wanted < drafts and offered[lane, wanted] == choice[lane, wanted]:
            wanted += 1
        assert got.num_accepted[lane] == wanted
    assert set(got.num_accepted.tolist()) >= {0, 1}


@functools.partial(jax.jit, static_argnames=("lanes", "num_kept", "filters"))
def one_cycle(p_logits, q_logits, *, lanes, num_kept, filters=False, **options):
    """One ratio-test cycle of a `law` with independent noise per lane."""
    rows, vocab = p_logits.shape
    drafts = rows - 1
    seeds = jnp.stack([jnp.arange(lanes), jnp.arange(lanes) * 7 + 1], 1)
    seeds = seeds.astype(jnp.uint32)
    base = law(lanes, **options)._replace(seed=seeds)
    offered, ids, probs = [], [], []
    for i in range(drafts):
        tokens, draft_law = acceptance.draft_from_top_m(
            jnp.broadcast_to(q_logits[i], (lanes, vocab)),
            base,
            jnp.full(lanes, i + 1),
            num_kept=num_kept,
            filters=filters,
        )
        offered.append(tokens)
        ids.append(draft_law.token_ids)
        probs.append(draft_law.probs)
    laws = jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), base)
    positions = jnp.broadcast_to(jnp.arange(rows)[None] + 1, (lanes, rows))
    return acceptance.ratio_test(
        jnp.broadcast_to(p_logits, (lanes, rows, vocab)),
        laws,
        positions,
        jnp.stack(offered, 1),
        jnp.full(lanes, drafts),
        acceptance.DraftLaw(jnp.stack(ids, 1), jnp.stack(probs, 1)),
        filters=filters,
    )


@pytest.mark.parametrize(
    "options", [{}, dict(top_k=2), dict(top_p=0.9), dict(top_p=1e-45), dict(min_p=1.0)]
)
def test_ratio_test_at_tiny_temperatures_is_greedy_among_the_tied(options):
    lanes = 400
    temperature = jnp.resize(jnp.array([1e-6, 1e-12, 1e-30, 2e-38]), lanes)
    p = jnp.array([[0.5, 20.0, -1.0, 19.0], [3.0, 3.0, -jnp.inf, 2.0], [9, 1, 1, 1]])
    options = dict(temperature=temperature, filters=bool(options), **options)
    got = one_cycle(p, p[:, ::-1], lanes=lanes, num_kept=3, **options)
    assert set(got.num_accepted.tolist()) == {0}
    assert set(got.tokens[:, 0].tolist()) == {1}
    got = one_cycle(p, p, lanes=lanes, num_kept=3, **options)
    assert set(got.num_accepted.tolist()) == {2}
    assert set(got.tokens[:, 0].tolist()) == {1}
    assert set(got.tokens[:, 2].tolist()) == {0}
    counts = np.bincount(got.tokens[:, 1], minlength=4)
    assert counts[:2].sum() == lanes
    assert stats.binomtest(int(counts[0]), lanes).pvalue > 1e-3


@pytest.mark.parametrize("num_kept", [2, 5])
@pytest.mark.parametrize("kind", ["close", "opposed"])
def test_ratio_test_emits_the_target_law(kind, num_kept):
    """First and second tokens follow p whatever the draft law is."""
    rng = np.random.default_rng(4)
    p = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    q = p + 0.3 * rng.normal(size=p.shape) if kind == "close" else -p
    q = jnp.asarray(q, jnp.float32)
    lanes = 20000
    got = one_cycle(p, q, lanes=lanes, temperature=1.0, num_kept=num_kept)
    accepted, tokens = np.asarray(got.num_accepted), np.asarray(got.tokens)
    for row in range(2):
        reached = tokens[accepted >= row, row]
        expected = np.asarray(jax.nn.softmax(p[row]), np.float64)
        expected *= len(reached) / expected.sum()
        counts = np.bincount(reached, minlength=5)
        assert stats.chisquare(counts, expected).pvalue > 1e-3
    if kind == "close" and num_kept == 5:
        assert accepted.mean() > 1.0
    if kind == "opposed":
        assert accepted.mean() < 1.0


def test_ratio_test_accepts_everything_of_an_equal_law():
    p = jax.random.normal(jax.random.key(5), (4, 6))
    got = one_cycle(p, p, lanes=500, temperature=0.8, num_kept=6)
    assert got.num_accepted.tolist() == [3] * 500


def test_ratio_test_at_temperature_zero_is_greedy():
    p = jax.random.normal(jax.random.key(6), (4, 6))
    q = p.at[1].set(-p[1])  # the second draft is wrong
    got = one_cycle(p, q, lanes=50, temperature=0.0, num_kept=3)
    assert set(got.num_accepted.tolist()) == {1}
    greedy = jnp.argmax(p, -1)
    np.testing.assert_array_equal(got.tokens[:, :2], jnp.tile(greedy[:2], (50, 1)))


def test_a_biased_acceptance_would_be_seen():
    """The chi-square above has the power to notice u < p / q turned into u < p."""
    p = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5)), jnp.float32)
    q = p * 0.5
    got = one_cycle(p, q, lanes=20000, temperature=1.0, num_kept=5)
    tokens = np.asarray(got.tokens)[:, 0]
    wrong = np.asarray(jax.nn.softmax(q[0]), np.float64)
    wrong *= len(tokens) / wrong.sum()
    counts = np.bincount(tokens, minlength=5)
    assert stats.chisquare(counts, wrong).pvalue < 1e-6


@pytest.mark.parametrize("mean", [0.0, 2.0, 6.16, 8.0])
def test_forced_acceptance_has_the_mean_asked_for(mean):
    lanes, drafts, vocab = 4000, 8, 3
    config = SpeculationConfig(acceptor="forced", forced_acceptance=mean)
    offered = jnp.full((lanes, drafts), 2)
    got = acceptance.forced(
        jnp.zeros((lanes, drafts + 1, vocab)).at[..., 1].set(9.0),
        law(lanes * (drafts + 1), temperature=0.0),
        jnp.arange(lanes * (drafts + 1)).reshape(lanes, -1),
        offered,
        jnp.full(lanes, drafts),
        probability=config.forced_probability,
        filters=False,
    )
    accepted = np.asarray(got.num_accepted)
    assert abs(accepted.mean() - mean) < 5 * max(accepted.std(), 1e-9) / lanes**0.5
    is_draft = np.arange(drafts + 1)[None] < accepted[:, None]
    np.testing.assert_array_equal(got.tokens, np.where(is_draft, 2, 1))
    assert not config.is_lossless and SpeculationConfig().is_lossless


@pytest.mark.parametrize(
    "options",
    [
        dict(acceptor="forced"),
        dict(forced_acceptance=3.0),
        dict(acceptor="forced", forced_acceptance=9.0),
        dict(acceptor="forced", forced_acceptance=-1.0),
    ],
)
def test_forced_acceptance_needs_a_mean_within_the_drafts(options):
    with pytest.raises(ValueError, match="forced_acceptance"):
        SpeculationConfig(**options)
