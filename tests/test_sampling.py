"""The noise, the filters and the law, against numpy and by chi-square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sparsespec_jax import sampling


def law(rows, *, seed=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, processed=0):
    return sampling.Law(
        seed=jnp.full((rows, 2), seed, jnp.uint32).at[:, 1].set(17),
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        top_p=jnp.full(rows, top_p, jnp.float32),
        min_p=jnp.full(rows, min_p, jnp.float32),
        processed_logprobs=jnp.full(rows, processed, bool),
    )


def test_gumbel_has_the_moments_of_a_gumbel_variable():
    seeds = jnp.arange(200, dtype=jnp.uint32).reshape(100, 2)
    noise = np.asarray(sampling.gumbel(seeds, jnp.arange(100), jnp.arange(5000)))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.01)
    assert stats.kstest(noise.ravel()[:20000], stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("axis", ["seed", "position", "token", "stream"])
def test_noise_of_neighbours_is_uncorrelated(axis):
    n = 20000
    index = jnp.arange(n)
    zero = jnp.zeros(n, jnp.uint32)
    seed = jnp.stack([index.astype(jnp.uint32) if axis == "seed" else zero, zero], 1)
    position = index if axis == "position" else jnp.zeros(n, jnp.int32)
    token = index if axis == "token" else jnp.zeros(n, jnp.int32)
    first = sampling.gumbel(seed, position, token[:, None])[:, 0]
    if axis == "stream":
        seed = jnp.stack([index.astype(jnp.uint32), zero], 1)
        first = sampling.gumbel(seed, position, token[:, None])[:, 0]
        second = sampling.gumbel(seed, position, token[:, None], stream=1)[:, 0]
    else:
        first, second = first[:-1], first[1:]
    correlation = np.corrcoef(np.asarray(first), np.asarray(second))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(n)


def test_noise_depends_on_nothing_but_seed_position_and_token():
    seeds = jnp.array([[1, 2], [3, 4]], jnp.uint32)
    positions = jnp.array([5, 6])
    both = sampling.gumbel(seeds, positions, jnp.arange(11))
    alone = sampling.gumbel(seeds[1:], positions[1:], jnp.array([7]))
    assert both[1, 7] == alone[0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choose_draws_from_the_softmax(temperature):
    logits = jnp.array([0.3, -1.0, 2.0, 0.9, -3.0])
    rows = 20000
    tokens = sampling.choose(
        jnp.broadcast_to(logits, (rows, 5)),
        law(rows, temperature=temperature),
        jnp.arange(rows),
        filters=False,
    )
    expected = np.asarray(jax.nn.softmax(logits / temperature), np.float64) * rows
    expected *= rows / expected.sum()
    counts = np.bincount(np.asarray(tokens), minlength=5)
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_temperature_zero_is_the_argmax_with_or_without_filters():
    logits = jax.random.normal(jax.random.key(0), (32, 50))
    for filters in (False, True):
        tokens = sampling.choose(
            logits, law(32, temperature=0.0), jnp.arange(32), filters=filters
        )
        np.testing.assert_array_equal(tokens, jnp.argmax(logits, -1))


def reference_keep(logits, temperature, top_k, top_p, min_p):
    """The filters of one row by sorting."""
    probs = np.exp((logits - logits.max()) / temperature)
    cut = np.sort(logits)[::-1][min(top_k, len(logits)) - 1] if top_k else -np.inf
    keep = logits >= cut
    probs = np.where(keep, probs, 0) / probs[keep].sum()
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        needed = np.searchsorted(np.cumsum(probs[order]), top_p) + 1
        keep &= probs >= probs[order[min(needed, len(order)) - 1]]
    return keep & (probs >= min_p * probs.max())


@pytest.mark.parametrize("temperature", [0.4, 1.0])
@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2),
     (9, 0.7, 0.1), (1000, 0.999, 0.0)],
)  # fmt: skip
def test_filters_agree_with_sorting(temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32) * 2
    options = dict(top_k=top_k, top_p=top_p, min_p=min_p)
    got = sampling.keep_mask(
        jnp.asarray(logits), law(16, temperature=temperature, **options)
    )
    want = [reference_keep(row, temperature, **options) for row in logits]
    np.testing.assert_array_equal(got, np.stack(want))


def test_tokens_tied_with_the_last_one_kept_are_kept():
    logits = jnp.array([[1.0, 3.0, 1.0, 0.0]])
    keep = sampling.keep_mask(logits, law(1, top_k=2))
    assert keep.tolist() == [[True, True, True, False]]


def test_filters_off_keep_everything():
    logits = jax.random.normal(jax.random.key(3), (8, 40)) * 30
    assert bool(sampling.keep_mask(logits, law(8)).all())


def test_logprobs_of_the_model_and_of_the_law():
    logits = np.random.default_rng(2).normal(size=(4, 20)).astype(np.float32)
    tokens = np.argmax(logits, -1)
    raw = sampling.logprobs(jnp.asarray(logits), law(4), tokens, filters=False)
    lse = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(raw, logits[np.arange(4), tokens] - lse, rtol=1e-5)
    options = dict(temperature=0.5, top_k=3, processed=1)
    processed = sampling.logprobs(
        jnp.asarray(logits), law(4, **options), tokens, filters=True
    )
    top = np.sort(logits, -1)[:, -3:] / 0.5
    want = top[:, -1] - np.log(np.exp(top).sum(-1))
    np.testing.assert_allclose(processed, want, rtol=1e-4)


def test_processed_logprob_of_a_greedy_choice_is_zero():
    logits = jnp.array([[0.0, 1.0]])
    got = sampling.logprobs(
        logits, law(1, temperature=0.0, processed=1), jnp.array([1]), filters=False
    )
    assert got.tolist() == [0.0]
