"""How a product is cut into tiles for the Hopper launch, and which CTA makes which.

Everything here is known before a launch. The inputs of a tile are never cut: neither
the tiles nor their order touch the bits of a row.
"""

import dataclasses
import functools
import heapq

import numpy as np

CHUNK = 64  # rows and outputs that leave a warpgroup at once; what tiles are made of
GROUPS = 2  # warpgroups of a CTA that multiply
OUT_SLOTS = 2  # chunks of a warpgroup that are on their way out
_SHARED_BYTES = 226 << 10  # of a CTA, barriers left out
_ACCUMULATORS = 64 * 256  # of a warpgroup: 128 registers of a thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulConfig:
    """Tunables of one launch.

    Raises:
      ValueError: sizes that do not fit a warpgroup or the shared memory.
    """

    tile_rows: int = 128
    tile_columns: int = 256  # outputs
    by_rows: bool = True  # how the two warpgroups share a tile
    depth: int = 64  # inputs of one step
    num_stages: int = 4  # steps in shared memory
    cluster: int = 2  # CTAs that read what they share once
    band: int = 16  # rows of tiles that are gone through before the next ones
    num_ctas: int = 132  # one for each multiprocessor of an H100

    def __post_init__(self):
        rows, columns = self.group_shape
        if rows % CHUNK or columns % CHUNK or rows * columns > _ACCUMULATORS:
            raise ValueError(
                f"a warpgroup has {rows} x {columns} of the tile; use multiples of "
                f"{CHUNK} whose product is {_ACCUMULATORS} at most"
            )
        if self.depth not in (64, 128) or self.num_stages < 2:
            raise ValueError(f"{self}: depth is 64 or 128, and stages are 2 or more")
        if self.cluster not in (1, 2) or self.num_ctas % self.cluster:
            raise ValueError(f"{self}: cluster is 1 or 2 and divides num_ctas")
        if self.band < 1 or self.band % self.cluster:
            raise ValueError(f"band is {self.band}; use a multiple of {self.cluster}")
        if self.shared_bytes > _SHARED_BYTES:
            raise ValueError(
                f"{self} takes {self.shared_bytes} bytes of shared memory, of "
                f"{_SHARED_BYTES}; use fewer stages"
            )

    @property
    def group_shape(self) -> tuple[int, int]:
        """Rows and outputs of a tile that one warpgroup has."""
        if self.by_rows:
            return self.tile_rows // GROUPS, self.tile_columns
        return self.tile_rows, self.tile_columns // GROUPS

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a CTA: its steps, and chunks on their way out."""
        step = 2 * self.depth * (self.tile_rows + self.tile_columns)
        return self.num_stages * step + GROUPS * OUT_SLOTS * 2 * CHUNK * CHUNK

    def tiles(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Returns the numbers of tiles along rows and outputs."""
        return -(-num_rows // self.tile_rows), -(-num_columns // self.tile_columns)


# Tiles that are tried, and what a step of each takes, relative to the arithmetic.
# Measured on an H200, as the costs below (docs/kernels.md).
_CHOICES = (
    (MatmulConfig(), 1.0),
    (MatmulConfig(tile_columns=192, num_stages=4), 1.08),
    (MatmulConfig(tile_columns=128, num_stages=6), 1.15),
)
_LONE_COST = 1.2  # of a last row of tiles, of which a pair reads the weight twice
_HALF_COST = 0.7  # if one warpgroup has no rows
_TILE_STEPS = 2.0  # that the start and the end of a tile take, of 128 x 256 x 64


def choose_config(num_rows: int, num_columns: int, num_inputs: int) -> MatmulConfig:
    """Returns the configuration of which a product is expected to be done first."""

    def steps(choice):
        config, slowness = choice
        rounds = max(load for load, _ in _shares(num_rows, num_columns, config))
        size = config.tile_rows * config.tile_columns / _ACCUMULATORS / GROUPS
        return rounds * (num_inputs / 64 * size * slowness + _TILE_STEPS)

    return min(_CHOICES, key=steps)[0]


def make_table(num_rows: int, num_columns: int, config: MatmulConfig) -> np.ndarray:
    """Returns what each CTA does, int32 [CTAs, 1 + tiles, 3].

    The first entry of a CTA is its number of tiles; the others are (row of tiles,
    column of tiles, whether the pair of CTAs shares rows, not a column). CTAs of a pair
    have equally many. A tile beyond the last one keeps the second CTA in step.
    """
    shares = [units for _, units in _shares(num_rows, num_columns, config) if units]
    most = max(map(len, shares))
    table = np.zeros((len(shares), config.cluster, 1 + most, 3), np.int32)
    for cluster, units in enumerate(shares):
        table[cluster, :, 0, 0] = len(units)
        for index, (row, column, shares_rows) in enumerate(units):
            for member in range(config.cluster):
                along = (0, member) if shares_rows else (member, 0)
                place = row + along[0], column + along[1]
                table[cluster, member, 1 + index] = *place, shares_rows
    return table.reshape(len(shares) * config.cluster, 1 + most, 3)


def _shares(num_rows, num_columns, config):
    """Returns (load in tiles, units) of every cluster.

    Units are dealt out one by one to the cluster with the least to do, short ones last.
    Each cluster then takes its own in the order of the weight's columns: whoever reads
    a column reads it when others do.
    """
    shares = [(0.0, index, []) for index in range(config.num_ctas // config.cluster)]
    for cost, units in _units(num_rows, num_columns, config):
        for unit in units:
            load, index, taken = heapq.heappop(shares)
            taken.append(unit)
            heapq.heappush(shares, (load + cost, index, taken))
    ordered = sorted(shares, key=lambda share: share[1])
    return [(load, [unit for _, unit in sorted(taken)]) for load, _, taken in ordered]


@functools.lru_cache(maxsize=64)
def _units(num_rows, num_columns, config):
    """Returns (cost, (place in the order, unit) ...), whole rows of tiles first.

    A unit is (row, column, shares rows). A pair of CTAs has two tiles above each other;
    of an odd number of tile rows the last one goes to pairs side by side, so that no
    CTA has nothing to do.
    """
    rows, columns = config.tiles(num_rows, num_columns)
    step = config.cluster
    left = num_rows - (rows - 1) * config.tile_rows
    is_half = config.by_rows and left <= config.tile_rows // GROUPS
    has_lone = rows % step != 0 or (is_half and step == 1)
    whole = rows - has_lone
    units, lone = [], []
    for first in range(0, whole, config.band):
        band = range(first, min(first + config.band, whole), step)
        order = [(row, column, 0) for column in range(columns) for row in band]
        units += order[::-1] if (first // config.band) % 2 else order
    if has_lone:  # each beside the tiles above it
        places = {column: place for place, (_, column, _) in enumerate(units)}
        first = range(0, columns, step)
        lone = [(places.get(c, c), (whole, c, int(step > 1))) for c in first]
    cost = _HALF_COST if is_half else _LONE_COST
    return (1.0, tuple(enumerate(units))), (cost, tuple(lone))
