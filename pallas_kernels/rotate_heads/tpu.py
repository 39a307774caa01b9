"""Head rotation for TPUs: XLA, which fuses the reference there.

Elementwise but for a sum over D, all of it follows the projection without a launch of
its own.
"""

import jax.numpy as jnp

from pallas_kernels.array_types import Array, Queries, RowsOfHeads
from pallas_kernels.rotate_heads.reference import rotate_heads_reference


def rotate_heads_tpu(
    *args: Array | None,
    eps: float,
    dtype: jnp.dtype | None = None,
    interpret: bool,
) -> tuple[Queries, RowsOfHeads]:
    """Returns what `api.rotate_heads` documents; nothing in it needs interpretation."""
    del interpret
    return rotate_heads_reference(*args, eps=eps, dtype=dtype)
