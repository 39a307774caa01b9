"""Times the rotation of heads, and XLA's."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cases import by_name
from pallas_kernels.rotate_heads.api import rotate_heads
from pallas_kernels.rotate_heads.cases import ROTATE_CASES, RotateCase
from pallas_kernels.timing import Rates, against_reference

_NAMES = ("rotate_136", "rotate_136_parts", "rotate_d64", "rotate_2184")
CASES = tuple(by_name(ROTATE_CASES, name) for name in _NAMES)


def bench(case: RotateCase, *, impl: str, rates: Rates, num_layers: int) -> dict:
    """Returns time and error of one case, and the time of XLA."""
    del rates  # bound by its launch
    keys = jax.random.split(jax.random.key(0), num_layers)
    layers = [(jax.random.normal(key, *case.projection),) for key in keys]
    angles = jax.random.uniform(keys[0], (case.num_tokens, case.head_size // 2))
    scale = jnp.linspace(0.5, 2.0, case.head_size, dtype=jnp.bfloat16)
    shared = (jnp.cos(angles), jnp.sin(angles), *[scale, scale] * case.is_normed)
    rotate = functools.partial(rotate_heads, eps=1e-6, **case.options)
    return against_reference(rotate, layers, shared, impl)
