"""Static layout and launch plan of the Hopper attention kernels."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.api import LaneGroup

BLOCK = 64  # keys of one step
TILE = 64  # query rows of one matrix instruction
UNIT = 16  # keys of one unit of work
UNITS = BLOCK // UNIT  # of one block
GROUP = 8  # neighbouring keys of a block whose probabilities are packed alike
WARPS = 4  # of a CTA
MASS_BLOCKS = 16  # whose mass a CTA sums at a time
MERGE_ROWS = 48  # of parts, loaded together by a CTA that merges: registers
FEW_MERGE_ROWS = 24  # the same where a warp holds a share of every row
FEW_PARTS = 4  # most segments have no more
MASS_CTAS = 16  # at most, that share the mass of one lane and KV head


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Tunables of one launch."""

    num_ctas: int = 264  # persistent CTAs, two per multiprocessor of an H100
    num_stages: int = 2  # key blocks in flight per CTA
    copy_rows: int = 32  # rows of one asynchronous copy, a divisor of 64
    mass_bits: int = 12  # of one probability stored for the mass

    def __post_init__(self):
        if self.num_ctas < 1 or self.num_stages < 1:
            raise ValueError(f"{self}: CTAs and stages must be positive")
        if self.copy_rows not in (8, 16, 32, 64):
            raise ValueError(f"copy_rows is {self.copy_rows}; use 8, 16, 32 or 64")
        if self.mass_bits not in (8, 12, 16):
            raise ValueError(f"mass_bits is {self.mass_bits}; use 8, 12 or 16")


class GroupTiles(NamedTuple):
    """How the lanes of one group are cut into row tiles. All static."""

    first_lane: int
    first_token: int
    first_tile: int
    first_row: int  # among the rows of all tiles
    num_lanes: int
    num_queries: int
    step: int  # queries of one tile
    rows: int  # of one tile, a multiple of 8
    piece: int | None  # keys; None: cut anywhere

    @property
    def tiles_per_lane(self) -> int:
        """Tiles of one lane."""
        return -(-self.num_queries // self.step)

    @property
    def num_tiles(self) -> int:
        """Tiles of all lanes."""
        return self.num_lanes * self.tiles_per_lane


class Tile(NamedTuple):
    """One row tile: the queries of a lane, or as many of them as one CTA holds."""

    lane: jax.Array
    token: jax.Array  # first token of the lane
    first_query: jax.Array
    num_queries: jax.Array
    row: jax.Array  # first row among the rows of all tiles
    rows: jax.Array
    has_edges: jax.Array  # starts with the first and the last valid query


@functools.cache
def group_tiles(
    groups: tuple[LaneGroup, ...], group_size: int
) -> tuple[GroupTiles, ...]:
    """Returns how every group is cut into tiles of at most 64 rows."""
    cuts, lane, token, tile, row = [], 0, 0, 0, 0
    for num_lanes, num_queries, piece in groups:
        step = min(num_queries, TILE // group_size)
        rows = round_up(step * group_size, 8)
        sizes = num_lanes, num_queries, step, rows, piece
        cut = GroupTiles(lane, token, tile, row, *sizes)
        cuts.append(cut)
        lane, token = lane + num_lanes, token + num_lanes * num_queries
        tile, row = tile + cut.num_tiles, row + cut.num_tiles * rows
    return tuple(cuts)


def round_up(x: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below `x`."""
    return -(-x // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """Everything static about one call."""

    groups: tuple[GroupTiles, ...]
    num_out_tokens: int  # of the output, those of other launches included
    num_heads: int
    group_size: int
    head_size: int
    page_size: int
    table_width: int
    scale: float  # of the logits, in base 2
    mass_group: int | None
    mass_rows: str
    config: AttentionConfig
    dtype: jnp.dtype
    interpret: plgpu.InterpretGPUParams | None

    @property
    def num_lanes(self) -> int:
        """Lanes of all groups."""
        return self.groups[-1].first_lane + self.groups[-1].num_lanes

    @property
    def num_tiles(self) -> int:
        """Row tiles of all groups."""
        return self.groups[-1].first_tile + self.groups[-1].num_tiles

    @property
    def num_rows(self) -> int:
        """Rows of the tiles of all groups."""
        return (
            self.groups[-1].first_row + self.groups[-1].num_tiles * self.groups[-1].rows
        )

    @property
    def piece(self) -> int | None:
        """Keys of a piece: the groups from the first that has pieces on agree."""
        return self.groups[-1].piece

    @property
    def num_free(self) -> tuple[int, int]:
        """Segments that are cut anywhere, which come first, and rows of their tiles."""
        for group in self.groups:
            if group.piece is not None:
                return group.first_tile * self.num_heads, group.first_row
        return self.num_segments, self.num_rows

    @property
    def max_pieces(self) -> int:
        """Pieces of the longest segment that the page table has room for."""
        return -(-self.table_width * self.page_size // self.piece)

    @property
    def tile_queries(self) -> int:
        """Queries of the largest tile."""
        return max(group.step for group in self.groups)

    @property
    def num_segments(self) -> int:
        """Segments, i.e. (row tile, KV head) pairs; the head varies fastest."""
        return self.num_tiles * self.num_heads

    @property
    def parts_at_once(self) -> int:
        """Parts of a segment loaded together: as many as equal segments would have."""
        parts = -(-self.config.num_ctas // self.num_segments) + 1
        if self.piece is not None:
            parts = self.max_pieces
        return max(2, min(parts, self.merge_rows // self.group_size))

    @property
    def merge_rows(self) -> int:
        """Rows of parts that a CTA loads together when it merges."""
        return FEW_MERGE_ROWS if self.group_size % WARPS else MERGE_ROWS

    @property
    def heads_at_once(self) -> int:
        """KV heads of a token that one CTA merges."""
        rows = self.parts_at_once * self.group_size
        counts = range(1, self.num_heads + 1)
        fits = [
            n for n in counts if self.num_heads % n == 0 and n * rows <= self.merge_rows
        ]
        return max(fits, default=1)

    @property
    def edge_group(self) -> int | None:
        """The group whose rows start with its first and last valid query."""
        return self.mass_group if self.mass_rows == "edges" else None

    @property
    def mass_segments(self) -> tuple[int, int]:
        """Half-open range of the segments that store probabilities."""
        if self.mass_group is None:
            return 0, 0
        group = self.groups[self.mass_group]
        first = group.first_tile * self.num_heads
        return first, first + group.num_tiles * self.num_heads

    @property
    def mass_tile_rows(self) -> int:
        """Rows of probabilities stored per segment and block."""
        if self.mass_group is None:
            return 0
        per_tile = self.groups[self.mass_group].step
        if self.mass_rows == "edges":
            per_tile = min(2, per_tile)
        return per_tile * self.group_size

    @property
    def mass_words(self) -> int:
        """32-bit words of the probabilities of one row and block."""
        return BLOCK * self.config.mass_bits // 32

    def tile(self, index) -> Tile:
        """Returns the tile at an index (scalar or array), by arithmetic alone."""
        fields = None
        for number, group in enumerate(self.groups):
            local = index - group.first_tile
            if group.tiles_per_lane == 1:
                lane, first = local, local * 0
            else:
                lane = local // group.tiles_per_lane
                first = local % group.tiles_per_lane * group.step
            of_group = (
                group.first_lane + lane,
                group.first_token + lane * group.num_queries,
                first,
                jnp.minimum(group.num_queries - first, group.step),
                group.first_row + local * group.rows,
                local * 0 + group.rows,
                (first == 0) & (number == self.edge_group),
            )
            if fields is None:
                fields = of_group
                continue
            later = local >= 0
            fields = tuple(
                jnp.where(later, new, old)
                for new, old in zip(of_group, fields, strict=True)
            )
        return Tile(*fields)

    @property
    def mass_blocks(self) -> int:
        """Key blocks of the mass per lane and head."""
        blocks = -(-self.table_width * self.page_size // BLOCK)
        return round_up(blocks, MASS_BLOCKS)

    @property
    def mass_ctas(self) -> int:
        """CTAs that share the mass of one lane and head."""
        return min(MASS_CTAS, self.mass_blocks // MASS_BLOCKS)

    @property
    def options(self) -> dict:
        """Options of every launch."""
        params = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512)
        return dict(compiler_params=params, interpret=self.interpret)


def edge_query(position, last):
    """Returns the query at a row position: first, last valid, then the others."""
    other = jnp.where(position - 1 < last, position - 1, position)
    return jnp.where(position == 0, 0, jnp.where(position == 1, last, other))


def edge_position(query, last):
    """Returns the row position of a query: the inverse of `edge_query`."""
    other = jnp.where(query < last, query + 1, query)
    return jnp.where(query == 0, 0, jnp.where(query == last, 1, other))


def visible_keys(kv_len, q_len, first_query, num_queries, has_edges):
    """Returns how many keys the rows of a tile see at most."""
    last = jnp.minimum(first_query + num_queries, q_len)
    last = jnp.where(has_edges, q_len, last)
    return jnp.maximum(jnp.where(first_query < q_len, kv_len - q_len + last, 0), 0)


def num_blocks(keys):
    """Returns the blocks of a number of keys."""
    return lax.shift_right_logical(keys + (BLOCK - 1), BLOCK.bit_length() - 1)


def full(shape, value, layout):
    """Returns a float32 constant held in a register layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
