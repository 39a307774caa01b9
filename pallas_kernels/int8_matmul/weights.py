"""Weights in 8 bits, and how a weight is rounded to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 127  # as far from 0 as on the other side; -128 is not used
_NO_SCALE = 1e-30  # of outputs whose weights are all 0


class Int8Weight(NamedTuple):
    """A matrix in 8 bits: `values * scale[:, None]` is [out, in]."""

    values: jax.Array  # int8 [out, in]
    scale: jax.Array  # float32 [out]


class PackedWeight(NamedTuple):
    """The same as an implementation reads it, see `api.pack`."""

    values: jax.Array  # int8; for GPUs [out / 64, in / 128, 32, 256], else [out, in]
    scale: jax.Array  # float32 [out]


def quantise(kernel: jax.Array) -> Int8Weight:
    """Returns the nearest 8-bit form of a kernel [in, ...], one scale for each output.

    The scale of an output is its largest weight over 127, so that it is symmetric
    about 0; a weight is rounded to the nearest multiple of it, to the even one of two.

    Raises:
      ValueError: the kernel has no inputs or no outputs.
    """
    if kernel.ndim < 2 or 0 in kernel.shape:
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}, expected [in, outputs ...]: no "
            "axis may be empty"
        )
    flat = kernel.reshape(kernel.shape[0], -1).T.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(flat).max(axis=1), _NO_SCALE) / LARGEST
    return Int8Weight(jnp.round(flat / scale[:, None]).astype(jnp.int8), scale)
