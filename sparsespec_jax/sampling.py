"""Logits to tokens: the target's law and its noise, a function of the position only.

A token is `argmax(logits + T * g)` over the tokens that the law keeps, where the
Gumbel noise g depends on (request seed, absolute position, token id) and on nothing
else: not on the step, the slot, the batch or the draft. This equals sampling from
softmax(logits / T), and T = 0 is greedy. Drafts use the same noise, which is what
lets them agree with the target (Gumbel coupling).

With `axis`, the name of a mesh axis, each device has the logits of its part of the
vocabulary; the noise of a token is the same for any number of devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsespec_jax.array_types import (
    Logits,
    Noise,
    NoiseIds,
    RowFlags,
    RowFloats,
    RowInts,
    RowParams,
    RowSeeds,
    TokenFlags,
    TopIds,
    TopLogprobs,
)
from sparsespec_jax.models.collectives import largest, summed, summed_in_order
from sparsespec_jax.models.vocabulary import (
    likeliest,
    scores_of,
    token_ids,
    top_tokens,
    vocabulary_size,
)
from sparsespec_jax.plan.slot_params import SlotParams

# Independent noise streams of one (seed, position).
TARGET, DRAFT, ACCEPT, RESIDUAL = range(4)

_BISECTION_STEPS = 32  # one per bit of a float32
_MAX_UNIFORM = 1.0 - 2.0**-24
_TINY = 2.0**-126  # smallest float32 that no device rounds to 0


class Law(NamedTuple):
    """The sampling law of each row of logits."""

    seed: RowSeeds
    temperature: RowFloats  # 0 is greedy
    top_k: RowInts  # 0 keeps all
    top_p: RowFloats
    min_p: RowFloats
    processed_logprobs: RowFlags


def read_slot_params(rows: RowParams) -> SlotParams:
    """SlotParams of rows on the device."""
    return SlotParams(rows, jax.lax.bitcast_convert_type)


def law_of(rows: RowParams) -> Law:
    """Law of each row of slot params."""
    params = read_slot_params(rows)
    return Law(*(getattr(params, name) for name in Law._fields))


def _mix(x):
    """A bijective 32-bit finaliser (two multiply-xorshift rounds)."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _row_keys(seed, positions, stream):
    """Two uint32 keys per row from (seed, position, stream); seed is uint32 [R, 2]."""
    place = positions.astype(jnp.uint32) * jnp.uint32(4) + jnp.uint32(stream)
    first = _mix(_mix(seed[:, 0] ^ jnp.uint32(0x9E3779B9)) + place)
    second = _mix(_mix(seed[:, 1] ^ first) + place * jnp.uint32(0x85EBCA6B))
    return first, second


def _to_uniform(bits):
    """Uniform in (0, 1) from 32 bits, resolved finely near 0."""
    value = bits.astype(jnp.float32) * jnp.float32(2.0**-32) + jnp.float32(2.0**-33)
    return jnp.minimum(value, jnp.float32(_MAX_UNIFORM))


def uniform(seed: RowSeeds, positions: RowInts, *, stream: int) -> RowFloats:
    """One uniform per row, in (0, 1)."""
    first, second = _row_keys(seed, positions, stream)
    return _to_uniform(_mix(first ^ _mix(second)))


def gumbel(
    seed: RowSeeds, positions: RowInts, token_ids: NoiseIds, *, stream: int = TARGET
) -> Noise:
    """Gumbel noise of `token_ids`, which may be the same for all rows.

    Small uniforms, which give the large values that decide an argmax, keep their full
    32-bit resolution.
    """
    first, second = _row_keys(seed, positions, stream)
    tokens = jnp.atleast_2d(token_ids).astype(jnp.uint32)
    bits = _mix(tokens * jnp.uint32(0x9E3779B1) + first[:, None])
    bits = _mix(bits ^ second[:, None])
    return -jnp.log(-jnp.log1p(-_to_uniform(bits)))


def _ordered_bits(x):
    """Map float32 to uint32 so that the order is kept (no NaN); -0 is 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(keys, enough):
    """Largest uint32 t per row for which `enough(keys >= t)` holds, by bisection."""

    def step(i, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[:, None]), candidate, threshold)

    start = jnp.zeros(keys.shape[:1], jnp.uint32)
    return jax.lax.fori_loop(0, _BISECTION_STEPS, step, start)


def row_sums(values: Logits, *, exact: bool, axis: str | None = None) -> RowFloats:
    """Sum of each row; exact: halves are added to each other, again and again.

    A compiler chooses the order of a sum by the number of rows. Of single additions
    there is none to choose.
    """
    return summed_in_order(_own_sums(values, exact=exact), axis)


def _own_sums(values, *, exact):
    """Sums [R] of the columns that this device has."""
    if not exact:
        return values.sum(-1)
    size = 1 << (values.shape[-1] - 1).bit_length()
    values = jnp.pad(values, ((0, 0), (0, size - values.shape[-1])))
    while (half := values.shape[-1] // 2) > 0:
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


def keep_mask(
    logits: Logits, law: Law, *, exact: bool = False, axis: str | None = None
) -> TokenFlags:
    """Tokens that top-k, then top-p, then min-p leave.

    Exact, without sorting: the cut is the largest logit threshold that keeps enough
    tokens (top-k) or enough probability (top-p); ties with the cut are kept. The most
    likely token is always kept.
    """
    keys = _ordered_bits(logits)
    vocab = vocabulary_size(logits.shape[-1], axis)
    wanted = jnp.where(law.top_k > 0, law.top_k, vocab)
    cut = _largest_threshold(keys, lambda m: summed(m.sum(-1), axis) >= wanted)
    keep = keys >= cut[:, None]
    prob = _softmax(logits, law, keep, exact=exact, axis=axis)

    def share(mask):
        return row_sums(jnp.where(mask, prob, 0.0), exact=exact, axis=axis)

    # A share that rounds to nothing is still that of one token.
    target = jnp.maximum(law.top_p * row_sums(prob, exact=exact, axis=axis), _TINY)
    cut = _largest_threshold(keys, lambda mask: share(mask) >= target)
    keep &= (keys >= cut[:, None]) | (law.top_p >= 1.0)[:, None]
    floor = law.min_p * largest(prob.max(-1), axis)
    return keep & (prob >= floor[:, None])


def _scaled(logits, top, temperature):
    """(logits - top) / temperature, 0 at the top for any logits and temperature.

    The difference comes first: a quotient by a small temperature overflows or, if it
    does not, has lost the digits that the difference needs.
    """
    return jnp.where(logits == top, 0.0, (logits - top) / temperature)


def _softmax(logits, law, keep, *, exact=False, axis=None):
    """Law's probabilities float32 [R, V]; all mass on the argmax at temperature 0."""
    masked = jnp.where(keep, logits, -jnp.inf)
    temperature = law.temperature[:, None]
    scale = jnp.where(temperature > 0, temperature, 1.0)
    soft = jnp.exp(_scaled(masked, _row_max(masked, axis), scale))
    soft /= row_sums(soft, exact=exact, axis=axis)[:, None]
    hard = _one_hot(likeliest(masked, axis), logits.shape[-1], soft.dtype, axis)
    return jnp.where(temperature > 0, soft, hard)


def _row_max(values, axis):
    """The largest value of each row [R, 1]."""
    return largest(values.max(-1, keepdims=True), axis)


def _one_hot(tokens, size, dtype, axis):
    """1 at each row's token, [R, V]."""
    if axis is None:
        return jax.nn.one_hot(tokens, size, dtype=dtype)
    return (tokens[:, None] == token_ids(size, axis)).astype(dtype)


def probabilities(
    logits: Logits, law: Law, *, filters: bool, axis: str | None = None
) -> Logits:
    """The law itself."""
    keep = jnp.ones(logits.shape, bool)
    if filters:
        keep = keep_mask(logits, law, axis=axis)
    return _softmax(logits, law, keep, axis=axis)


def choose(
    logits: Logits,
    law: Law,
    positions: RowInts,
    *,
    filters: bool,
    exact: bool = False,
    axis: str | None = None,
) -> RowInts:
    """Tokens that the law and its noise pick for absolute `positions`.

    `filters` (static) says whether any row restricts the law by top-k, top-p, min-p;
    `exact` (static) that the bits of a row must not depend on the number of rows.
    Exact but for the rounding of `logits + T * g`: at temperatures below the spacing
    of the logits' numbers, equal logits fall to the lowest token id.
    """
    noise = gumbel(law.seed, positions, token_ids(logits.shape[-1], axis))
    scores = logits + law.temperature[:, None] * noise
    if filters:
        keep = keep_mask(logits, law, exact=exact, axis=axis)
        scores = jnp.where(keep, scores, -jnp.inf)
    return likeliest(scores, axis).astype(jnp.int32)


def logprobs(
    logits: Logits,
    law: Law,
    tokens: RowInts,
    *,
    filters: bool,
    exact: bool = False,
    axis: str | None = None,
    chosen: bool = True,
) -> RowFloats:
    """Log-probability of `tokens`, of the model or of the law per row; see `choose`.

    `chosen` (static) says that the laws chose the tokens: those of greedy laws have 0.
    If not, a token that is not the argmax has -inf of a greedy law.
    """
    how = dict(exact=exact, axis=axis)
    logits, hot, scale = _told(logits, law, filters=filters, **how)
    top = _row_max(logits, axis)
    picked = scores_of(logits, tokens[:, None], axis)
    total = row_sums(jnp.exp(_scaled(logits, top, scale)), **how)
    value = _scaled(picked, top, scale)[:, 0] - jnp.log(total)
    greedy = 0.0
    if not chosen:
        greedy = jnp.where(tokens == likeliest(logits, axis), 0.0, -jnp.inf)
    return jnp.where(law.processed_logprobs & ~hot, greedy, value)


def top_logprobs(
    logits: Logits,
    law: Law,
    count: int,
    *,
    filters: bool,
    exact: bool = False,
    axis: str | None = None,
) -> tuple[TopIds, TopLogprobs]:
    """The `count` likeliest tokens and their log-probabilities, best first.

    Of the model or of the law per row, as in `logprobs`; -inf for tokens that the law
    excludes. Among equals the lowest token id comes first.
    """
    how = dict(exact=exact, axis=axis)
    logits, hot, scale = _told(logits, law, filters=filters, **how)
    top = _row_max(logits, axis)
    best, tokens = top_tokens(logits, count, axis)
    total = row_sums(jnp.exp(_scaled(logits, top, scale)), **how)
    values = _scaled(best, top, scale) - jnp.log(total)[:, None]
    one = jnp.where(jnp.arange(count) == 0, 0.0, -jnp.inf)  # greedy: all on the first
    is_greedy = (law.processed_logprobs & ~hot)[:, None]
    values = jnp.where(is_greedy, one, values)
    return tokens.astype(jnp.int32), values


def _told(logits, law, *, filters, exact, axis):
    """(logits, whether T > 0, the scale) of what log-probabilities are told of."""
    hot = law.temperature > 0
    scale = jnp.where(law.processed_logprobs & hot, law.temperature, 1.0)[:, None]
    if filters:
        keep = keep_mask(logits, law, exact=exact, axis=axis)
        keep |= ~law.processed_logprobs[:, None]
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits, hot, scale
