"""Gather of KV rows for TPU (Pallas Mosaic TPU).

Work is cut into units: one KV head of one target page. Each selected row comes by its
own asynchronous copy into a buffer; the finished page leaves by one copy, while the
rows of the next unit are on their way.

TPU memory holds two bfloat16 rows in one row of 32-bit words and cannot copy half a
word, so the kernel fetches the pair that holds the wanted row, and keeps the right
half of every word.

A page that receives fewer rows than it has is read first and keeps the others.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.array_types import Counts, Indices, KvPages, PageTable, TargetTable

_LANES = 128
_SUBLANES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes that change speed and memory, never results. SMEM has 1 MiB in all."""

    table_bytes: int = 256 << 10  # both page tables of one call
    index_bytes: int = 256 << 10  # index lists of a grid step, twice
    unroll: int = 8  # copies issued per loop turn


DEFAULT_TUNING = Tuning()


def gather_kv_tpu(
    kv_pages: KvPages,
    source_table: PageTable,
    target_table: TargetTable,
    indices: Indices,
    counts: Counts,
    *,
    interpret: bool | pltpu.InterpretParams = False,
    tuning: Tuning = DEFAULT_TUNING,
) -> KvPages:
    """Returns what `api.gather_kv` documents; source pages must be in the pool.

    Raises:
      NotImplementedError: 2*D is not a multiple of 128, the page size is not a
        multiple of 8 (float32) or 16 (bfloat16), or one head's index list does not
        fit in SMEM.
    """
    sizes = _sizes(kv_pages, source_table, target_table, indices, tuning)
    lanes = source_table.shape[0]
    table_width = source_table.shape[1] + target_table.shape[1]
    most = max(1, tuning.table_bytes // (4 * table_width))
    for first in range(0, lanes, most):  # the page tables must fit in SMEM
        part = slice(first, first + most)
        kv_pages = _gather_lanes(
            kv_pages,
            source_table[part],
            target_table[part],
            indices[part],
            counts[part],
            sizes,
            interpret,
        )
    return kv_pages


class _Sizes(NamedTuple):
    """Static sizes of the kernel."""

    num_pages: int
    num_heads: int
    page_size: int
    row_size: int
    source_width: int  # pages
    target_width: int  # pages
    used_width: int  # target pages that a full index list fills
    shared: int  # KV heads that one list serves: 1, or all of them
    lists: int  # index lists of one grid step
    rows_per_word: int  # 2 for bfloat16, 1 for float32
    unroll: int

    @property
    def num_lists(self) -> int:
        """Index lists of a lane."""
        return self.num_heads // self.shared


def _sizes(kv_pages, source_table, target_table, indices, tuning) -> _Sizes:
    num_pages, num_heads, page_size, row_size = kv_pages.shape
    rows_per_word = 4 // kv_pages.dtype.itemsize
    least = _SUBLANES * rows_per_word
    if row_size % _LANES or page_size % least:
        raise NotImplementedError(
            f"kv_pages has pages of {page_size} rows of {row_size} {kv_pages.dtype}; "
            f"the TPU kernel needs a multiple of {least} rows of a multiple of "
            f"{_LANES} elements (2 * D); use impl='reference' or larger pages"
        )
    num_lists, cap = indices.shape[1:]
    used_width = min(target_table.shape[1], -(-cap // page_size))
    list_bytes = 2 * 4 * used_width * page_size
    if list_bytes > tuning.index_bytes:
        raise NotImplementedError(
            f"indices has lists of {cap} rows: one list needs {list_bytes} bytes of "
            f"SMEM, the TPU kernel has {tuning.index_bytes}; gather in several calls"
        )
    most = tuning.index_bytes // list_bytes
    return _Sizes(
        num_pages=num_pages,
        num_heads=num_heads,
        page_size=page_size,
        row_size=row_size,
        source_width=source_table.shape[1],
        target_width=target_table.shape[1],
        used_width=used_width,
        shared=num_heads // num_lists,
        lists=max(
            n for n in range(1, num_lists + 1) if num_lists % n == 0 and n <= most
        ),
        rows_per_word=rows_per_word,
        unroll=tuning.unroll,
    )


def _gather_lanes(
    kv_pages, source_table, target_table, indices, counts, s: _Sizes, interpret
):
    lanes, parts = source_table.shape[0], s.num_lists // s.lists
    rows = s.used_width * s.page_size
    padding = max(0, rows - indices.shape[2])
    indices = jnp.pad(indices[:, :, :rows], ((0, 0), (0, 0), (0, padding)))
    # The low or the high half of a word, by target page: [lanes, lists, pages, rows].
    half = (indices % s.rows_per_word).reshape(lanes, s.num_lists, -1, s.page_size)
    # What one list serves lies side by side in the pool: a block of its heads' rows.
    block = (s.shared, s.page_size, s.row_size)
    blocks = kv_pages.reshape(-1, *block)
    words = (2, s.shared, s.page_size * s.rows_per_word, s.row_size)
    blocks = pl.pallas_call(
        functools.partial(_kernel, s=s, unroll=1 if interpret else s.unroll),
        out_shape=jax.ShapeDtypeStruct(blocks.shape, blocks.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(lanes, parts),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, s.lists * rows),
                    lambda i, j, *_: (i * parts + j, 0, 0),
                    memory_space=pltpu.SMEM,
                ),
                pl.BlockSpec(
                    (1, s.lists, s.used_width, s.page_size),
                    lambda i, j, *_: (i, j, 0, 0),
                ),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM(words, kv_pages.dtype),
                pltpu.VMEM((2, *block), kv_pages.dtype),
                pltpu.SemaphoreType.DMA((3, 2)),
            ],
        ),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            # A check costs more than issuing the copy of a row; the row indices are
            # in range by contract.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="gather_kv",
    )(
        (source_table * s.num_lists).reshape(-1),
        target_table.reshape(-1),
        counts.reshape(-1),
        indices.reshape(lanes * parts, 1, -1),
        half,
        blocks,
    )
    return blocks.reshape(kv_pages.shape)


class _Unit(NamedTuple):
    """The part of one target page that one list fills."""

    index: jax.Array  # within the grid step
    slot: jax.Array  # buffer
    num_rows: jax.Array  # rows to copy; 0 where there is no target page
    target: jax.Array  # block of the pool
    number: jax.Array  # of the list, within the lane


def _kernel(
    source_ref,  # int32 [lanes * W], first block of a page, SMEM
    target_ref,  # int32 [lanes * Wd], SMEM
    counts_ref,  # int32 [lanes * H / shared], SMEM
    indices_ref,  # int32 [1, 1, lists * pages * page_size], SMEM
    half_ref,  # int32 [1, lists, pages, page_size]
    pool_ref,  # [P * H / shared, shared, page_size, 2D], HBM
    out_ref,  # the same memory as pool_ref
    words_ref,  # [2, shared, page_size * rows_per_word, 2D]
    page_ref,  # [2, shared, page_size, 2D]
    sems,  # [3, 2]: rows in, old page in, page out
    *,
    s: _Sizes,
    unroll,
):
    lane, part = pl.program_id(0), pl.program_id(1)
    num_units = s.lists * s.used_width

    def unit(index):
        number = part * s.lists + index // s.used_width
        column = index % s.used_width
        page = target_ref[lane * s.target_width + column]
        count = counts_ref[lane * s.num_lists + number] - column * s.page_size
        is_page = (page >= 0) & (page < s.num_pages)
        return _Unit(
            index=index,
            slot=index % 2,
            num_rows=jnp.where(is_page, jnp.clip(count, 0, s.page_size), 0),
            target=page * s.num_lists + number,
            number=number,
        )

    def word(index):  # the rows that share a row of words
        start = pl.multiple_of(index * s.rows_per_word, s.rows_per_word)
        return pl.ds(start, s.rows_per_word)

    def start_rows(u):
        first_index = u.index * s.page_size
        first_column = lane * s.source_width

        def start_row(n, _):
            column, row = _divide(indices_ref[0, 0, first_index + n], s.page_size)
            in_page, _ = _divide(row, s.rows_per_word)
            block = source_ref[first_column + column] + u.number
            pltpu.make_async_copy(
                pool_ref.at[block, :, word(in_page)],
                words_ref.at[u.slot, :, word(n)],
                sems.at[0, u.slot],
            ).start()

        @pl.when(u.num_rows == s.page_size)
        def _():
            jax.lax.fori_loop(0, s.page_size, start_row, None, unroll=unroll)

        @pl.when(u.num_rows < s.page_size)
        def _():
            jax.lax.fori_loop(0, u.num_rows, start_row, None)

    def wait_rows(u):
        def wait(ref):  # for as many bytes as `ref` has
            pltpu.make_async_copy(ref, ref, sems.at[0, u.slot]).wait()

        @pl.when(u.num_rows == s.page_size)
        def _():
            wait(words_ref.at[u.slot])

        @pl.when(u.num_rows < s.page_size)
        def _():
            def wait_row(n, _):
                wait(words_ref.at[u.slot, :, word(n)])

            jax.lax.fori_loop(0, u.num_rows, wait_row, None)

    def copy_old(u):
        old, new = pool_ref.at[u.target], page_ref.at[u.slot]
        return pltpu.make_async_copy(old, new, sems.at[1, u.slot])

    def copy_out(u):
        new, old = page_ref.at[u.slot], out_ref.at[u.target]
        return pltpu.make_async_copy(new, old, sems.at[2, u.slot])

    def is_partial(u):
        return (u.num_rows > 0) & (u.num_rows < s.page_size)

    def start(u):
        start_rows(u)
        pl.when(is_partial(u))(lambda: copy_old(u).start())

    def finish(u):
        wait_rows(u)
        pl.when(is_partial(u))(lambda: copy_old(u).wait())

        @pl.when(u.num_rows > 0)
        def _():
            column = pl.ds(u.index % s.used_width, 1)
            half = half_ref[0, u.index // s.used_width, column]
            for j in range(s.shared):
                words, page = words_ref.at[u.slot, j], page_ref.at[u.slot, j]
                _assemble(words, page, half, u.num_rows)
            copy_out(u).start()

    def wait_out(u):
        pl.when(u.num_rows > 0)(lambda: copy_out(u).wait())

    start(unit(0))

    def work(index, _):
        @pl.when(index > 0)  # the next unit reads into the buffers of the last one
        def _():
            wait_out(unit(index - 1))

        @pl.when(index + 1 < num_units)
        def _():
            start(unit(index + 1))

        finish(unit(index))

    jax.lax.fori_loop(0, num_units, work, None)
    wait_out(unit(num_units - 1))


def _divide(number, size: int):
    """Returns quotient and remainder of a number that is not negative."""
    if size & (size - 1) == 0:  # the scalar unit has no division
        return number >> (size.bit_length() - 1), number & (size - 1)
    return jax.lax.div(number, size), jax.lax.rem(number, size)


def _assemble(words_ref, page_ref, half, num_rows):
    """Writes the first `num_rows` rows of a page, and keeps the others.

    half: int32 [1, page_size], which half of the words of a row is wanted.
    """
    page_size, row_size = page_ref.shape
    words = words_ref[...]
    if page_ref.dtype.itemsize == 2:
        words = pltpu.bitcast(words, jnp.uint32)  # rows 2n and 2n + 1: low, high half
        # The list runs along lanes; the rows need it along sublanes.
        square = (page_size, page_size)
        on_diagonal = jax.lax.broadcasted_iota(
            jnp.int32, square, 0
        ) == jax.lax.broadcasted_iota(jnp.int32, square, 1)
        column = jnp.sum(
            jnp.where(on_diagonal, half, 0).astype(jnp.float32), axis=1, keepdims=True
        )
        words = jnp.where(column > 0.5, words >> 16, words & 0xFFFF)

    @pl.when(num_rows == page_size)
    def _():
        page_ref[...] = _narrow(words, page_ref.dtype)

    @pl.when(num_rows < page_size)
    def _():
        row = jax.lax.broadcasted_iota(jnp.int32, (page_size, row_size), 0)
        old = page_ref[...]
        if old.dtype.itemsize == 2:
            old = pltpu.bitcast(old, jnp.uint16).astype(jnp.uint32)
        merged = jnp.where(row < num_rows, words, old)
        page_ref[...] = _narrow(merged, page_ref.dtype)


def _narrow(words, dtype):
    """Returns the low halves of 32-bit words as `dtype` (float32 stays as it is)."""
    if words.dtype == dtype:
        return words
    return pltpu.bitcast(words.astype(jnp.uint16), dtype)
