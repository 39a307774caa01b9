"""Counting, ranking and writing what is chosen, thread by thread, on a GPU.

None of this has a Pallas form: it names single threads. The interpreter runs the same
steps on whole arrays instead.
"""

import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, memref, nvvm, scf, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128  # of one warpgroup


def synchronize(bar, interpret):
    """Waits for all warpgroups."""
    if interpret:
        plgpu.barrier_arrive(bar)
        plgpu.barrier_wait(bar)
        return

    @plgpu.inline_mgpu()
    def wait(ctx):
        del ctx
        gpu.barrier()

    wait()


def write_warp_sums(sums, wg, value, by_thread, interpret):
    """Writes the sum of a value per thread over every warp of this warpgroup."""
    if interpret:
        for warp in range(4):
            sums[wg * 4 + warp] = jnp.sum(value[32 * warp : 32 * warp + 32])
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), by_thread))
    def write(ctx, sums, value):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        total = utils.redux(
            element(value.registers.flat[0], 0),
            mgpu.c(0xFFFFFFFF, i32),
            utils.ReductionKind.ADD,
        )
        warp = arith.shrui(mgpu.thread_idx(), mgpu.c(5, i32))
        memref.store(total, sums, [arith.index_cast(ir.IndexType.get(), warp)])

    write(sums, value)


def add_warp_sums(sums, num_warpgroups, interpret):
    """Returns the total of the sums of all warps."""
    num_warps = 4 * num_warpgroups
    if interpret:
        return sum(sums[warp] for warp in range(num_warps))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(
            (), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())
        ),
    )
    def add(ctx, sums):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        lane = arith.andi(mgpu.thread_idx(), mgpu.c(31, i32))
        value = memref.load(sums, [arith.index_cast(ir.IndexType.get(), lane)])
        is_warp = arith.cmpi(arith.CmpIPredicate.ult, lane, mgpu.c(num_warps, i32))
        value = arith.select(is_warp, value, mgpu.c(0, i32))
        total = utils.redux(value, mgpu.c(0xFFFFFFFF, i32), utils.ReductionKind.ADD)
        return mgpu.FragmentedArray.splat(total, (), is_signed=True)

    return add(sums)


def warp_scan(count, by_thread, interpret):
    """Returns the inclusive sums of one value per thread over the threads of a warp."""
    if interpret:
        return jnp.cumsum(count.reshape(-1, 32), axis=1).reshape(-1)

    @plgpu.inline_mgpu(
        arg_types=(by_thread,),
        return_type=plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=by_thread),
    )
    def scan(ctx, x):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        x_type = x.registers.flat[0].type
        value = element(x.registers.flat[0], 0)
        lane = arith.andi(mgpu.thread_idx(), mgpu.c(31, i32))
        for distance in (1, 2, 4, 8, 16):
            other = nvvm.shfl_sync(
                mgpu.c(0xFFFFFFFF, i32),
                value,
                mgpu.c(distance, i32),
                mgpu.c(0, i32),
                nvvm.ShflKind.up,
            )
            has_other = arith.cmpi(arith.CmpIPredicate.uge, lane, mgpu.c(distance, i32))
            other = arith.select(has_other, other, mgpu.c(0, i32))
            value = arith.addi(value, other)
        x.registers.flat[0] = vector.broadcast(x_type, value)
        return x

    return scan(count)


def append_chosen(
    out_ref, larger, equal, first, kind, num_equal, layout, by_thread, interpret
):
    """Writes the chosen positions of every thread at their ranks.

    Args:
      out_ref: int32 [cap].
      larger: larger keys before the first position of every thread.
      equal: equal keys before it, of which the first `num_equal` are chosen.
      first: that position.
      kind: 1 << 16 where the key is larger, 1 where it is equal, else 0.
      num_equal: number of equal keys that are chosen.
      layout: of `kind`.
      by_thread: layout of the arrays with one value per thread.
      interpret: run on whole arrays.
    """
    if interpret:
        is_larger, is_equal = kind >> 16, kind & 1
        larger = larger[:, None] + jnp.cumsum(is_larger, axis=1) - is_larger
        equal = equal[:, None] + jnp.cumsum(is_equal, axis=1) - is_equal
        rank = (larger + jnp.minimum(equal, num_equal)).reshape(-1)
        chosen = ((is_larger | (is_equal & (equal < num_equal))) != 0).reshape(-1)
        position = (first[:, None] + jnp.arange(kind.shape[1])[None, :]).reshape(-1)

        def write(i, _):
            @pl.when(chosen[i])
            def _write():
                out_ref[rank[i]] = position[i]

        lax.fori_loop(0, chosen.shape[0], write, None)
        return

    rank = larger + jnp.minimum(equal, num_equal)
    left = num_equal - jnp.minimum(equal, num_equal)  # equal keys still to choose

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), by_thread, by_thread, by_thread, layout)
    )
    def append(ctx, out, rank, left, first, kind):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        zero, one = mgpu.c(0, i32), mgpu.c(1, i32)
        at, left, position = (
            element(x.registers.flat[0], 0) for x in (rank, left, first)
        )
        for register in kind.registers.flat:
            for i in range(ir.VectorType(register.type).shape[0]):
                what = element(register, i)
                is_equal = arith.cmpi(arith.CmpIPredicate.eq, what, one)
                is_larger = arith.cmpi(arith.CmpIPredicate.ugt, what, one)
                is_left = arith.cmpi(arith.CmpIPredicate.sgt, left, zero)
                is_taken = arith.andi(is_equal, is_left)
                is_chosen = arith.ori(is_larger, is_taken)
                store = scf.IfOp(is_chosen)
                with ir.InsertionPoint(store.then_block):
                    index = arith.index_cast(ir.IndexType.get(), at)
                    memref.store(position, out, [index])
                    scf.yield_([])
                at = arith.addi(at, arith.select(is_chosen, one, zero))
                left = arith.subi(left, arith.select(is_taken, one, zero))
                position = arith.addi(position, one)

    append(out_ref, rank, left, first, kind)


def element(register, i):
    """Returns element `i` of a register that is a vector."""
    return vector.extract(
        register,
        dynamic_position=[],
        static_position=ir.DenseI64ArrayAttr.get([i]),
    )
