"""Named shapes of the coding of keys, frozen (see `pallas_kernels.cases`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import H100, SMALL, int32
from pallas_kernels.score_select.cases import IndexCase


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeCase(IndexCase):
    """One call of `code_keys`."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    most_keys: int

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return dict(layout=self.layout, most_keys=self.most_keys)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call."""
        lanes = len(self.ends)
        num_pages = 1 + sum(-(-end // self.page_size) for end in self.ends)
        codes = int32(*self.layout.shape(num_pages, self.num_heads))
        pool = (num_pages, self.num_heads, self.page_size, 2 * self.head_size)
        pool = jax.ShapeDtypeStruct(pool, jnp.dtype(self.dtype))
        return codes, pool, int32(lanes, self.width), int32(lanes), int32(lanes)


def _case(name, starts, ends, **sizes):
    return CodeCase(name=name, starts=starts, ends=ends, **sizes)


_FEW = dict(num_heads=2, tags=SMALL)
_LENGTHS = tuple(2500 - 37 * i for i in range(8))

CODE_CASES = (
    # A group in part, two groups, a whole page, an idle lane.
    _case("code_small", (0, 60, 64, 3), (5, 69, 128, 3), width=3, most_keys=64, **_FEW),
    _case(
        "code_pages_16",
        (5, 37),
        (45, 46),
        width=4,
        most_keys=40,
        page_size=16,
        head_size=64,
        **_FEW,
    ),
    _case("code_2_bits", (1, 200), (9, 209), width=4, most_keys=9, bits=2, **_FEW),
    _case(
        "code_pages_256",
        (120, 0),
        (300, 9),
        width=2,
        most_keys=180,
        page_size=256,
        bits=2,
        **_FEW,
    ),
    # Verifications of a step of Qwen3-8B, k = 8; prompt chunks.
    _case(
        "code_verified",
        tuple(n - 9 for n in _LENGTHS),
        _LENGTHS,
        width=64,
        most_keys=9,
        tags=H100,
    ),
    _case("code_prompts", (512, 100), (1024, 612), width=32, most_keys=512, tags=H100),
)
