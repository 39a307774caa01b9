"""Public entry of the head rotation: checks, choice of implementation."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.array_types import (
    Angles,
    HeadScale,
    Projection,
    Queries,
    RowsOfHeads,
)
from pallas_kernels.common import (
    POOL_DTYPES,
    check_dtype,
    check_shape,
    load_implementation,
)


def rotate_heads(
    qkv: Projection,
    cos: Angles,
    sin: Angles,
    q_scale: HeadScale | None = None,
    k_scale: HeadScale | None = None,
    *,
    eps: float = 0.0,
    dtype: DTypeLike | None = None,
    impl: str | None = None,
) -> tuple[Queries, RowsOfHeads]:
    """Returns queries [T, H*G, D] and new KV rows [T, H, 2*D] of a fused projection.

    Queries and keys are turned by their position (rotary embedding, arXiv 2104.09864;
    element i is paired with element i + D/2), after a root-mean-square norm over D if
    scales are given. Values stay as they are. Computed in float32; the result of the
    norm is rounded to the dtype of the results before the rotation.

        qkv   token, KV head:  q0 q1 .. q(G-1) k v
        q     token:           q0 q1 .. of head 0 | q0 q1 .. of head 1 | ...
        rows  token, KV head:  k v

    Args:
      qkv: [T, H, G + 2, D], bfloat16 or float32: of each KV head its G queries, its
        key and its value; or float32 [parts, T, H, G + 2, D], parts of a product, which
        are summed in their order and rounded to `dtype` before anything else.
      cos: float32 [T, D/2], of each token's position times each pair's frequency.
      sin: float32 [T, D/2].
      q_scale: [D], factor of the norm of queries, dtype of the results; None: no norm.
      k_scale: [D], factor of the norm of keys; given if and only if q_scale is.
      eps: added to the mean square in the norm.
      dtype: of the results, bfloat16 or float32; needed for parts only, None: that of
        qkv.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes or dtypes that do not fit together; one scale alone; parts
        without a dtype.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    meaning = "[T, H, G + 2, D], queries, key and value of each KV head"
    in_parts = qkv.ndim == 5
    shape = (None,) * (5 if in_parts else 4)
    check_shape("qkv", qkv, shape, f"{meaning}, or parts [parts, ...] of it")
    check_dtype("qkv", qkv, *((jnp.float32,) if in_parts else POOL_DTYPES))
    dtype = _dtype_of_results(qkv, dtype)
    num_tokens, _, width, head_size = qkv.shape[-4:]
    if width < 3 or head_size % 2 or 0 in qkv.shape:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}: each KV head needs a query, a key and "
            "a value of an even size, and no axis may be empty"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(name, table, (num_tokens, head_size // 2), "[T, D/2] of qkv")
        check_dtype(name, table, jnp.float32)
    if (q_scale is None) != (k_scale is None):
        missing = "q_scale" if q_scale is None else "k_scale"
        raise ValueError(f"{missing} is None: queries and keys are normed, or neither")
    scales = () if q_scale is None else (("q_scale", q_scale), ("k_scale", k_scale))
    for name, scale in scales:
        check_shape(name, scale, (head_size,), "[D] of qkv")
        check_dtype(name, scale, dtype)
    function = load_implementation("pallas_kernels.rotate_heads", "rotate_heads", impl)
    return function(qkv, cos, sin, q_scale, k_scale, eps=eps, dtype=dtype)


def _dtype_of_results(qkv, dtype):
    """Returns `dtype`, or that of `qkv`, if they fit together."""
    if dtype is None:
        if qkv.ndim == 5:
            raise ValueError(
                "dtype is None, but qkv comes in parts, which are float32 for results "
                "of every dtype; pass dtype=..."
            )
        return jnp.dtype(qkv.dtype)
    dtype = jnp.dtype(dtype)
    if dtype not in (POOL_DTYPES if qkv.ndim == 5 else (qkv.dtype,)):
        wanted = "bfloat16 or float32" if qkv.ndim == 5 else f"that of qkv, {qkv.dtype}"
        raise ValueError(f"dtype is {dtype.name}, expected {wanted}")
    return dtype
