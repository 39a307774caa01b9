"""The clock of a GPU, read by a launch between others: no profiler, no host."""

import jax
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


def read_clock(*after: jax.Array, before: jax.Array | None = None):
    """Returns the device's time int32 [2], see `nanoseconds`. GPU only.

    Args:
      *after: arrays that exist when the clock is read, which reads nothing of them.
      before: int32 [n]. Given one, the result is (time, the same array): what is
        computed of that array begins after the clock was read.
    """
    ref = None if before is None else jax.new_ref(before)

    def body(*refs):
        out = refs[-1]
        if ref is not None:
            refs[0][0] = refs[0][0]  # all that reads the array waits for this

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def read(ctx, out):
            del ctx
            i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
            now = mgpu.utils.inline_ptx(
                "mov.u64 $0, %globaltimer;", result_types=i64, has_side_effects=True
            )
            with mgpu.utils.single_thread(scope=mgpu.utils.ThreadSubset.WARPGROUP):
                for index, half in enumerate((now, arith.shrui(now, mgpu.c(32, i64)))):
                    place = arith.constant(ir.IndexType.get(), index)
                    memref.store(arith.trunci(i32, half), out, [place])

        read(out)

    time = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2,), jnp.int32),
        grid=(1,),
        grid_names=("cta",),
        kernel_name="read_clock",
    )(*(() if ref is None else (ref,)), *after)
    return time if ref is None else (time, jax.freeze(ref))


def nanoseconds(times):
    """Returns int64 nanoseconds [...] of clock readings int32 [..., 2], numpy."""
    low, high = times[..., 0].astype("uint32"), times[..., 1]
    return low.astype("int64") | high.astype("int64") << 32
