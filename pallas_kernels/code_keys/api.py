"""Public entry of the coding of keys: argument checks, choice of implementation."""

import jax.numpy as jnp

from pallas_kernels.array_types import KeyCodes, KvPages, PageTable, PerLane
from pallas_kernels.common import (
    check_dtype,
    check_pool,
    check_shape,
    load_implementation,
)
from pallas_kernels.score_select.codes import CodeLayout


def code_keys(
    codes: KeyCodes,
    kv_pages: KvPages,
    page_table: PageTable,
    starts: PerLane,
    ends: PerLane,
    *,
    layout: CodeLayout,
    most_keys: int,
    impl: str | None = None,
) -> KeyCodes:
    """Returns the codes with those of some positions of every lane made anew.

    Of a lane, each group of keys that has a position in `[starts, ends)` is coded from
    its keys below `ends`, as `score_select.codes.encode` says; the last group of a text
    is coded again and again until it is full. Groups on a page outside `[0, P)` are
    dropped. A page in two tables must be coded alike.

        group        0                1                2
        positions    0 .. 63 | 64 .. 127 | 128 .. 191        starts 60, ends 70
        coded from   0 .. 63   64 .. 69

    The codes are written in place when the jitted caller donates them and does not read
    the old value afterwards. Implementations may differ by a level where a key lies
    half way between two.

    Args:
      codes: int32 [P, H, groups, row].
      kv_pages: [P, H, ps, 2*D], bfloat16 or float32; rows at or past `ends` may be NaN.
      page_table: int32 [lanes, W].
      starts: int32 [lanes].
      ends: int32 [lanes], at most W * ps; a lane with `ends <= starts` is idle.
      layout: sizes of the codes.
      most_keys: static bound of `ends - starts`.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    check_pool(kv_pages)
    num_pages, num_heads, page_size, row_size = kv_pages.shape
    if (page_size, row_size) != (layout.page_size, 2 * layout.head_size):
        raise ValueError(
            f"kv_pages has shape {tuple(kv_pages.shape)}, the layout is of pages of "
            f"{layout.page_size} keys of size {layout.head_size}"
        )
    meaning = "[P, H, groups of a page, words of a group] of kv_pages and the layout"
    check_shape("codes", codes, layout.shape(num_pages, num_heads), meaning)
    check_shape("page_table", page_table, (None, None), "[lanes, W]")
    lanes = page_table.shape[0]
    check_shape("starts", starts, (lanes,), "[lanes]")
    check_shape("ends", ends, (lanes,), "[lanes]")
    for name, array in (
        ("codes", codes),
        ("page_table", page_table),
        ("starts", starts),
        ("ends", ends),
    ):
        check_dtype(name, array, jnp.int32)
        if 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}: no axis may be empty")
    if most_keys < 1:
        raise ValueError(f"most_keys is {most_keys}, expected at least 1")
    function = load_implementation("pallas_kernels.code_keys", "code_keys", impl)
    # The first key may be the last one of its group.
    most_groups = 1 + -(-(most_keys - 1) // layout.group)
    return function(
        codes, kv_pages, page_table, starts, ends, layout=layout, most=most_groups
    )
