"""Public entry of the sum with its norm: checks, choice of implementation."""

import jax.numpy as jnp

from pallas_kernels.array_types import Stream, StreamParts, StreamScale
from pallas_kernels.common import (
    POOL_DTYPES,
    check_dtype,
    check_shape,
    load_implementation,
)


def add_norm(
    x: Stream,
    y: StreamParts,
    scale: StreamScale,
    *,
    eps: float,
    impl: str | None = None,
) -> tuple[Stream, Stream]:
    """Returns the stream x + y and its root-mean-square norm (arXiv 1910.07467).

    Both [T, M], in the dtype of x. The norm is computed in float32, of the sum as it is
    after rounding.

    Args:
      x: [T, M], bfloat16 or float32, the residual stream.
      y: [T, M], like x, what is added to it; or float32 [parts, T, M], parts of a
        product, which are summed in their order and rounded to the dtype of x before.
      scale: [M], factor of the norm, dtype of x.
      eps: added to the mean square.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    check_shape("x", x, (None, None), "[T, M]")
    check_dtype("x", x, *POOL_DTYPES)
    if 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: no axis may be empty")
    in_parts = y.ndim == 3
    shape = (None, *x.shape) if in_parts else tuple(x.shape)
    check_shape("y", y, shape, "like x, or parts [parts, T, M] of it")
    check_dtype("y", y, jnp.float32 if in_parts else x.dtype)
    if 0 in y.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}: no parts")
    check_shape("scale", scale, (x.shape[1],), "[M] of x")
    check_dtype("scale", scale, x.dtype)
    function = load_implementation("pallas_kernels.add_norm", "add_norm", impl)
    return function(x, y, scale, eps=eps)
