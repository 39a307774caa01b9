"""Sum with its norm for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per token: all its threads hold the row, which is read once. Rows that 128
threads cannot share evenly are narrow; a warp holds one of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import Stream, StreamParts, StreamScale
from pallas_kernels.gpu_layouts import interpreter_of

_WARP = 32
_WARPS = 4  # of a CTA


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Tunables of one launch."""

    vector: int = 8  # neighbouring elements of one thread, if the row has enough

    def __post_init__(self):
        if self.vector not in (1, 2, 4, 8):
            raise ValueError(f"vector is {self.vector}; use a power of 2 up to 8")


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("eps", "interpret", "config"))
def add_norm_gpu(
    x: Stream,
    y: StreamParts,
    scale: StreamScale,
    *,
    eps: float,
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: NormConfig | None = None,
) -> tuple[Stream, Stream]:
    """Returns what `api.add_norm` documents, computed on a Hopper GPU."""
    config = config or NormConfig()
    num_tokens, size = x.shape
    if size % _WARP:
        raise NotImplementedError(
            f"rows have {size} elements: the GPU kernel serves multiples of {_WARP}; "
            "impl='reference' serves every size"
        )
    is_wide = size % (_WARP * _WARPS) == 0
    threads = _WARP * (_WARPS if is_wide else 1)
    vector = math.gcd(config.vector, size // threads)
    num_tiles, num_left = divmod(num_tokens, 1 if is_wide else _WARPS)

    def body(*refs):
        tile = lax.axis_index("tile")
        if is_wide:
            _add_norm(refs, tile, 1, _wide_layout(vector), eps)
            return
        if num_tiles:

            @pl.when(tile < num_tiles)
            def _many():
                _add_norm(refs, tile * _WARPS, _WARPS, _warp_layout(vector), eps)

        if num_left:

            @pl.when(tile >= num_tiles)
            def _one():
                token = num_tiles * _WARPS + tile - num_tiles
                _add_norm(refs, token, 1, _warp_layout(vector, single=True), eps)

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2,
        grid=(num_tiles + num_left,),
        grid_names=("tile",),
        kernel_name="add_norm",
        # No thread reads what it or another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpreter_of(interpret),
    )(x, y, scale)


def _wide_layout(vector):
    """Returns the layout of a row that all threads of a CTA hold, in turns."""
    tiles = (1, _WARPS * _WARP * vector), (_WARP * vector,), (vector,)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )


def _warp_layout(vector, *, single=False):
    """Returns the layout of rows of a warp each; all warps hold a `single` row."""
    tiles = (1 if single else _WARPS, _WARP * vector), (vector,)
    warp_dims = (plgpu.Replicated(_WARPS) if single else -3,)
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=warp_dims, lane_dims=(-2,), vector_dim=-1
    )


def _add_norm(refs, first, tokens, layout, eps):
    """Does the work of some tokens from `first` on."""
    x_ref, y_ref, scale_ref, stream_ref, normed_ref = refs
    window, size = pl.ds(first, tokens), x_ref.shape[1]

    def load(ref, layout=layout):
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    x = load(x_ref.at[window])
    if len(y_ref.shape) == 3:
        parts = (load(y_ref.at[part, window]) for part in range(y_ref.shape[0]))
        y = functools.reduce(jnp.add, parts).astype(x_ref.dtype).astype(jnp.float32)
    else:
        y = load(y_ref.at[window])
    scale = load(scale_ref, layout.reduce(0))
    stream = (x + y).astype(x_ref.dtype)
    stream_ref[window] = stream
    wide = stream.astype(jnp.float32)
    factor = lax.rsqrt(jnp.sum(wide * wide, axis=1) / size + eps)
    normed = wide * lax.broadcast_in_dim(factor, wide.shape, [0])
    normed *= lax.broadcast_in_dim(scale, wide.shape, [1])
    normed_ref[window] = normed.astype(x_ref.dtype)
