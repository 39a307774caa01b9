"""The specification of the product of rows with a weight, in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import ManyRows, ProductRows, Weight


@jax.jit
def matmul_reference(x: ManyRows, weight: Weight) -> ProductRows:
    """Returns what `api.matmul` documents; same arguments, no checks.

    The order of a sum is the library's own, and may follow from T.
    """
    contracting = ((1,), (0,)), ((), ())
    wide = jax.lax.dot_general(
        x, weight, contracting, preferred_element_type=jnp.float32
    )
    return wide.astype(x.dtype)
