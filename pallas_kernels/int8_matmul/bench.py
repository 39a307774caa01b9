"""Times the product with a weight in 8 bits, and XLA's of 8 and of 16 bits."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cases import by_name
from pallas_kernels.int8_matmul.api import int8_matmul, pack
from pallas_kernels.int8_matmul.cases import INT8_CASES, Int8Case
from pallas_kernels.int8_matmul.weights import Int8Weight
from pallas_kernels.matmul.cases import LAYERS
from pallas_kernels.timing import Rates, relative_error, time_us

_TIMED = (
    ("qwen3_8b", (24, 64, 128)),
    ("qwen2_5_1_5b", (24,)),
    ("smollm2_135m", (72,)),
)
_NAMES = (
    f"int8_{model}_{product}_{rows}"
    for model, of_model in _TIMED
    for rows in of_model
    for product in LAYERS[model]
)
CASES = tuple(by_name(INT8_CASES, name) for name in _NAMES)


def bench(case: Int8Case, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time, rate and error of one case, and the times of XLA.

    The error is against a float32 product of the same 8-bit numbers. `xla_us` is XLA's
    product with them, `bfloat16_us` its product of 16-bit weights, of one array.
    """
    x, weights = make_inputs(case, num_layers)
    packed = [pack(weight, impl=impl) for weight in weights]
    run, xla = (
        functools.partial(_run, impl=i, **case.options) for i in (impl, "reference")
    )
    us = time_us(run, packed, (x,))
    got = run(*packed[0], x)
    del packed
    xla_us = time_us(xla, weights, (x,))
    wide = weights[0].values.astype(jnp.float32) * weights[0].scale[:, None]
    exact = jnp.dot(x.astype(jnp.float32), wide.T, precision="highest")
    whole = got if case.parts is None else got.sum(axis=0)
    layers = [((w.values * 0.01).astype(jnp.bfloat16).T,) for w in weights]
    return dict(
        us=us,
        bytes=case.num_bytes,
        tb_per_s=case.num_bytes / us / 1e6,
        fraction_of_read=case.num_bytes / us * 1e6 / rates.read,
        error=relative_error(whole, exact),
        xla_us=xla_us,
        bfloat16_us=time_us(lambda kernel, x: jnp.dot(x, kernel), layers, (x,)),
    )


def make_inputs(case: Int8Case, num_layers: int) -> tuple[jax.Array, list[Int8Weight]]:
    """Returns random rows, and a random weight for each layer: none is in a cache."""
    rows, values, scale = case.shapes
    *keys, key = jax.random.split(jax.random.key(0), num_layers + 1)
    x = jax.random.normal(key, rows.shape, rows.dtype)
    # Each output has its own scale; results are about 1.
    factors = jnp.linspace(0.5, 2.0, scale.size) / 73 / rows.shape[1] ** 0.5
    weights = [
        Int8Weight(jax.random.randint(k, values.shape, -127, 128, jnp.int8), factors)
        for k in keys
    ]
    return x, weights


def _run(values, scale, x, **options):
    return int8_matmul(x, values, scale, **options)
