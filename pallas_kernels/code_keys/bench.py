"""Times the coding of keys, and XLA's form of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import tagged
from pallas_kernels.code_keys.api import code_keys
from pallas_kernels.code_keys.cases import CODE_CASES, CodeCase
from pallas_kernels.timing import Rates, time_donated_us

CASES = tagged(CODE_CASES, "h100")


def bench(case: CodeCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time and agreement of one case, and the time of XLA's form."""
    del rates  # bound by its launch
    codes, pool, table, *_ = (array.shape for array in case.shapes)
    pages = np.random.default_rng(0).permutation(codes[0] - 1)
    table, pages = np.zeros(table, np.int32), iter(1 + pages)
    for lane, end in enumerate(case.ends):
        for column in range(-(-end // case.page_size)):
            table[lane, column] = next(pages)
    places = tuple(jnp.asarray(x, jnp.int32) for x in (table, case.starts, case.ends))
    pool = jax.random.normal(jax.random.key(0), pool, jnp.dtype(case.dtype))
    code = functools.partial(code_keys, **case.options)

    def code_layers(codes, impl):
        for _ in range(num_layers):
            codes = code(codes, pool, *places, impl=impl)
        return codes

    empty = jnp.zeros(codes, jnp.int32)
    got, expected = (
        jax.jit(functools.partial(code, impl=i))(empty, pool, *places)
        for i in (impl, "reference")
    )
    times = [
        time_donated_us(functools.partial(code_layers, impl=i), empty + 0) / num_layers
        for i in (impl, "reference")
    ]
    same = float((got == expected).mean())
    return dict(us=times[0], same_words=same, xla_us=times[1])
