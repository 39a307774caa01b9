"""Public entries of the product with a weight in 8 bits: checks, choice of code."""

import jax.numpy as jnp

from pallas_kernels.array_types import (
    FewRows,
    Int8Blocks,
    Int8Values,
    OutputScale,
    ProductParts,
)
from pallas_kernels.common import (
    check_dtype,
    check_shape,
    is_for_gpu,
    load_implementation,
)
from pallas_kernels.int8_matmul.tiling import BLOCK, BLOCK_SHAPE, num_blocks
from pallas_kernels.int8_matmul.weights import Int8Weight, PackedWeight

_PACKAGE = "pallas_kernels.int8_matmul"


def pack(weight: Int8Weight, *, impl: str | None = None) -> PackedWeight:
    """Returns a weight in the order in which an implementation reads it, made once.

    Args:
      weight: int8 values [out, in], float32 scale [out]; see `weights.quantise`.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`. Only GPUs want
        another order, blocks of 64 outputs by 128 inputs; an interpreter wants that of
        its platform.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shape. That for
        GPUs takes inputs and outputs by 64.
    """
    check_shape("values", weight.values, (None, None), "[out, in]")
    check_dtype("values", weight.values, jnp.int8)
    if 0 in weight.values.shape:
        raise ValueError(
            f"values has shape {tuple(weight.values.shape)}: no axis may be empty"
        )
    check_shape("scale", weight.scale, weight.values.shape[:1], "[out] of values")
    check_dtype("scale", weight.scale, jnp.float32)
    return load_implementation(_PACKAGE, "pack", impl)(weight)


def int8_matmul(
    x: FewRows,
    values: Int8Values | Int8Blocks,
    scale: OutputScale,
    *,
    parts: int | None = None,
    impl: str | None = None,
) -> ProductParts:
    """Returns x @ (values * scale[:, None]).T, [T, out], bfloat16; or parts of it.

    Values are bfloat16 numbers without a rounding. Products are summed in float32, the
    sum is multiplied by the scale of its output, and rounded once.

    Args:
      x: [T, in], bfloat16, the rows of few tokens.
      values: int8, what `pack` makes for the same `impl`.
      scale: [out], float32, what a value of each output counts.
      parts: None, or into how many equal parts the inputs are cut. The result is then
        float32 [parts, T, out], which `add_norm` and `rotate_heads` sum.
        `choose_parts` says what is fast.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, values that were packed
        for another platform, or inputs that cannot be cut into so many parts.
      NotImplementedError: the chosen implementation cannot serve the shapes. That for
        GPUs takes 256 rows at most, other T than multiples of 8 being padded by a
        copy, and cuts inputs at multiples of 128.
    """
    check_shape("x", x, (None, None), "[T, in]")
    if 0 in (*x.shape, *scale.shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and scale {tuple(scale.shape)}: no axis may "
            "be empty"
        )
    check_shape("scale", scale, (None,), "[out]")
    _check_values(values, x.shape[1], scale.shape[0], impl)
    check_dtype("x", x, jnp.bfloat16)
    check_dtype("values", values, jnp.int8)
    check_dtype("scale", scale, jnp.float32)
    if parts is not None and (parts < 1 or x.shape[1] % parts):
        raise ValueError(f"parts is {parts}: it must divide the {x.shape[1]} inputs")
    function = load_implementation(_PACKAGE, "int8_matmul", impl)
    return function(x, values, scale, parts=parts)


def _check_values(values, size_in, size_out, impl):
    """Raises ValueError unless values are those of a weight, in the order of `impl`."""
    for_gpu = is_for_gpu(impl)
    if len(values.shape) != (4 if for_gpu else 2):
        platform = "a GPU" if for_gpu else "a TPU or the reference"
        raise ValueError(
            f"values has shape {tuple(values.shape)}, which is not packed for "
            f"{platform}: use pack(weight, impl={impl!r})"
        )
    if not for_gpu:
        check_shape("values", values, (size_out, size_in), "[out of scale, in of x]")
        return
    shape = *num_blocks(size_in, size_out), *BLOCK_SHAPE
    outputs, inputs = BLOCK
    meaning = f"blocks of {outputs} outputs (of scale) by {inputs} inputs (of x)"
    check_shape("values", values, shape, meaning)
