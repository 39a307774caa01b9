"""Named shapes of the rotation of heads, frozen (see `pallas_kernels.cases`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import H100, SMALL, SMOLLM2, Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateCase(Case):
    """One call of `rotate_heads`."""

    num_tokens: int
    is_normed: bool = True
    num_heads: int = 8
    group_size: int = 4
    head_size: int = 128
    num_parts: int = 0  # of the projection; 0: it comes as one array of `dtype`
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call, but for `eps`."""
        return dict(dtype=jnp.dtype(self.dtype))

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Arrays of the call."""
        array = jax.ShapeDtypeStruct
        table = array((self.num_tokens, self.head_size // 2), jnp.float32)
        scale = array((self.head_size,), jnp.dtype(self.dtype))
        scale = scale if self.is_normed else None
        return array(*self.projection), table, table, scale, scale

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[T, H, G + 2, D] of the projection."""
        return self.num_tokens, self.num_heads, self.group_size + 2, self.head_size

    @property
    def projection(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype in which the projection comes, with its parts."""
        if self.num_parts:
            return (self.num_parts, *self.shape), "float32"
        return self.shape, self.dtype


def _case(name, num_tokens, **sizes):
    return RotateCase(name=name, num_tokens=num_tokens, **sizes)


_D64 = dict(is_normed=False, **SMOLLM2)

ROTATE_CASES = (
    _case("single", 1, head_size=16, dtype="float32", tags=SMALL),
    # Tokens that no tile divides, without and with a norm.
    _case("rotate_ragged", 11, tags=SMALL | H100, **_D64),
    _case("rotate_bf16", 9, num_heads=2, tags=SMALL),
    _case("rotate_parts", 9, num_heads=2, num_parts=3, tags=SMALL),
    _case("rotate_parts_d64", 5, num_parts=2, tags=SMALL, **_D64),
    # Steps of an engine: a large model, a small one, a prompt chunk beside the first.
    _case("rotate_136", 136),
    _case("rotate_136_parts", 136, num_parts=2),
    _case("rotate_d64", 512, **_D64),
    _case("rotate_2184", 2184),
)
