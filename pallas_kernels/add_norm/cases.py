"""Named shapes of the sum with its norm, frozen (see `pallas_kernels.cases`)."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.cases import SMALL, Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """One call of `add_norm` on [T, M]."""

    shape: tuple[int, int]
    num_parts: int = 0  # of what is added; 0: it comes as one array like x
    dtype: str = "bfloat16"

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call."""
        x, scale = (
            jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))
            for shape in (self.shape, self.shape[1:])
        )
        if not self.num_parts:
            return x, x, scale
        y = jax.ShapeDtypeStruct((self.num_parts, *self.shape), jnp.float32)
        return x, y, scale


def _case(name, *shape, **sizes):
    return NormCase(name=name, shape=shape, **sizes)


NORM_CASES = (
    # Rows of a CTA, and of a warp; tokens that its warps do not divide; parts.
    _case("norm_wide", 3, 1280, dtype="float32", tags=SMALL),
    _case("norm_narrow", 9, 576, tags=SMALL),
    _case("norm_parts", 3, 256, num_parts=3, tags=SMALL),
    _case("norm_parts_narrow", 5, 96, num_parts=2, tags=SMALL),
    _case("norm_136", 136, 4096),
    _case("norm_136_parts", 136, 4096, num_parts=2),
    _case("norm_49_parts", 49, 4096, num_parts=8),
    _case("norm_512", 512, 576),
    _case("norm_2184", 2184, 4096),
)
