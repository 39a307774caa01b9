"""Times the product of many rows with a weight, and XLA's."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cases import by_name
from pallas_kernels.matmul.api import matmul
from pallas_kernels.matmul.cases import LAYERS, MATMUL_CASES, MatmulCase
from pallas_kernels.timing import Rates, relative_error, time_us

_TIMED = ("qwen3_8b", 2072), ("qwen3_8b", 2048), ("qwen2_5_1_5b", 2072)
_NAMES = tuple(f"{model}_{name}_{t}" for model, t in _TIMED for name in LAYERS[model])
CASES = tuple(by_name(MATMUL_CASES, name) for name in _NAMES)


def bench(case: MatmulCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time, rate and error of one case, and the time and rate of XLA.

    The error is against a float32 product of the same numbers; XLA's is a product whose
    result is bfloat16.
    """
    del rates  # bound by the matrix unit
    rows, weight = case.shapes
    keys = jax.random.split(jax.random.key(0), num_layers + 1)
    x = jax.random.normal(keys[0], rows.shape, rows.dtype)
    scale = weight.shape[0] ** -0.5
    # Each layer has a weight of its own, so that none is left in the cache.
    layers = [
        (jax.random.normal(key, weight.shape, weight.dtype) * scale,)
        for key in keys[1:]
    ]

    def run(weight, x):
        return matmul(x, weight, impl=impl)

    def xla(weight, x):
        return jnp.dot(x, weight)

    us, xla_us = (time_us(fn, layers, (x,)) for fn in (run, xla))
    wide = functools.partial(jnp.dot, precision="highest")
    exact = wide(x.astype(jnp.float32), layers[0][0].astype(jnp.float32))
    return dict(
        us=us,
        operations=case.num_operations,
        tflop_per_s=case.num_operations / us / 1e6,
        error=relative_error(run(*layers[0], x), exact),
        xla_us=xla_us,
        xla_tflop_per_s=case.num_operations / xla_us / 1e6,
    )
