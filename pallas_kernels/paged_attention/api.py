"""Public entry of paged attention: types, argument checks, choice of implementation."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.array_types import (
    KvPages,
    KvPagesOfD,
    Mass,
    MassBuffer,
    PageTable,
    PerHead,
    PerLane,
    Queries,
)
from pallas_kernels.common import (
    check_dtype,
    check_pool,
    check_shape,
    default_impl,
    is_for_gpu,
    load_implementation,
)

MASS_ROWS = ("all", "edges")
PIECE_UNIT = 64  # keys
PIECE = 1024  # keys of a piece, chosen by measurement: docs/decisions.md


class LaneGroup(NamedTuple):
    """Lanes that carry the same number of query rows. Static."""

    num_lanes: int
    num_queries: int
    piece: int | None = None  # keys summed as one, see `paged_attention`


class AttentionOutput(NamedTuple):
    """Result of `paged_attention`."""

    out: Queries
    # Of the lanes of mass_group, or the buffer that has a place for it; None without
    mass: Mass | MassBuffer | None


def check_served(
    *, dtype: DTypeLike, head_size: int, group_size: int, page_size: int, impl: str
) -> None:
    """NotImplementedError if an implementation cannot serve a model, before any call.

    What it says names the value. Implementations that serve every size say nothing.
    """
    if is_for_gpu(impl):
        from pallas_kernels.paged_attention.gpu import check_supported

        check_supported(dtype, head_size, group_size, page_size)


def paged_attention(
    q: Queries,
    kv_pages: KvPagesOfD,
    page_table: PageTable,
    kv_lengths: PerHead,
    q_lengths: PerLane,
    *,
    groups: tuple[LaneGroup, ...],
    scale: float | None = None,
    mass_group: int | None = None,
    mass_rows: str = "all",
    mass_buffer: MassBuffer | None = None,
    mass_place: int = 0,
    impl: str | None = None,
) -> AttentionOutput:
    """Returns causal attention of every lane over its own pages, and its mass.

    Query `i < q_length` of a lane sits at key index `kv_length - q_length + i` and
    sees the keys up to and including that index. Key `j` of KV head `h` is the row
    `kv_pages[page_table[lane, j // ps], h, j % ps]`, K in its first half and V in
    its second. Query head `n` reads KV head `n // G`. Softmax and sums are float32.
    Padding rows, and rows that see no key, are zero. Rows of the pool at or past a
    length may hold NaN; table columns past a length may hold any number.

        kv_length 7, q_length 3      key  0 1 2 3 4 5 6
                              query 0     x x x x x . .
                              query 1     x x x x x x .
                              query 2     x x x x x x x
        candidates of the mass:           c c c c

    Of a group with a `piece`, the keys are cut at multiples of `piece` keys, every
    piece is summed by itself, and pieces are added in the order of the keys. On a GPU
    the bits of such a row then depend on its query, its keys and its position alone,
    and those of the mass on the rows of the lane: not on other lanes or groups, on the
    place or the number of the lane's rows, on page size, tables or the mass. Groups of
    up to 64 queries agree with each other, and so do all larger ones, which are never
    cut. `piece` is the same in all groups that have one. Other implementations compute
    the same as without: there bits may depend on shapes.

    The mass (PillarAttn, arXiv 2512.01278) of a candidate `j < kv_length - q_length`
    is its softmax probability averaged over the used query rows and the G query
    heads of its KV head; it is zero in every other column.

    Args:
      q: [T, N, D], T = sum of num_lanes * num_queries; lane-major inside a group,
        groups one behind the other.
      kv_pages: [P, H, ps, 2*D], bfloat16 or float32, same dtype as q.
      page_table: int32 [lanes, W], lanes in the order of the groups.
      kv_lengths: int32 [lanes, H], keys the last valid query sees, its own
        included; at most W * ps. 0 marks an idle lane.
      q_lengths: int32 [lanes], valid queries, at most the group's num_queries.
      groups: static layout of the lanes.
      scale: factor on the logits; None means D ** -0.5.
      mass_group: index into `groups` of the lanes whose mass is returned.
      mass_rows: "all" valid query rows, or "edges": the first and the last valid
        one (a single row counts once).
      mass_buffer: float32 [n, lanes of mass_group, H, W * page_size], masses of
        several calls. The returned mass is the buffer with this call's at
        `mass_place`; it is written in place when the jitted caller does not read the
        old value afterwards.
      mass_place: 0..n-1.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    groups = tuple(LaneGroup(*group) for group in groups)
    _check_groups(groups, mass_group, mass_rows)
    if mass_buffer is not None:
        _check_buffer(mass_buffer, mass_place, groups, mass_group, kv_pages, page_table)
    lanes = sum(group.num_lanes for group in groups)
    tokens = sum(group.num_lanes * group.num_queries for group in groups)
    check_pool(kv_pages)
    num_heads, head_size = kv_pages.shape[1], kv_pages.shape[3] // 2
    check_shape("q", q, (tokens, None, head_size), "[T, N, D] of groups and kv_pages")
    check_dtype("q", q, kv_pages.dtype)
    if q.shape[1] % num_heads or q.shape[1] == 0:
        raise ValueError(
            f"q has {q.shape[1]} heads and kv_pages {num_heads}: the first must be "
            "a multiple of the second"
        )
    check_shape("page_table", page_table, (lanes, None), "[lanes, W]")
    check_shape("kv_lengths", kv_lengths, (lanes, num_heads), "[lanes, H]")
    check_shape("q_lengths", q_lengths, (lanes,), "[lanes]")
    for name, array in (
        ("page_table", page_table),
        ("kv_lengths", kv_lengths),
        ("q_lengths", q_lengths),
    ):
        check_dtype(name, array, jnp.int32)
    if page_table.shape[1] == 0:
        raise ValueError("page_table has 0 columns, expected at least 1 page per lane")
    impl = default_impl() if impl is None else impl
    function = load_implementation(
        "pallas_kernels.paged_attention", "paged_attention", impl
    )
    options = dict(
        groups=groups,
        scale=head_size**-0.5 if scale is None else float(scale),
        mass_group=mass_group,
        mass_rows=mass_rows,
    )
    args = q, kv_pages, page_table, kv_lengths, q_lengths
    if mass_buffer is None:
        return function(*args, **options)
    if impl.startswith("gpu"):
        return function(*args, mass_buffer, np.int32(mass_place), **options)
    out, mass = function(*args, **options)
    return AttentionOutput(out, mass_buffer.at[mass_place].set(mass))


def _check_groups(
    groups: tuple[LaneGroup, ...], mass_group: int | None, mass_rows: str
) -> None:
    if not groups or any(min(group[:2]) < 1 for group in groups):
        raise ValueError(
            f"groups is {groups}: give at least one group, each with num_lanes >= 1 "
            "and num_queries >= 1"
        )
    pieces = {group.piece for group in groups} - {None}
    if len(pieces) > 1 or any(piece < 1 or piece % PIECE_UNIT for piece in pieces):
        raise ValueError(
            f"groups is {groups}: give all pieces the same number of keys, a multiple "
            f"of {PIECE_UNIT}, or None"
        )
    if mass_group is not None and not 0 <= mass_group < len(groups):
        raise ValueError(
            f"mass_group is {mass_group} but groups has {len(groups)} entries; "
            f"use 0..{len(groups) - 1} or None"
        )
    if mass_rows not in MASS_ROWS:
        raise ValueError(f"mass_rows is {mass_rows!r}; choose one of {MASS_ROWS}")


def _check_buffer(
    mass_buffer: MassBuffer,
    mass_place: int,
    groups: tuple[LaneGroup, ...],
    mass_group: int | None,
    kv_pages: KvPages,
    page_table: PageTable,
) -> None:
    if mass_group is None:
        raise ValueError("mass_buffer is given, mass_group is None: name the group")
    num_keys = page_table.shape[-1] * kv_pages.shape[2]
    shape = (None, groups[mass_group].num_lanes, kv_pages.shape[1], num_keys)
    check_shape("mass_buffer", mass_buffer, shape, "[n, lanes, H, W * page_size]")
    check_dtype("mass_buffer", mass_buffer, jnp.float32)
    if not 0 <= mass_place < mass_buffer.shape[0]:
        raise ValueError(
            f"mass_place is {mass_place}, mass_buffer has places "
            f"0..{mass_buffer.shape[0] - 1}"
        )
