"""Times the store of new KV rows, and XLA's scatter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import by_name
from pallas_kernels.timing import Rates, time_donated_us
from pallas_kernels.write_rows.api import write_rows
from pallas_kernels.write_rows.cases import WRITE_CASES, WriteCase

CASES = tuple(by_name(WRITE_CASES, name) for name in ("write_plain", "write_136"))


def bench(case: WriteCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time and exactness of one case, and the time of XLA's scatter."""
    del rates  # bound by its launch
    rng = np.random.default_rng(0)
    places = rng.choice(case.num_pages * case.page_size, (case.num_places, 1), False)
    places = np.divmod(places.astype(np.int32), case.page_size)
    pool, rows, *_ = (array.shape for array in case.shapes)
    keys = jax.random.split(jax.random.key(0), num_layers)
    layers = [jax.random.normal(key, rows, jnp.bfloat16) for key in keys]
    pool = jax.random.normal(keys[0], pool, jnp.bfloat16)

    def write(pool, rows, impl=impl):
        return write_rows(pool, rows, *places, **case.options, impl=impl)

    def write_layers(pool, impl=impl):
        for rows in layers:
            pool = write(pool, rows, impl=impl)
        return pool

    expected = write(pool, layers[0], impl="reference")
    same = bool((jax.jit(write)(pool, layers[0]) == expected).all())
    scatter_layers = functools.partial(write_layers, impl="reference")
    return dict(
        us=time_donated_us(write_layers, pool + 0) / num_layers,
        exact=same,
        xla_scatter_us=time_donated_us(scatter_layers, pool + 0) / num_layers,
    )
