"""Public entry of the product of rows with a weight: checks, choice of code."""

import jax.numpy as jnp

from pallas_kernels.array_types import ManyRows, ProductRows, Weight
from pallas_kernels.common import check_dtype, check_shape, load_implementation


def matmul(x: ManyRows, weight: Weight, *, impl: str | None = None) -> ProductRows:
    """Returns x @ weight, [T, out], bfloat16.

    Products are summed in float32 and the sum is rounded once. On a GPU one accumulator
    takes all inputs in their order, so that the bits of a row follow from that row and
    the weight alone: not from T, from other rows, or from the row's place.

    Args:
      x: [T, in], bfloat16, the rows of many tokens.
      weight: [in, out], bfloat16.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes. That for
        GPUs takes inputs and outputs by 64; other T than multiples of 8 are padded by
        a copy.
    """
    check_shape("x", x, (None, None), "[T, in]")
    if 0 in (*x.shape, *weight.shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}: no axis "
            "may be empty"
        )
    check_shape("weight", weight, (x.shape[1], None), "[in, out], in of x")
    check_dtype("x", x, jnp.bfloat16)
    check_dtype("weight", weight, jnp.bfloat16)
    return load_implementation("pallas_kernels.matmul", "matmul", impl)(x, weight)
