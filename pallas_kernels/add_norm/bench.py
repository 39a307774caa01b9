"""Times the sum with its norm, and XLA's."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm.api import add_norm
from pallas_kernels.add_norm.cases import NORM_CASES, NormCase
from pallas_kernels.cases import by_name
from pallas_kernels.timing import Rates, against_reference

_NAMES = ("norm_136", "norm_136_parts", "norm_49_parts", "norm_512", "norm_2184")
CASES = tuple(by_name(NORM_CASES, name) for name in _NAMES)


def bench(case: NormCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time and error of one case, and the time of XLA."""
    del rates  # bound by its launch
    keys = jax.random.split(jax.random.key(0), 2 * num_layers)
    streams = [jax.random.normal(key, case.shape, jnp.bfloat16) for key in keys]
    added = streams[1::2]
    if case.num_parts:
        shape = case.num_parts, *case.shape
        added = [jax.random.normal(key, shape) for key in keys[1::2]]
    layers = list(zip(streams[::2], added, strict=True))
    shared = (jnp.linspace(0.5, 2.0, case.shape[1], dtype=jnp.bfloat16),)
    return against_reference(
        functools.partial(add_norm, eps=1e-6), layers, shared, impl
    )
