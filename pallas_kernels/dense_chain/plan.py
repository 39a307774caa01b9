"""How the dense work between two attentions is cut over the CTAs of one launch.

Every product streams its weights once: a CTA takes some columns, and a cut of the long
axis where columns alone are too few. All its tokens pass by, in tiles of 64 rows.
"""

import dataclasses
import functools
import math

NUM_CTAS = 128  # of a launch, all of which must be on the device at once
TILE = 64  # tokens of one matrix instruction
BLOCK = 64  # rows of weights that are copied at once
MAX_COLUMNS = 192  # of one CTA, as many as its registers hold
_MAX_SPLITS = 8
_SUB = 64  # columns of one weight tile, unless they are halved (gate and up)
_SHARED_BYTES = 222 * 1024  # of a CTA, less barriers and scratch
_MAX_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows [T, size_in] times weights [size_in, size_out], cut into items."""

    size_in: int
    columns: int  # of an item, those of all its weight tiles
    tiles: int  # weight tiles side by side
    column_items: int
    splits: int

    @property
    def items(self) -> int:
        """CTAs that have work."""
        return self.column_items * self.splits

    @property
    def blocks(self) -> int:
        """Blocks of weights of one item."""
        return self.size_in // (self.splits * BLOCK)

    @property
    def tile_columns(self) -> int:
        """Columns of one weight tile."""
        return self.columns // self.tiles


@dataclasses.dataclass(frozen=True)
class ChainPlan:
    """Everything static about one launch."""

    num_ctas: int
    num_tokens: int
    hidden: int
    out: Product
    gate_up: Product
    down: Product
    qkv: Product | None
    consumers: int  # computing warpgroups
    weight_stages: int
    row_stages: int

    @property
    def products(self) -> tuple[Product, ...]:
        """The products in their order."""
        products = self.out, self.gate_up, self.down
        return products if self.qkv is None else (*products, self.qkv)

    @property
    def row_tiles(self) -> int:
        """Tiles of 64 tokens."""
        return -(-self.num_tokens // TILE)

    @property
    def tiles_each(self) -> int:
        """Tiles of tokens of one computing warpgroup."""
        return self.row_tiles // self.consumers

    @property
    def num_rows(self) -> int:
        """Rows of buffers: the tokens, up to whole tiles."""
        return self.row_tiles * TILE

    @property
    def registers(self) -> int:
        """Of a thread that computes: what those that copy leave of a CTA's."""
        warpgroups = self.consumers + 2
        all_registers = 512 // warpgroups // 8 * 8 * warpgroups
        left = all_registers - 2 * self.copy_registers
        return min(232, left // self.consumers // 8 * 8)

    @property
    def copy_registers(self) -> int:
        """Of a thread that copies."""
        return 32


def _cut(size_in: int, size_out: int, num_tokens: int, num_ctas) -> Product | None:
    """Returns the cut of a product that reads and writes least beside its weights."""
    best, least = None, math.inf
    for columns in range(_SUB, MAX_COLUMNS + 1, _SUB):
        for splits in range(1, _MAX_SPLITS + 1):
            if size_out % columns or size_in % (splits * BLOCK):
                continue
            product = Product(
                size_in, columns, columns // _SUB, size_out // columns, splits
            )
            if not _least(num_ctas) <= product.items <= num_ctas:
                continue
            rows = 2 * product.items * num_tokens * size_in // splits
            parts = 8 * splits * num_tokens * size_out
            if rows + parts < least:
                best, least = product, rows + parts
    return best


def _least(num_ctas):
    """Returns how many CTAs a product must occupy: fewer do not fill the memory."""
    return num_ctas * 15 // 16


def _cut_pairs(size_in: int, inner: int, num_ctas) -> Product | None:
    """Returns the cut of gate and up: as many columns of both, all of the long axis."""
    for items in range(num_ctas, _least(num_ctas) - 1, -1):
        columns = 2 * inner // items
        if inner % items or columns > MAX_COLUMNS or columns // 2 % 16:
            continue
        if size_in % BLOCK == 0:
            return Product(size_in, columns, 2, items, 1)
    return None


@functools.cache
def make_plan(
    num_tokens: int,
    mixed: int,
    hidden: int,
    inner: int,
    qkv: int | None,
    num_ctas: int = NUM_CTAS,
) -> ChainPlan | None:
    """Returns the plan of a launch, None where one would not pay or does not exist.

    num_tokens: of the step. mixed, hidden, inner: width of the attention's result, of
    the stream, of the gate. qkv: width of the next projection to heads, None: none.
    """
    row_tiles = -(-num_tokens // TILE)
    if not 0 < num_tokens <= _MAX_TOKENS or num_tokens % 8 or hidden % 1024:
        return None
    cuts = [
        _cut(mixed, hidden, num_tokens, num_ctas),
        _cut_pairs(hidden, inner, num_ctas),
        _cut(inner, hidden, num_tokens, num_ctas),
        _cut(hidden, qkv, num_tokens, num_ctas) if qkv else None,
    ]
    if None in cuts[: 4 if qkv else 3]:
        return None
    consumers = row_tiles if row_tiles <= 3 else 2
    row_bytes, weight_bytes = (2 * BLOCK * n for n in (row_tiles * TILE, MAX_COLUMNS))
    row_stages = 4 if row_tiles in (2, 3) else 3
    weight_stages = min(8, (_SHARED_BYTES - row_stages * row_bytes) // weight_bytes)
    stages = weight_stages, row_stages
    return ChainPlan(num_ctas, num_tokens, hidden, *cuts, consumers, *stages)


def chain_fits(
    num_tokens: int, mixed: int, hidden: int, inner: int, qkv: int | None
) -> bool:
    """Returns whether one launch serves these sizes; see `make_plan`."""
    return make_plan(num_tokens, mixed, hidden, inner, qkv) is not None
