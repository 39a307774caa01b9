"""Times the gather of KV rows, and that of XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import by_name
from pallas_kernels.gather_kv.api import gather_kv
from pallas_kernels.gather_kv.cases import GATHER_CASES, GatherCase
from pallas_kernels.timing import Rates, time_donated_us, time_us

CASES = (by_name(GATHER_CASES, "gather_512b"),)


def bench(case: GatherCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time, rate and exactness of one case, and the time of XLA's gather."""
    rng = np.random.default_rng(0)
    ps, lanes, heads = case.page_size, case.num_lanes, case.num_heads
    shape, *tables = (array.shape for array in case.shapes[:3])
    pages = rng.permutation(shape[0]).astype(np.int32)
    source, target = np.split(pages, [np.prod(tables[0])])
    source, target = source.reshape(lanes, -1), target.reshape(lanes, -1)
    pool = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    indices = np.empty((lanes, heads, case.cap), np.int32)
    for index in np.ndindex(lanes, heads):
        indices[index] = np.sort(rng.choice(case.context, case.cap, replace=False))
    args = jax.device_put((source, target, indices, case.count_array()))
    expected = gather_kv(pool, *args, impl="reference")
    gather = functools.partial(gather_kv, impl=impl)
    same = bool((jax.jit(gather)(pool, *args) == expected).all())
    del expected

    def gather_layers(pool):
        for _ in range(num_layers):
            pool = gather(pool, *args)
        return pool

    us = time_donated_us(gather_layers, pool + 0) / num_layers
    flat = source[np.arange(lanes)[:, None, None], indices // ps]
    flat = (flat * heads + np.arange(heads)[:, None]) * ps + indices % ps
    rows = pool.reshape(-1, shape[-1])
    turned = [(jnp.roll(jnp.asarray(flat), i, 0),) for i in range(num_layers)]
    xla = time_us(lambda index, rows: rows[index], turned, (rows,))
    moved = 2 * case.num_copied_bytes
    return dict(
        us=us,
        bytes=moved,
        tb_per_s=moved / us / 1e6,
        fraction_of_copy=moved / us * 1e6 / rates.copy,
        exact=same,
        xla_gather_us=xla,
    )
