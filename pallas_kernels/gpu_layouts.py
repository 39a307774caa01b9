"""Register layouts that several GPU kernels share."""

from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128  # of a warpgroup


def row_layout(size: int):
    """Returns a layout of rows of `size` elements across all threads of a warpgroup.

    It suits any number of rows; `size` is 32, 64 or a multiple of 128.
    """
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
