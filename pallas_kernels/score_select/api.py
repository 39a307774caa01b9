"""Public entry of scoring by an index of keys and selecting: checks, implementation."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.array_types import KeyCodes, PageTable, PerLane, Queries
from pallas_kernels.common import (
    check_dtype,
    check_shape,
    is_for_gpu,
    load_implementation,
)
from pallas_kernels.score_select.codes import CodeLayout
from pallas_kernels.select_tokens.api import SelectedTokens


def check_served(
    *,
    dtype: DTypeLike,
    group_size: int,
    layout: CodeLayout,
    num_keys: int,
    impl: str,
) -> None:
    """NotImplementedError if an implementation cannot serve these, before any call.

    `num_keys` is the room of a table. What it says names the value.
    """
    if is_for_gpu(impl):
        from pallas_kernels.score_select.gpu import check_supported

        check_supported(dtype, group_size, layout, num_keys)


def score_select(
    q: Queries,
    codes: KeyCodes,
    page_table: PageTable,
    lengths: PerLane,
    budgets: PerLane,
    *,
    layout: CodeLayout,
    cap: int,
    num_recent: int = 0,
    scale: float | None = None,
    impl: str | None = None,
) -> SelectedTokens:
    """Returns the positions that one query of each lane attends to most, by an index.

    The estimated attention of a key is the softmax of logits over 16 channels of its
    code (SparQ, arXiv 2312.04985, reads few channels), the mean over the query heads of
    a KV head. Channels are those of the largest sum of |q| over these heads, times the
    step of the channel's codes, the mean over at most 16 groups of keys spread over the
    text; equal ones by the lowest channel.

    `count = min(budget, length)` positions out of `[0, length)` are chosen: first the
    `min(num_recent, count)` highest positions, then the largest scores among the
    others. Scores whose float32 agree in sign, exponent and the 6 highest bits of the
    mantissa are equal, and so are all below 2**-32; equal scores go by the lowest
    position. The result is ascending. Indices past a count mean nothing.

    Implementations may differ where scores are within a rounding of two ranks, and
    where channels weigh the same.

    Args:
      q: [T, N, D], bfloat16 or float32; the query of lane i is row i, T >= lanes.
      codes: int32 [P, H, groups, row], see `codes`; of a page and head, `encode` of
        each group of its keys up to the length.
      page_table: int32 [lanes, W]; columns past a length may hold any number.
      lengths: int32 [lanes], keys that have codes, 0..W * page size.
      budgets: int32 [lanes], number wanted, 0..cap.
      layout: sizes of the codes.
      cap: static size of the index lists.
      num_recent: number of last keys that are always chosen.
      scale: factor on the logits; None means D ** -0.5.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    check_shape("page_table", page_table, (None, None), "[lanes, W]")
    lanes = page_table.shape[0]
    meaning = "[P, H, groups of a page, words of a group] of the layout"
    check_shape("codes", codes, (None, None, *layout.shape(0, 0)[2:]), meaning)
    check_shape("q", q, (None, None, layout.head_size), "[T, N, D] of the layout")
    check_shape("lengths", lengths, (lanes,), "[lanes]")
    check_shape("budgets", budgets, (lanes,), "[lanes]")
    check_dtype("q", q, jnp.bfloat16, jnp.float32)
    for name, array in (
        ("codes", codes),
        ("page_table", page_table),
        ("lengths", lengths),
        ("budgets", budgets),
    ):
        check_dtype(name, array, jnp.int32)
        if 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}: no axis may be empty")
    if q.shape[0] < lanes:
        raise ValueError(
            f"q has {q.shape[0]} rows and page_table {lanes} lanes: give each a query"
        )
    if q.shape[1] % codes.shape[1] or q.shape[1] == 0:
        raise ValueError(
            f"q has {q.shape[1]} heads and codes {codes.shape[1]}: the first must be "
            "a multiple of the second"
        )
    if cap < 1:
        raise ValueError(f"cap is {cap}, expected at least 1 index per list")
    if num_recent < 0:
        raise ValueError(f"num_recent is {num_recent}, expected 0 or more")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}, expected more than 0: negate q")
    function = load_implementation("pallas_kernels.score_select", "score_select", impl)
    return function(
        q,
        codes,
        page_table,
        lengths,
        budgets,
        layout=layout,
        cap=int(cap),
        num_recent=int(num_recent),
        scale=layout.head_size**-0.5 if scale is None else float(scale),
    )
