"""Paged attention for Hopper GPUs, in Pallas Mosaic GPU.

Two launches: `gpu_attend` reads the pages, `gpu_finish` merges what was cut and
normalises the mass. docs/kernels.md draws the layout.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.api import AttentionOutput, LaneGroup
from pallas_kernels.paged_attention.gpu_attend import attend
from pallas_kernels.paged_attention.gpu_finish import finish
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    TILE,
    AttentionConfig,
    Spec,
    group_tiles,
    pack_queries,
    segment_ends,
)

_LOG2E = math.log2(math.e)


def paged_attention_gpu(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    q_lengths: jax.Array,
    *,
    groups: tuple[LaneGroup, ...],
    scale: float | None = None,
    mass_group: int | None = None,
    mass_rows: str = "all",
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: AttentionConfig | None = None,
) -> AttentionOutput:
    """Returns what `api.paged_attention` documents, computed on a Hopper GPU."""
    _, num_heads, page_size, row_size = kv_pages.shape
    group_size, head_size = q.shape[1] // num_heads, row_size // 2
    _check_supported(q.dtype, head_size, group_size, page_size)
    row_tiles = 1 if max(queries for _, queries in groups) * group_size <= TILE else 2
    spec = Spec(
        groups=group_tiles(tuple(map(tuple, groups)), group_size, row_tiles),
        row_tiles=row_tiles,
        num_heads=num_heads,
        group_size=group_size,
        head_size=head_size,
        page_size=page_size,
        table_width=page_table.shape[1],
        scale=(head_size**-0.5 if scale is None else scale) * _LOG2E,
        mass_group=mass_group,
        mass_rows=mass_rows,
        config=config or choose_config(head_size, row_tiles),
        dtype=jnp.dtype(q.dtype),
        interpret=plgpu.InterpretGPUParams()
        if interpret is True
        else interpret or None,
    )
    lengths = (segment_ends(kv_lengths, q_lengths, spec), kv_lengths, q_lengths)
    packed = pack_queries(q, q_lengths, spec)
    computed = attend(spec, *lengths, page_table, packed, kv_pages)
    out, *mass = finish(spec, *lengths, *computed)
    if not mass:
        return AttentionOutput(out, None)
    num_keys = page_table.shape[1] * page_size
    return AttentionOutput(out, mass[0].reshape(*mass[0].shape[:2], -1)[..., :num_keys])


# Measured on one H100, see docs/kernels.md. Keys: head size, row tiles.
TUNED = {
    (128, 1): AttentionConfig(num_stages=2),
    (128, 2): AttentionConfig(num_stages=2),
    (64, 1): AttentionConfig(num_stages=3, copy_rows=64),
    (64, 2): AttentionConfig(num_stages=4, share_buffer=True),
}


def choose_config(head_size: int, row_tiles: int) -> AttentionConfig:
    """Returns the tuned configuration, or a small one for untimed head sizes."""
    default = AttentionConfig(num_ctas=132, num_stages=2, share_buffer=True)
    return TUNED.get((head_size, row_tiles), default)


def _check_supported(dtype, head_size: int, group_size: int, page_size: int) -> None:
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(
            f"q and kv_pages are {jnp.dtype(dtype).name}: the GPU kernel computes "
            "bfloat16 only (its matrix unit cannot read float32 values from pages); "
            "cast them, or pass impl='reference'"
        )
    if head_size not in (64, 128):
        raise NotImplementedError(
            f"the head size is {head_size}: the GPU kernel serves 64 and 128; "
            "impl='reference' serves every size"
        )
    if page_size % 8 or (page_size % BLOCK and BLOCK % page_size):
        raise NotImplementedError(
            f"page_size is {page_size}: the GPU kernel serves 8, 16, 32 and multiples "
            f"of {BLOCK}"
        )
    if group_size > TILE:
        raise NotImplementedError(
            f"{group_size} query heads per KV head: the GPU kernel serves up to {TILE}"
        )
