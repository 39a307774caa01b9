"""Static sizes of the TPU attention kernel, planned to fit VMEM and SMEM."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
SUBLANES = 8
VMEM_HEADROOM_BYTES = 16 << 20  # what the compiler spills and pads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes that change speed and memory, never results beyond rounding."""

    block_tokens: int = 512  # keys of one buffer
    tile_rows: int = 256  # query rows of one KV head that share a read of the keys
    unrolled_rows: int = 160  # more rows fill the pipelines without unrolling
    vmem_bytes: int = 40 << 20  # of 64 MiB (v5p, tpu7x) or 128 MiB (v5e, v6e)
    table_bytes: int = 512 << 10  # page table of one call in SMEM (1 MiB in all)


DEFAULT_TUNING = Tuning()


class Sizes(NamedTuple):
    """Static sizes of one lane group's kernel."""

    num_heads: int  # KV heads
    group_size: int  # query heads per KV head
    head_size: int
    page_size: int
    table_width: int  # pages
    heads: int  # KV heads of one grid step
    tile: int  # queries of one grid step
    num_tiles: int  # tiles of a lane
    rows: int  # tile * group_size, rounded up to whole sublanes
    block_pages: int
    num_blocks: int  # blocks that cover a whole table
    with_mass: bool
    itemsize: int
    tuning: Tuning

    @property
    def block(self) -> int:
        """Keys of a block."""
        return self.block_pages * self.page_size

    @property
    def whole_rows(self) -> bool:
        """Whether K and V share one 128-lane tile, so that rows are used whole."""
        return self.head_size % LANES != 0

    @property
    def q_width(self) -> int:
        """Width of a query row: [q, 0] meets a whole [K, V] row."""
        return self.head_size * (2 if self.whole_rows else 1)

    @property
    def head_unroll(self) -> int:
        """Heads whose independent work the compiler may interleave."""
        most = max(1, self.tuning.unrolled_rows // self.rows)
        return max(n for n in range(1, most + 1) if self.heads % n == 0)

    @property
    def vmem_bytes(self) -> int:
        """VMEM of scratch, and of inputs and outputs twice."""
        keys = 2 * self.heads * self.block * 2 * self.head_size * self.itemsize
        width = max(self.q_width, LANES)
        state = self.heads * self.rows * (width + 2 * LANES) * 4
        q_and_out = 4 * self.heads * self.rows * width * self.itemsize
        mass = 0
        if self.with_mass:
            columns = self.num_blocks * self.block
            padded_heads = -(-self.num_heads // SUBLANES) * SUBLANES
            mass = (self.heads * self.rows + 2 * padded_heads) * columns * 4
        return keys + state + q_and_out + mass


def check_supported(kv_pages: jax.Array) -> None:
    """Raises NotImplementedError for pages that do not fill whole tiles."""
    page_size, row_size = kv_pages.shape[2:]
    sublanes = SUBLANES * 4 // kv_pages.dtype.itemsize
    if row_size % LANES or page_size % sublanes:
        raise NotImplementedError(
            f"kv_pages has pages of {page_size} rows of {row_size} {kv_pages.dtype}; "
            f"the TPU kernel needs a multiple of {sublanes} rows of a multiple of "
            f"{LANES} elements (2 * D); use impl='reference' or larger pages"
        )


def plan_sizes(
    pool_shape: tuple[int, ...],
    dtype: jnp.dtype,
    *,
    table_width: int,
    num_q_heads: int,
    num_queries: int,
    with_mass: bool,
    tuning: Tuning = DEFAULT_TUNING,
) -> Sizes:
    """Returns the largest head count and tile per step that fit the VMEM budget."""
    _, num_heads, page_size, row_size = pool_shape
    group_size = num_q_heads // num_heads
    block_pages = max(1, min(table_width, tuning.block_tokens // page_size))
    if with_mass:  # the logits are stored by whole 128-lane tiles
        step = LANES // math.gcd(LANES, page_size)
        block_pages = -(-block_pages // step) * step
    tile = min(num_queries, max(1, tuning.tile_rows // group_size))
    heads = num_heads
    while True:
        num_tiles = -(-num_queries // tile)
        tile = -(-num_queries // num_tiles)  # no tile of a few left-over queries
        rows = -(-tile * group_size // SUBLANES) * SUBLANES
        sizes = Sizes(
            num_heads=num_heads,
            group_size=group_size,
            head_size=row_size // 2,
            page_size=page_size,
            table_width=table_width,
            heads=heads,
            tile=tile,
            num_tiles=num_tiles,
            rows=rows,
            block_pages=block_pages,
            num_blocks=-(-table_width // block_pages),
            with_mass=with_mass,
            itemsize=jnp.dtype(dtype).itemsize,
            tuning=tuning,
        )
        if sizes.vmem_bytes <= tuning.vmem_bytes:
            return sizes
        if heads > 1:
            heads = max(n for n in range(1, heads) if num_heads % n == 0)
        elif tile > 1:
            tile = -(-tile // 2)
        else:
            raise NotImplementedError(
                f"page_table has {table_width} columns of {page_size} keys: one "
                f"query's logits need {sizes.vmem_bytes} bytes of VMEM, the kernel "
                f"has {tuning.vmem_bytes}; use a narrower table or mass_group=None"
            )
