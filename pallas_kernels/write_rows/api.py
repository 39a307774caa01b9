"""Public entry of the store of new KV rows: checks, choice of implementation."""

import jax.numpy as jnp

from pallas_kernels.array_types import KvPages, NewRows, Places
from pallas_kernels.common import (
    check_dtype,
    check_pool,
    check_shape,
    load_implementation,
)


def write_rows(
    kv_pages: KvPages,
    rows: NewRows,
    pages: Places,
    offsets: Places,
    *,
    copies_from: int = 0,
    impl: str | None = None,
) -> KvPages:
    """Returns the pool with new rows stored, some of them in two places.

    Row `i` of head `h` goes to `kv_pages[pages[i, h], h, offsets[i, h]]`, bit for bit.
    Places past the `n` rows take rows once more, those from `copies_from` on: place
    `n + j` gets row `copies_from + j`. Places with a page outside `[0, P)`
    are dropped; the others differ from each other.

        rows    draft 0 .. 63 | verified 0 .. 71 |            copies_from = 64
        places  own place     | own place        | again in a draft cache 0 .. 71

    The pool is written in place when the jitted caller donates it and does not read
    the old value afterwards.

    Args:
      kv_pages: [P, H, ps, 2*D], bfloat16 or float32.
      rows: [n, H, 2*D], K then V, dtype of kv_pages.
      pages: int32 [m, H], or [m, 1] for all heads; m >= n.
      offsets: int32, like pages: row inside the page, below ps.
      copies_from: first row that is stored a second time; m - n rows are.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    check_pool(kv_pages)
    num_heads, row_size = kv_pages.shape[1], kv_pages.shape[3]
    check_shape("rows", rows, (None, num_heads, row_size), "[n, H, 2*D] of kv_pages")
    check_dtype("rows", rows, kv_pages.dtype)
    num_lists = 1 if pages.shape[1:] == (1,) else num_heads
    meaning = "[m, H], or [m, 1] for all heads"
    check_shape("pages", pages, (None, num_lists), meaning)
    check_shape("offsets", offsets, tuple(pages.shape), "like pages")
    check_dtype("pages", pages, jnp.int32)
    check_dtype("offsets", offsets, jnp.int32)
    num_rows, num_copies = rows.shape[0], pages.shape[0] - rows.shape[0]
    if num_rows == 0 or num_copies < 0:
        raise ValueError(
            f"there are {num_rows} rows, but pages has {pages.shape[0]} places: "
            "give at least one row, and a place for each"
        )
    if not 0 <= copies_from <= num_rows - num_copies:
        raise ValueError(
            f"copies_from is {copies_from}, but {num_copies} of {num_rows} rows are "
            f"stored again; it must lie in 0..{num_rows - num_copies}"
        )
    function = load_implementation("pallas_kernels.write_rows", "write_rows", impl)
    return function(kv_pages, rows, pages, offsets, copies_from=copies_from)
