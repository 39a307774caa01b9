"""Head rotation for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per KV head of some tokens. A row is cut into its halves, which the same threads
hold, so a rotation stays inside a thread and a norm inside a warp. Everything is loaded
before anything is computed: the launch waits for memory once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import (
    Angles,
    HeadScale,
    Projection,
    Queries,
    RowsOfHeads,
)
from pallas_kernels.gpu_layouts import interpreter_of, lane_rows_layout

_THREADS = 128  # of a CTA


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateConfig:
    """Tunables of one launch."""

    lanes: int = 16  # that hold half a row, if it has so many elements

    def __post_init__(self):
        if self.lanes not in (1, 2, 4, 8, 16):
            raise ValueError(f"lanes is {self.lanes}; use a power of 2 up to 16")


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("eps", "dtype", "interpret", "config"))
def rotate_heads_gpu(
    qkv: Projection,
    cos: Angles,
    sin: Angles,
    q_scale: HeadScale | None,
    k_scale: HeadScale | None,
    *,
    eps: float,
    dtype: jnp.dtype | None = None,
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: RotateConfig | None = None,
) -> tuple[Queries, RowsOfHeads]:
    """Returns what `api.rotate_heads` documents, computed on a Hopper GPU."""
    config = config or RotateConfig()
    num_tokens, num_heads, width, head_size = qkv.shape[-4:]
    dtype = dtype or qkv.dtype
    half = head_size // 2
    if half & (half - 1) or half < 8:
        raise NotImplementedError(
            f"the head size is {head_size}: the GPU kernel serves powers of 2 from 16; "
            "impl='reference' serves every size"
        )
    lanes = min(config.lanes, half)
    at_once = _THREADS // lanes
    num_tiles, num_left = divmod(num_tokens, at_once)

    def body(*refs):
        tile = lax.axis_index("tile")
        if num_tiles:
            layout = lane_rows_layout(half, lanes)

            @pl.when(tile < num_tiles)
            def _many():
                _rotate(refs, tile * at_once, at_once, layout, eps)

        if num_left:
            single = lane_rows_layout(half, lanes, single=True)

            @pl.when(tile >= num_tiles)
            def _one():
                token = num_tiles * at_once + tile - num_tiles
                _rotate(refs, token, 1, single, eps)

    q_shape = num_tokens, num_heads * (width - 2), head_size
    q, rows = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q_shape, dtype),
            jax.ShapeDtypeStruct((num_tokens, num_heads, 2, head_size), dtype),
        ),
        grid=(num_tiles + num_left, num_heads),
        grid_names=("tile", "head"),
        kernel_name="rotate_heads",
        # No thread reads what it or another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpreter_of(interpret),
    )(qkv, cos, sin, *(() if q_scale is None else (q_scale, k_scale)))
    return q, rows.reshape(num_tokens, num_heads, 2 * head_size)


def _rotate(refs, first, tokens, layout, eps):
    """Does the work of one KV head for some tokens from `first` on."""
    qkv_ref, cos_ref, sin_ref, *scale_refs, q_ref, row_ref = refs
    head, window = lax.axis_index("head"), pl.ds(first, tokens)
    half, k_index = cos_ref.shape[1], qkv_ref.shape[-2] - 2
    parts_of_row = pl.ds(0, half), pl.ds(half, half)

    def load(ref, layout=layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def load_head(*place):
        if len(qkv_ref.shape) == 4:
            return load(qkv_ref.at[place])
        parts = (load(qkv_ref.at[i, *place]) for i in range(qkv_ref.shape[0]))
        return functools.reduce(jnp.add, parts).astype(q_ref.dtype)

    heads = [
        [load_head(window, head, i, part) for part in parts_of_row]
        for i in range(k_index + 2)
    ]
    turn = load(cos_ref.at[window]), load(sin_ref.at[window])
    scales = [
        [load(ref.at[part], layout.reduce(0)) for part in parts_of_row]
        for ref in scale_refs
    ]
    for i, parts in enumerate(heads):
        if scales and i <= k_index:
            parts = _norm(parts, scales[i == k_index], eps)
        if i <= k_index:
            parts = _turn(parts, *turn)
        if i < k_index:
            out = q_ref.at[window, head * k_index + i]
        else:
            out = row_ref.at[window, head, i - k_index]
        for part, value in zip(parts_of_row, parts, strict=True):
            out[:, part] = value


def _norm(parts, scale, eps):
    """Returns the halves of rows over their root mean square, times scale."""
    wide = [part.astype(jnp.float32) for part in parts]
    shape = wide[0].shape
    power = jnp.sum(wide[0] * wide[0] + wide[1] * wide[1], axis=1) / (2 * shape[1])
    factor = lax.broadcast_in_dim(lax.rsqrt(power + eps), shape, [0])
    wide = [
        x * factor * lax.broadcast_in_dim(s.astype(jnp.float32), shape, [1])
        for x, s in zip(wide, scale, strict=True)
    ]
    return [x.astype(part.dtype) for x, part in zip(wide, parts, strict=True)]


def _turn(parts, cos, sin):
    """Returns the halves of rows turned by their angles."""
    first, second = (part.astype(jnp.float32) for part in parts)
    turned = first * cos - second * sin, second * cos + first * sin
    return [part.astype(parts[0].dtype) for part in turned]
