"""Logits to tokens: the target's law and its noise, a function of the position only.

A token is `argmax(logits + T * g)` over the tokens that the law keeps, where the
Gumbel noise g depends on (request seed, absolute position, token id) and on nothing
else: not on the step, the slot, the batch or the draft. This equals sampling from
softmax(logits / T), and T = 0 is greedy. Drafts use the same noise, which is what
lets them agree with the target (Gumbel coupling).
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


def row_sums(values: Logits, *, exact: bool) -> RowFloats:
    """Sum of each row; exact: halves are added to each other, again and again.

    A compiler chooses the order of a sum by the number of rows. Of single additions
    there is none to choose.
    """
    if not exact:
        return values.sum(-1)
    size = 1 << (values.shape[-1] - 1).bit_length()
    values = jnp.pad(values, ((0, 0), (0, size - values.shape[-1])))
    while (half := values.shape[-1] // 2) > 0:
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


def keep_mask(logits: Logits, law: Law, *, exact: bool = False) -> TokenFlags:
    """Tokens that top-k, then top-p, then min-p leave.

    Exact, without sorting: the cut is the largest logit threshold that keeps enough
    tokens (top-k) or enough probability (top-p); ties with the cut are kept. The most
    likely token is always kept.
    """
    keys = _ordered_bits(logits)
    wanted = jnp.where(law.top_k > 0, law.top_k, logits.shape[-1])
    cut = _largest_threshold(keys, lambda m: m.sum(-1) >= wanted)
    keep = keys >= cut[:, None]
    prob = _softmax(logits, law, keep, exact=exact)

    def share(mask):
        return row_sums(jnp.where(mask, prob, 0.0), exact=exact)

    # A share that rounds to nothing is still that of one token.
    target = jnp.maximum(law.top_p * row_sums(prob, exact=exact), _TINY)
    cut = _largest_threshold(keys, lambda mask: share(mask) >= target)
    keep &= (keys >= cut[:, None]) | (law.top_p >= 1.0)[:, None]
    floor = law.min_p * prob.max(-1)
    return keep & (prob >= floor[:, None])


def _scaled(logits, top, temperature):
    """(logits - top) / temperature, 0 at the top for any logits and temperature.

    The difference comes first: a quotient by a small temperature overflows or, if it
    does not, has lost the digits that the difference needs.
    """
    return jnp.where(logits == top, 0.0, (logits - top) / temperature)


def _softmax(logits, law, keep, *, exact=False):
    """Law's probabilities float32 [R, V]; all mass on the argmax at temperature 0."""
    masked = jnp.where(keep, logits, -jnp.inf)
    temperature = law.temperature[:, None]
    scale = jnp.where(temperature > 0, temperature, 1.0)
    soft = jnp.exp(_scaled(masked, masked.max(-1, keepdims=True), scale))
    soft /= row_sums(soft, exact=exact)[:, None]
    hard = jax.nn.one_hot(jnp.argmax(masked, -1), logits.shape[-1], dtype=soft.dtype)
    return jnp.where(temperature > 0, soft, hard)


def probabilities(logits: Logits, law: Law, *, filters: bool) -> Logits:
    """The law itself."""
    keep = keep_mask(logits, law) if filters else jnp.ones(logits.shape, bool)
    return _softmax(logits, law, keep)


def choose(
    logits: Logits,
    law: Law,
    positions: RowInts,
    *,
    filters: bool,
    exact: bool = False,
) -> RowInts:
    """Tokens that the law and its noise pick for absolute `positions`.

    `filters` (static) says whether any row restricts the law by top-k, top-p, min-p;
    `exact` (static) that the bits of a row must not depend on the number of rows.
    Exact but for the rounding of `logits + T * g`: at temperatures below the spacing
    of the logits' numbers, equal logits fall to the lowest token id.
    """
    noise = gumbel(law.seed, positions, jnp.arange(logits.shape[-1]))
    scores = logits + law.temperature[:, None] * noise
    if filters:
        scores = jnp.where(keep_mask(logits, law, exact=exact), scores, -jnp.inf)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def logprobs(
    logits: Logits,
    law: Law,
    tokens: RowInts,
    *,
    filters: bool,
    exact: bool = False,
    chosen: bool = True,
) -> RowFloats:
    """Log-probability of `tokens`, of the model or of the law per row; see `choose`.

    `chosen` (static) says that the laws chose the tokens: those of greedy laws have 0.
    If not, a token that is not the argmax has -inf of a greedy law.
    """
    logits, hot, scale = _told(logits, law, filters=filters, exact=exact)
    top = logits.max(-1, keepdims=True)
    picked = jnp.take_along_axis(logits, tokens[:, None], -1)
    total = row_sums(jnp.exp(_scaled(logits, top, scale)), exact=exact)
    value = _scaled(picked, top, scale)[:, 0] - jnp.log(total)
    greedy = 0.0
    if not chosen:
        greedy = jnp.where(tokens == jnp.argmax(logits, -1), 0.0, -jnp.inf)
    return jnp.where(law.processed_logprobs & ~hot, greedy, value)


def top_logprobs(
    logits: Logits, law: Law, count: int, *, filters: bool, exact: bool = False
) -> tuple[TopIds, TopLogprobs]:
    """The `count` likeliest tokens and their log-probabilities, best first.

    Of the model or of the law per row, as in `logprobs`; -inf for tokens that the law
    excludes. Among equals the lowest token id comes first.
    """
    logits, hot, scale = _told(logits, law, filters=filters, exact=exact)
    top = logits.max(-1, keepdims=True)
    best, tokens = jax.lax.top_k(logits, count)
    total = row_sums(jnp.exp(_scaled(logits, top, scale)), exact=exact)
    values = _scaled(best, top, scale) - jnp.log(total)[:, None]
    one = jnp.where(jnp.arange(count) == 0, 0.0, -jnp.inf)  # greedy: all on the first
    is_greedy = (law.processed_logprobs & ~hot)[:, None]
    values = jnp.where(is_greedy, one, values)
    return tokens.astype(jnp.int32), values


def _told(logits, law, *, filters, exact):
    """(logits, whether T > 0, the scale) of what log-probabilities are told of."""
    hot = law.temperature > 0
    scale = jnp.where(law.processed_logprobs & hot, law.temperature, 1.0)[:, None]
    if filters:
        keep = keep_mask(logits, law, exact=exact) | ~law.processed_logprobs[:, None]
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits, hot, scale
