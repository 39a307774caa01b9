"""Products of few tokens with 8-bit weights, by the library's kernel or by XLA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.int8_matmul import Int8Weight, PackedWeight
from pallas_kernels.int8_matmul.gpu import int8_matmul_gpu
from pallas_kernels.int8_matmul.reference import int8_matmul_reference
from pallas_kernels.int8_matmul.tiling import Tiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xla:
    """The product as XLA makes it: a dot whose weights are converted."""

    parts: int = 1

    def why_not(self, num_tokens, size_in, size_out) -> str | None:
        """What keeps the long axis from being cut like this, or None."""
        if size_in % self.parts:
            return f"{size_in} inputs cannot be cut into {self.parts} parts"
        return None


def multiply(
    x: jax.Array, weight: Int8Weight | PackedWeight, how: Tiling | Xla, dtype
) -> jax.Array:
    """x [T, in] times a weight: [T, out] in `dtype`, or float32 parts [P, T, out].

    Args:
      weight: PackedWeight for a Tiling, else Int8Weight.
      how: a Tiling (GPU) or Xla; more than one part gives parts.
      dtype: that of x, or float32.

    Raises:
      ValueError: the product cannot be cut like this.
    """
    if isinstance(how, Tiling) != isinstance(weight, PackedWeight):
        raise ValueError(f"{how} does not take a {type(weight).__name__}")
    reason = how.why_not(*x.shape, len(weight.scale))
    if reason:
        raise ValueError(f"{how}: {reason}")
    is_rounded = how.parts == 1 and jnp.dtype(dtype) == x.dtype
    parts = None if is_rounded else how.parts
    if isinstance(how, Xla):
        made = int8_matmul_reference(x, *weight, parts=parts)
    else:
        made = int8_matmul_gpu(x, *weight, parts=parts, tiling=how)
    return made[0] if parts == 1 else made
