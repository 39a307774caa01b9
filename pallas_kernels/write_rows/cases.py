"""Named shapes of the store of new KV rows, frozen (see `pallas_kernels.cases`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import SMALL, Case, int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCase(Case):
    """One call of `write_rows`."""

    num_rows: int
    num_copies: int = 0
    copies_from: int = 0
    num_heads: int = 8
    head_size: int = 128
    page_size: int = 64
    num_pages: int = 2048
    is_shared: bool = True  # one place for all heads
    dtype: str = "bfloat16"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return dict(copies_from=self.copies_from)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call."""
        H, row_size = self.num_heads, 2 * self.head_size
        pool = (self.num_pages, H, self.page_size, row_size)
        rows = (self.num_rows, H, row_size)
        pool, rows = (
            jax.ShapeDtypeStruct(s, jnp.dtype(self.dtype)) for s in (pool, rows)
        )
        place = int32(self.num_places, 1 if self.is_shared else H)
        return pool, rows, place, place

    @property
    def num_places(self) -> int:
        """Rows stored, those stored a second time included."""
        return self.num_rows + self.num_copies


def _case(name, num_rows, num_copies=0, pool=(2048, 8, 64), **sizes):
    """`pool` has the pages, their KV heads and their rows."""
    sizes |= zip(("num_pages", "num_heads", "page_size"), pool, strict=True)
    return WriteCase(name=name, num_rows=num_rows, num_copies=num_copies, **sizes)


WRITE_CASES = (
    _case("one_row", 1, pool=(3, 1, 8), dtype="float32", tags=SMALL),
    # Draft rows, then verified ones that are stored again.
    _case("write_step", 7, 4, pool=(6, 2, 8), copies_from=3, tags=SMALL),
    _case(
        "write_per_head",
        5,
        3,
        pool=(5, 3, 16),
        copies_from=1,
        head_size=64,
        is_shared=False,
        tags=SMALL,
    ),
    # Steps of an engine: 64 slots, plain and with 8 verifications; a small model.
    _case("write_plain", 64),
    _case("write_136", 136, 72, copies_from=64),
    _case("write_d64", 517, 261, pool=(2048, 3, 64), copies_from=256, head_size=64),
)
