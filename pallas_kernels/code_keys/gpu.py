"""Coding of keys for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per group of a lane and KV head; each thread has a channel. It reads the keys
twice, the second time from the cache: for the range, and for the levels. The codes are
updated in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import KeyCodes, KvPages, PageTable, PerLane
from pallas_kernels.gpu_counting import element
from pallas_kernels.gpu_layouts import interpreter_of, row_layout
from pallas_kernels.score_select.codes import LEAST_STEP, CodeLayout, encode

_THREADS = 128
_BY_THREAD = row_layout(_THREADS).reduce(0)


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("layout", "most", "interpret"))
def code_keys_gpu(
    codes: KeyCodes,
    kv_pages: KvPages,
    page_table: PageTable,
    starts: PerLane,
    ends: PerLane,
    *,
    layout: CodeLayout,
    most: int,
    interpret: bool | plgpu.InterpretGPUParams = False,
) -> KeyCodes:
    """Returns what `api.code_keys` documents, computed on a Hopper GPU."""
    num_pages, num_heads = codes.shape[:2]
    if layout.head_size not in (64, 128):
        raise NotImplementedError(
            f"the head size is {layout.head_size}: the GPU kernel serves 64 and 128; "
            "impl='reference' serves every size"
        )

    def body(pool_ref, table_ref, start_ref, end_ref, codes_ref):
        lane, head = lax.axis_index("lane"), lax.axis_index("head")
        start, end = start_ref[lane], end_ref[lane]
        group = lax.div(start, layout.group) + lax.axis_index("group")
        first = group * layout.group
        column = lax.div(group, layout.groups)
        page = table_ref[lane, jnp.minimum(column, table_ref.shape[1] - 1)]
        is_page = (page >= 0) & (page < num_pages) & (column < table_ref.shape[1])

        @pl.when((start < end) & (first < end) & is_page)
        def _code():
            place = page, head, lax.rem(group, layout.groups), end - first
            _code_group(layout, (pool_ref, codes_ref), place, bool(interpret))

    codes_ref = jax.new_ref(codes)
    plgpu.kernel(
        body,
        out_type=(),
        grid=(page_table.shape[0], num_heads, most),
        grid_names=("lane", "head", "group"),
        kernel_name="code_keys",
        # No thread reads what it or another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpreter_of(interpret),
    )(kv_pages, page_table, starts, ends, codes_ref)
    return jax.freeze(codes_ref)


def _code_group(layout: CodeLayout, refs, place, interpret):
    """Codes a group of keys.

    Args:
      layout: of the codes.
      refs: the pool and the codes.
      place: page, head, group of the page, and keys of the group, int32.
      interpret: run on whole arrays.
    """
    if interpret:
        pool_ref, codes_ref = refs
        page, head, group, count = place
        rows = pl.ds(group * layout.group, layout.group)
        keys = pool_ref[page, head, rows][:, : layout.head_size]
        is_used = jnp.arange(layout.group) < count
        codes_ref[page, head, group] = encode(keys, is_used, layout)
        return
    code = plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 2, *[_BY_THREAD] * 4))(
        functools.partial(_code, layout)
    )
    values = (plgpu.layout_cast(jnp.full((_THREADS,), x), _BY_THREAD) for x in place)
    code(*refs, *values)


def _const(value):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _index(value):
    return arith.index_cast(ir.IndexType.get(), value)


def _code(layout: CodeLayout, ctx, pool, codes, *place):
    """Device code of `_code_group`: one thread's channel."""
    del ctx
    page, head, group, count = (element(x.registers.flat[0], 0) for x in place)
    at = [_index(page), _index(head)]
    channel = arith.andi(mgpu.thread_idx(), _const(layout.head_size - 1))
    f32, bf16 = ir.F32Type.get(), ir.BF16Type.get()
    first = arith.muli(group, _const(layout.group))

    def is_used(row):
        return arith.cmpi(arith.CmpIPredicate.slt, _const(row), count)

    keys = []
    for row in range(layout.group):  # all loads before what waits for them
        row = arith.select(is_used(row), _const(row), _const(0))
        row = _index(arith.addi(first, row))
        key = memref.load(pool, [*at, row, _index(channel)])
        keys.append(key if key.type == f32 else arith.extf(f32, key))
    low = high = keys[0]
    for key in keys[1:]:
        low, high = arith.minimumf(low, key), arith.maximumf(high, key)
    levels = layout.levels

    def rounded(value):
        value = arith.truncf(bf16, value)
        return value, arith.extf(f32, value)

    def constant(value):
        return arith.constant(f32, float(value))

    step = arith.divf(arith.subf(high, low), constant(levels - 1))
    step, wide_step = rounded(step)
    base = arith.subf(low, arith.mulf(wide_step, constant(levels)))
    base, wide_base = rounded(base)
    wide_step = arith.maximumf(wide_step, constant(LEAST_STEP))
    i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (16, 32))
    base, step = (arith.extui(i32, arith.bitcast(i16, x)) for x in (base, step))
    at.append(_index(group))
    word = arith.ori(base, arith.shli(step, _const(16)))
    memref.store(word, codes, [*at, _index(channel)])
    words = arith.muli(channel, _const(layout.words))
    words = arith.addi(words, _const(layout.head_size))
    block, fields = layout.block_words, layout.fields
    for number in range(layout.words):
        word = _const(0)
        for field in range(fields):
            row = number // block * block * fields + field * block + number % block
            level = arith.divf(arith.subf(keys[row], wide_base), wide_step)
            level = utils.inline_ptx("cvt.rni.s32.f32 $0, $1;", level, result_types=i32)
            level = arith.subi(level, _const(levels))
            level = arith.maxsi(level, _const(0))
            level = arith.minsi(level, _const(levels - 1))
            level = arith.select(is_used(row), level, _const(0))
            shifted = arith.shli(level, _const(layout.bits * field))
            word = arith.ori(word, shifted)
        place = arith.addi(words, _const(number))
        memref.store(word, codes, [*at, _index(place)])
