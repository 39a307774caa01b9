"""Register layouts that several GPU kernels share, and how they are interpreted."""

from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128  # of a warpgroup

# Of results of the matrix unit, and of a number for each of their rows.
WGMMA = plgpu.Layout.WGMMA
WGMMA_ROWS = plgpu.Layout.WGMMA.reduce(1)

# Of rows of a multiple of 64 elements, 8 at a time. A warp holds two half rows; what a
# thread holds are four neighbours.
TILED_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (2, 64), (4,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_WARP = 32


def row_layout(size: int, rows: int = 1):
    """Returns a layout of `rows` rows of `size` elements for a warpgroup.

    A multiple of 4 rows has a warp for each row; rows of any other number lie across
    all threads. `size` is 32, 64 or a multiple of 128.
    """
    if rows % 4 == 0:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((4, size), (size // 32,))),
            warp_dims=(-3,),
            lane_dims=(-2,),
            vector_dim=-1,
        )
    vector = max(1, size // _THREADS)
    if size >= _THREADS:
        warp_dims = (-3,)
    else:  # the rows are held several times
        warp_dims = (-3, plgpu.Replicated(_THREADS // size))
    return plgpu.Layout.TILED(
        plgpu.Tiling(((1, size), (32 * vector,), (vector,))),
        warp_dims=warp_dims,
        lane_dims=(-2,),
        vector_dim=-1,
    )


def lane_rows_layout(size: int, lanes: int, *, single: bool = False):
    """Returns a layout of rows of `size` elements, each held by `lanes` of a warp.

    A warpgroup holds 128 / lanes rows side by side; a `single` row is held by all of
    them, its sums being formed alike. `size` is a multiple of `lanes`, a power of 2
    below 32.
    """
    vector, in_warp = size // lanes, _WARP // lanes
    if single:
        tiles = (1, size), (vector,)
        warp_dims = (plgpu.Replicated(_THREADS // _WARP),)
        lane_dims = (plgpu.Replicated(in_warp), -2)
    else:
        rows = _THREADS // lanes
        tiles = (rows, size), (in_warp, size), (vector,)
        warp_dims, lane_dims = (-5,), (-3, -2)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=warp_dims, lane_dims=lane_dims, vector_dim=-1
    )


def interpreter_of(
    interpret: bool | plgpu.InterpretGPUParams,
) -> plgpu.InterpretGPUParams | None:
    """Returns the interpreter's parameters, None for a compiled kernel."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret or None
