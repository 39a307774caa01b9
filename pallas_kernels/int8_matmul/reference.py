"""The specification of the product with a weight in 8 bits, in plain jnp."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.array_types import FewRows, Int8Values, OutputScale, ProductParts
from pallas_kernels.int8_matmul.weights import Int8Weight, PackedWeight


@functools.partial(jax.jit, static_argnames="parts")
def int8_matmul_reference(
    x: FewRows, values: Int8Values, scale: OutputScale, *, parts: int | None = None
) -> ProductParts:
    """Returns what `api.int8_matmul` documents; same arguments, no checks.

    The order of a sum is the library's own, and may follow from T.
    """
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    values = values.astype(x.dtype)
    if parts is None:
        return (dot(x, values, (((1,), (1,)), ((), ()))) * scale).astype(x.dtype)
    cut = (a.reshape(len(a), parts, -1) for a in (x, values))
    return dot(*cut, (((2,), (2,)), ((1,), (1,)))) * scale


def pack_reference(weight: Int8Weight) -> PackedWeight:
    """Returns the weight as it is."""
    return PackedWeight(*weight)
