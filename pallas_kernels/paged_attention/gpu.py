"""Paged attention for Hopper GPUs, in Pallas Mosaic GPU.

Two launches: `gpu_attend` reads the pages, `gpu_finish` merges what was cut and
normalises the mass. Prompt chunks, lane groups of many queries at the end, have a
launch of their own, `gpu_prefill`. docs/kernels.md draws the layout.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import (
    KvPagesOfD,
    MassBuffer,
    PageTable,
    PerHead,
    PerLane,
    Queries,
)
from pallas_kernels.gpu_layouts import interpreter_of
from pallas_kernels.paged_attention.api import AttentionOutput, LaneGroup
from pallas_kernels.paged_attention.gpu_attend import attend
from pallas_kernels.paged_attention.gpu_chunk import ChunkSpec, PrefillConfig
from pallas_kernels.paged_attention.gpu_finish import finish
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    MASS_BLOCKS,
    TILE,
    AttentionConfig,
    Spec,
    group_tiles,
)
from pallas_kernels.paged_attention.gpu_plan import launch_plan
from pallas_kernels.paged_attention.gpu_prefill import attend_chunks

_LOG2E = math.log2(math.e)
_INTERPRETED_CTAS = 3

# Measured on one H100, see docs/kernels.md. Keys: head size.
TUNED = {
    128: AttentionConfig(num_stages=2, copy_rows=32),
    64: AttentionConfig(num_stages=3, copy_rows=32),
}
# Compiles without spills; the only choice timed, see docs/kernels.md.
TUNED_PREFILL = {128: PrefillConfig(), 64: PrefillConfig()}


# Compiled once for all layers of a model that call it alike.
@functools.partial(
    jax.jit,
    static_argnames=(
        "groups",
        "scale",
        "mass_group",
        "mass_rows",
        "interpret",
        "config",
        "prefill",
    ),
)
def paged_attention_gpu(
    q: Queries,
    kv_pages: KvPagesOfD,
    page_table: PageTable,
    kv_lengths: PerHead,
    q_lengths: PerLane,
    mass_buffer: MassBuffer | None = None,
    mass_place: jax.Array | int = 0,
    *,
    groups: tuple[LaneGroup, ...],
    scale: float | None = None,
    mass_group: int | None = None,
    mass_rows: str = "all",
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: AttentionConfig | None = None,
    prefill: PrefillConfig | None = None,
) -> AttentionOutput:
    """Returns what `api.paged_attention` documents, computed on a Hopper GPU.

    `mass_place` is traced: one compiled kernel serves all places of a buffer.
    `interpret` may be the parameters of the interpreter; `config` and `prefill`
    override the tuned entries.
    """
    _, num_heads, page_size, row_size = kv_pages.shape
    group_size, head_size = q.shape[1] // num_heads, row_size // 2
    check_supported(q.dtype, head_size, group_size, page_size)
    interpreter = interpreter_of(interpret)
    if config is None:
        config = TUNED[head_size]
        if interpreter:  # which runs CTAs one behind the other
            config = dataclasses.replace(config, num_ctas=_INTERPRETED_CTAS)
    if prefill is None:
        prefill = TUNED_PREFILL[head_size]
        if interpreter:  # which needs a thread of the CPU client for each warpgroup
            prefill = dataclasses.replace(prefill, num_consumers=1, takes_turns=False)
    mixed, chunks = _split_groups(
        tuple(groups),
        mass_group,
        lambda group: prefill.serves(group, num_heads, group_size),
    )
    shapes = dict(
        num_heads=num_heads,
        group_size=group_size,
        head_size=head_size,
        page_size=page_size,
        scale=(head_size**-0.5 if scale is None else scale) * _LOG2E,
        dtype=jnp.dtype(q.dtype),
        interpret=interpreter,
    )
    args = (kv_lengths, q_lengths, page_table, q, kv_pages)
    _check_pieces(mixed, prefill)
    if mixed:
        spec = Spec(
            groups=group_tiles(mixed, group_size),
            num_out_tokens=q.shape[0],
            table_width=page_table.shape[1],
            mass_group=mass_group,
            mass_rows=mass_rows,
            config=config,
            **shapes,
        )
        out, mass = _attend_mixed(spec, *args, mass_buffer, mass_place)
    else:
        out, mass = lax.empty(q.shape, q.dtype), None
    if chunks:
        out = _attend_chunks(out, groups, len(mixed), prefill, shapes, *args)
    return AttentionOutput(out, mass)


def _split_groups(groups, mass_group: int | None, is_chunk):
    """Returns the groups of the mixed launch, and the prompt chunks behind them."""
    end = len(groups)
    while end and is_chunk(groups[end - 1]) and end - 1 != mass_group:
        end -= 1
    return groups[:end], groups[end:]


def _attend_mixed(
    spec: Spec,
    kv_lengths,
    q_lengths,
    page_table,
    q,
    kv_pages,
    mass_buffer=None,
    mass_place=0,
):
    """Returns output and mass of the first groups, by the mixed launch."""
    lanes = slice(spec.num_lanes)
    plan = launch_plan(kv_lengths[lanes], q_lengths[lanes], spec)
    lengths = (plan, kv_lengths, q_lengths)
    computed = attend(spec, *lengths, page_table, q, kv_pages)
    if spec.mass_group is None:
        return finish(spec, *lengths, *computed), None
    num_keys, padded = page_table.shape[1] * spec.page_size, spec.mass_blocks * BLOCK
    num_lanes = spec.groups[spec.mass_group].num_lanes
    shape = (num_lanes, spec.num_heads, spec.mass_blocks, BLOCK)
    if mass_buffer is None:
        buffer = lax.empty((1, *shape), jnp.float32)
    elif num_keys == padded:
        buffer = mass_buffer.reshape(-1, *shape)
    else:
        raise NotImplementedError(
            f"mass_buffer has {num_keys} keys: the GPU kernel writes multiples of "
            f"{MASS_BLOCKS * BLOCK}"
        )
    mass_ref = jax.new_ref(buffer)
    place = jnp.reshape(mass_place, (1,)).astype(jnp.int32)
    out = finish(spec, *lengths, *computed, place, mass_ref)
    mass = jax.freeze(mass_ref).reshape(-1, *shape[:2], padded)
    if mass_buffer is None:
        mass = mass[0, ..., :num_keys]
    return out, mass


def _attend_chunks(out, groups, first, config: PrefillConfig, shapes, *args):
    """Returns `out` with the rows of the groups from `first` on written in place."""
    if shapes["scale"] <= 0:
        raise NotImplementedError(
            f"scale is {shapes['scale'] / _LOG2E}: the GPU kernel of prompt chunks "
            "takes positive ones; negate q, or pass impl='reference'"
        )
    ref = jax.new_ref(out)
    lane = token = 0
    for index, (num_lanes, num_queries, _) in enumerate(groups):
        if index >= first:
            spec = ChunkSpec(
                first_lane=lane,
                first_token=token,
                num_lanes=num_lanes,
                num_queries=num_queries,
                config=config,
                **shapes,
            )
            attend_chunks(spec, *args, ref)
        lane, token = lane + num_lanes, token + num_lanes * num_queries
    return jax.freeze(ref)


def _check_pieces(groups, prefill: PrefillConfig) -> None:
    """Raises unless pieces can be what they promise in the mixed launch.

    Groups that are cut anywhere come first; chunks have their own launch or none.
    """
    for group in groups:
        if group.piece is not None and group.num_queries >= prefill.min_queries:
            raise NotImplementedError(
                f"groups is {groups}: the GPU kernel takes a group with a piece and "
                f"{prefill.min_queries} queries or more behind all smaller ones, and "
                "without mass; put it last, or leave its piece out"
            )
    has_pieces = [group.piece is not None for group in groups]
    if has_pieces != sorted(has_pieces):
        raise NotImplementedError(
            f"groups is {groups}: the GPU kernel takes groups with a piece behind the "
            "others; put those without one first, or give them the same piece"
        )


def check_supported(dtype, head_size: int, group_size: int, page_size: int) -> None:
    """NotImplementedError, naming the value, if the kernel cannot serve these."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(
            f"q and kv_pages are {jnp.dtype(dtype).name}: the GPU kernel computes "
            "bfloat16 only (its matrix unit cannot read float32 values from pages); "
            "cast them, or pass impl='reference'"
        )
    if head_size not in TUNED:
        raise NotImplementedError(
            f"the head size is {head_size}: the GPU kernel serves 64 and 128; "
            "impl='reference' serves every size"
        )
    if page_size % 8 or (page_size % BLOCK and BLOCK % page_size):
        raise NotImplementedError(
            f"page_size is {page_size}: the GPU kernel serves 8, 16, 32 and multiples "
            f"of {BLOCK}"
        )
    if 2 * group_size > TILE:  # the first and the last query share a tile
        raise NotImplementedError(
            f"{group_size} query heads per KV head: the GPU kernel serves up to "
            f"{TILE // 2}"
        )
