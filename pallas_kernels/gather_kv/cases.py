"""Named shapes of the gather of KV rows, frozen (see `pallas_kernels.cases`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import SMALL, TPU, Case, int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatherCase(Case):
    """One call of `gather_kv`."""

    num_lanes: int
    context: int  # rows of the source table
    cap: int
    counts: tuple[int, ...] | None = None  # one per lane; None: cap
    head_step: int = 0  # KV head h has h * head_step rows less
    is_shared: bool = False  # one list for all heads
    num_heads: int = 8
    head_size: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call: every page of the pool is in a table."""
        lanes, lists = self.num_lanes, self.num_lists
        widths = [-(-rows // self.page_size) for rows in (self.context, self.cap)]
        row = self.page_size, 2 * self.head_size
        shape = (lanes * sum(widths), self.num_heads, *row)
        pool = jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))
        tables = (int32(lanes, width) for width in widths)
        return pool, *tables, int32(lanes, lists, self.cap), int32(lanes, lists)

    @property
    def num_lists(self) -> int:
        """Index lists of a lane."""
        return 1 if self.is_shared else self.num_heads

    @property
    def num_copied_bytes(self) -> int:
        """Bytes that a call reads, and again that it writes."""
        row_bytes = 2 * self.head_size * jnp.dtype(self.dtype).itemsize
        row_bytes *= self.num_heads // self.num_lists
        return int(self.count_array().sum()) * row_bytes

    def count_array(self) -> np.ndarray:
        """Returns counts, int32 [lanes, lists]."""
        counts = np.asarray(self.counts or (self.cap,) * self.num_lanes)[:, None]
        fewer = counts - self.head_step * np.arange(self.num_lists)
        return np.maximum(fewer, 0).astype(np.int32)


def _case(name, lanes_context_cap, **sizes):
    num_lanes, context, cap = lanes_context_cap
    return GatherCase(name=name, num_lanes=num_lanes, context=context, cap=cap, **sizes)


_THREE = dict(num_heads=3, page_size=16, tags=SMALL)

GATHER_CASES = (
    _case(
        "few_rows",
        (3, 40, 19),
        counts=(19, 8, 0),
        head_step=3,
        num_heads=2,
        page_size=8,
        dtype="float32",
        tags=SMALL,
    ),
    _case("few_rows_bf16", (2, 64, 33), counts=(33, 16), head_step=1, **_THREE),
    _case(
        "few_rows_d64",
        (2, 48, 20),
        counts=(17, 20),
        head_size=64,
        dtype="float32",
        **_THREE,
    ),
    _case("page_64", (2, 256, 70), counts=(70, 64), num_heads=2, tags=SMALL),
    _case(
        "shared_rows",
        (2, 64, 33),
        counts=(33, 16),
        is_shared=True,
        **{**_THREE, "tags": frozenset({"shared"})},
    ),
    _case("gather_layer", (14, 32768, 1638), is_shared=True, tags=TPU),
    _case("gather_512b", (14, 32768, 1638)),
    _case("gather_410", (14, 8192, 410)),
    _case("gather_d64", (14, 8192, 410), num_heads=3, head_size=64),
)
