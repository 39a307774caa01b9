"""Public entry of the dense chain: checks, choice of implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common import (
    POOL_DTYPES,
    check_dtype,
    check_shape,
    load_implementation,
)

NUM_COUNTERS = 32


class ChainWeights(NamedTuple):
    """Weights between two attentions, all of one dtype.

    M: width of attention's result, N: of the stream, I: of the gated MLP, Q: of the
    projection to heads.
    """

    out: jax.Array  # [M, N], output projection
    norm: jax.Array  # [N], factor of the norm before the MLP
    gate_up: jax.Array  # [N, 2, I]
    down: jax.Array  # [I, N]
    next_norm: jax.Array  # [N], factor of the next layer's first norm, or of the last
    qkv: jax.Array | None  # [N, Q], the next layer's projection; None: there is none


def new_counters() -> jax.Array:
    """Returns the counters for the first call: zeros, int32 [NUM_COUNTERS]."""
    return jnp.zeros(NUM_COUNTERS, jnp.int32)


def dense_chain(
    mixed: jax.Array,
    stream: jax.Array,
    weights: ChainWeights,
    counters: jax.Array,
    *,
    eps: float,
    impl: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns stream, projection and counters after all work between two attentions.

        stream += mixed @ out
        stream += (silu(gate) * up) @ down   of gate, up = norm(stream) @ gate_up
        projected = next_norm(stream) @ qkv

    Products accumulate in float32 and are rounded to the dtype of the stream, gate and
    up each; so are both sums, the norms, which are of the rounded stream and computed
    in float32 (see `add_norm`), and the gated product, which is computed in float32
    of the rounded gate and up.

    The projection is left in float32 parts [P, T, Q] of any number: their sum in order,
    rounded to the dtype, is the product. Without `qkv` the norm of the stream [T, N]
    takes their place, in the dtype of the stream.

    Args:
      mixed: [T, M], bfloat16 or float32, the result of attention.
      stream: [T, N], dtype of mixed, the residual stream before attention's is added.
      weights: see `ChainWeights`, dtype of mixed.
      counters: int32 [NUM_COUNTERS], `new_counters()` before the first call and
        afterwards those of the call before: thread blocks of a GPU wait for each other
        by them. Other implementations hand them back as they are.
      eps: added to the mean square of both norms.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    _check_rows(mixed, stream)
    _check_weights(weights, mixed.shape[1], stream.shape[1], mixed.dtype)
    check_shape("counters", counters, (NUM_COUNTERS,), "as new_counters() makes them")
    check_dtype("counters", counters, jnp.int32)
    function = load_implementation("pallas_kernels.dense_chain", "dense_chain", impl)
    return function(mixed, stream, weights, counters, eps=eps)


def _check_rows(mixed, stream):
    check_shape("mixed", mixed, (None, None), "[T, M]")
    check_dtype("mixed", mixed, *POOL_DTYPES)
    check_shape("stream", stream, (mixed.shape[0], None), "[T, N], T of mixed")
    check_dtype("stream", stream, mixed.dtype)
    for name, rows in (("mixed", mixed), ("stream", stream)):
        if 0 in rows.shape:
            shape = tuple(rows.shape)
            raise ValueError(f"{name} has shape {shape}: no axis may be empty")


def _check_weights(weights, width, size, dtype):
    inner = weights.gate_up.shape[-1]
    expected = ChainWeights(
        out=((width, size), "[M, N] of mixed and stream"),
        norm=((size,), "[N] of stream"),
        gate_up=((size, 2, None), "[N, 2, I], N of stream"),
        down=((inner, size), "[I, N] of gate_up and stream"),
        next_norm=((size,), "[N] of stream"),
        qkv=((size, None), "[N, Q], N of stream"),
    )
    for name, (shape, meaning) in expected._asdict().items():
        array = getattr(weights, name)
        if name == "qkv" and array is None:
            continue
        check_shape(name, array, shape, meaning)
        check_dtype(name, array, dtype)
        if 0 in array.shape:
            shape = tuple(array.shape)
            raise ValueError(f"{name} has shape {shape}: no axis may be empty")
