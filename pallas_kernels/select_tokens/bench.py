"""Times token selection, with few ties and with many, and `lax.top_k`."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cases import by_name
from pallas_kernels.select_tokens.api import select_tokens
from pallas_kernels.select_tokens.cases import SELECT_CASES, SelectCase
from pallas_kernels.timing import Rates, time_us

_NAMES = ("select_8k", "select_32k", "select_40k", "select_40k_full")
CASES = tuple(by_name(SELECT_CASES, name) for name in _NAMES)


def bench(case: SelectCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time and exactness of one case, and the time of top_k."""
    del rates  # bound by latency
    shape = case.shapes[0].shape
    lengths, budgets = (jnp.asarray(x, jnp.int32) for x in (case.lengths, case.budgets))
    keys = jax.random.split(jax.random.key(0), num_layers // 2)
    scores = [jax.nn.softmax(3 * jax.random.normal(key, shape)) for key in keys]
    select = functools.partial(select_tokens, **case.options, impl=impl)
    us = time_us(select, [(score, lengths, budgets) for score in scores])
    tied = jnp.round(scores[0] * case.num_candidates)  # few values: ties everywhere
    same = []
    for score in (*scores[:2], tied):
        args = score, lengths, budgets
        got = jax.jit(select)(*args)
        expected = select_tokens(*args, **case.options, impl="reference")
        same.append(_same_selection(got, expected))
    rows = [(score.reshape(-1, case.num_candidates),) for score in scores]
    return dict(
        us=us,
        tied_us=time_us(select, [(tied, lengths, budgets)] * len(scores)),
        exact=all(same),
        top_k_us=time_us(lambda x: jax.lax.top_k(x, case.cap), rows),
    )


def _same_selection(got, expected) -> bool:
    """Returns whether counts are equal, and indices as far as these go."""
    is_chosen = jnp.arange(expected.indices.shape[-1]) < expected.counts[..., None]
    indices = jnp.where(is_chosen, got.indices - expected.indices, 0)
    return bool((got.counts == expected.counts).all() and (indices == 0).all())
