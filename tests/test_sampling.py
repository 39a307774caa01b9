"""The noise, the filters and the law, against numpy and by chi-square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sparsespec_jax import SamplingParams, SpeculationConfig, sampling
from sparsespec_jax.plan.slot_params import slot_params


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
    keep = sampling.keep_mask(jnp.array([[0.0, -0.0, -1.0]]), law(1, top_k=1))
    assert keep.tolist() == [[True, True, False]]


def test_filters_off_keep_everything():
    logits = jax.random.normal(jax.random.key(3), (8, 40)) * 30
    assert bool(sampling.keep_mask(logits, law(8)).all())


def test_logprobs_of_the_model_and_of_the_law():
    logits = np.random.default_rng(2).normal(size=(4, 20)).astype(np.float32)
    tokens = np.argmax(logits, -1).astype(np.int32)
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


# 1e-40 and 1e-45 are numbers of float32 that devices may take for 0; 5e-324 is none.
TEMPERATURES = (10.0, 0.65, 1e-3, 1e-6, 1e-12, 1e-30, 2e-38, 1e-40, 1e-45, 5e-324, 0.0)
FILTERS = (
    dict(),
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=2**40),
    dict(top_p=0.8),
    dict(top_p=1e-37),
    dict(top_p=1e-45),
    dict(top_p=5e-324),
    dict(min_p=1.0),
    dict(min_p=0.05),
    dict(min_p=1e-45),
    dict(top_k=7, top_p=0.9, min_p=0.01),
)


def hard_logits(kind, rows=16, vocab=29):
    logits = np.random.default_rng(5).normal(size=(rows, vocab))
    logits *= {"large": 1e4, "spread": 30}.get(kind, 0.01)
    logits = logits.astype(np.float32)
    if kind == "masked":
        logits[:, 3:-3] = -np.inf
    if kind == "tied":
        logits = np.round(logits, 2)
    return logits


def laws_as_sent(options, rows):
    """A Law of `rows` rows for each of a list of SamplingParams' options."""
    params = [SamplingParams(seed=3, **option) for option in options]
    sent = [slot_params(p, 0, 0, (), SpeculationConfig()) for p in params]
    return sampling.law_of(jnp.repeat(jnp.stack(sent), rows, axis=0))


def exact_law(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """(kept, log-probabilities) of one row in float64; greedy if T is no float32."""
    logits, temperature = logits.astype(np.float64), float(np.float32(temperature))
    scaled = np.where(np.arange(logits.size) == logits.argmax(), 0.0, -np.inf)
    if temperature >= np.finfo(np.float32).tiny:
        scaled = (logits - logits.max()) / temperature
    cut = np.sort(logits)[::-1][min(top_k, logits.size) - 1] if top_k else -np.inf
    keep = logits >= cut
    prob = np.where(keep, np.exp(scaled), 0.0)
    prob /= prob.sum()
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        needed = np.searchsorted(np.cumsum(prob[order]), top_p) + 1
        keep &= logits >= logits[order[min(needed, order.size) - 1]]
    keep &= prob >= min_p * prob.max()
    kept = np.where(keep, scaled, -np.inf)
    return keep, kept - np.log(np.exp(kept).sum())


def assert_logprobs_close(got, exact):
    """Up to probabilities that float32 does not hold: those may be 0 or not."""
    least = np.log(np.finfo(np.float32).tiny)
    got, exact = np.maximum(got, least), np.maximum(exact, least)
    np.testing.assert_allclose(got, exact, rtol=2e-6, atol=1e-5)


@functools.partial(jax.jit, static_argnames="filters")
def choice_and_logprobs(logits, law, positions, *, filters):
    """The token chosen [R], log-probabilities [R, V] of all and [R] of the chosen."""
    chosen = sampling.choose(logits, law, positions, filters=filters)

    def of(tokens):
        return sampling.logprobs(logits, law, tokens, filters=filters)

    every = jnp.arange(logits.shape[1])[:, None]
    every = jnp.broadcast_to(every, (*logits.shape[::-1],))
    return chosen, jax.lax.map(of, every).T, of(chosen)


@pytest.mark.parametrize("kind", ["small", "large", "spread", "masked", "tied"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_any_temperature_gives_the_exact_law(temperature, kind):
    """Choice and log-probabilities of every filter, against float64, the same noise."""
    rows = hard_logits(kind)
    options = [dict(temperature=temperature, **option) for option in FILTERS]
    law = laws_as_sent([dict(**o, logprobs="processed") for o in options], len(rows))
    logits = np.tile(rows, (len(options), 1))
    positions = jnp.arange(len(logits))
    chosen, logprobs, own = choice_and_logprobs(logits, law, positions, filters=True)
    exact = [exact_law(row, **option) for option in options for row in rows]
    keep, exact = (np.stack(a) for a in zip(*exact, strict=True))
    noise = sampling.gumbel(law.seed, positions, jnp.arange(logits.shape[1]))
    scores = logits + temperature * np.asarray(noise, np.float64)
    scores = np.where(keep, scores, -np.inf)
    best = np.take_along_axis(scores, chosen[:, None], 1)[:, 0]
    assert (scores.max(-1) - best <= 2**-23 * np.abs(scores.max(-1))).all()
    if temperature < np.finfo(np.float32).tiny:
        np.testing.assert_array_equal(own, 0.0)
    else:
        assert_logprobs_close(logprobs, exact)
    raw = law._replace(processed_logprobs=jnp.zeros_like(law.processed_logprobs))
    _, logprobs, _ = choice_and_logprobs(logits, raw, positions, filters=True)
    exact = np.stack([exact_law(row, 1.0)[1] for row in logits])
    assert_logprobs_close(logprobs, exact)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_infinite_logit_is_certain(temperature):
    logits = np.tile(np.float32([0, np.inf, -np.inf, 3]), (len(FILTERS), 1))
    options = [dict(temperature=temperature, **option) for option in FILTERS]
    law = laws_as_sent([dict(**o, logprobs="processed") for o in options], 1)
    positions = jnp.arange(len(logits))
    chosen, _, own = choice_and_logprobs(logits, law, positions, filters=True)
    assert set(chosen.tolist()) == {1} and set(own.tolist()) == {0.0}
    assert np.isfinite(sampling.probabilities(logits, law, filters=True)).all()


def test_filters_compiled_or_not_choose_the_same():
    """A request's tokens must not depend on whether others restrict their law."""
    logits = hard_logits("spread", rows=100)
    options = [dict(temperature=t, logprobs="processed") for t in TEMPERATURES]
    law = laws_as_sent(options, len(logits))
    logits = np.tile(logits, (len(options), 1))
    positions = jnp.arange(len(logits))
    without = choice_and_logprobs(logits, law, positions, filters=False)
    for one, other in zip(
        without, choice_and_logprobs(logits, law, positions, filters=True), strict=True
    ):
        np.testing.assert_array_equal(one, other)
