"""Products of a few tokens with 8-bit weights: a kernel for Hopper GPUs, and XLA's.

Weights are int8 [out, in] with one scale per output, x is [tokens, in] in bfloat16 and
stays so: weights are widened in registers, where the matrix unit takes them as its left
operand, so tokens are its columns. One warpgroup copies weights and tokens into shared
memory, some others multiply, 64 or 128 outputs each. `parts` cuts the long axis over
CTAs; their sums are left to the kernel behind, as `sparsespec_jax.model` does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

_DEPTH = 128  # inputs of one step
_SHARED_BYTES = 222 * 1024  # of a multiprocessor that CTAs may take
_MOST_STAGES = 8
_COPY_REGISTERS = 40
_WGMMA = plgpu.Layout.WGMMA
_PACKED = 64  # inputs among which the order is changed
# Of 64 outputs by 64 inputs: 16 neighbours in a thread, four threads in a row.
_PACKED_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((64, _PACKED), (16, _PACKED), (8, _PACKED), (16,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


class Int8Weight(NamedTuple):
    """A matrix in 8 bits: `values * scale[:, None]` is [out, in]."""

    values: jax.Array  # int8 [out, in]
    scale: jax.Array  # float32 [out]


class PackedWeight(NamedTuple):
    """The same for the kernel: inputs in the order in which threads take them."""

    values: jax.Array  # int8 [out, in], every 64 inputs permuted
    scale: jax.Array  # float32 [out]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the kernel is cut.

    Raises:
      ValueError: a size that the kernel does not have.
    """

    groups: int = 4  # warpgroups of a CTA that multiply
    rows: int = 64  # outputs of each, 64 or 128
    parts: int = 1  # cuts of the long axis
    ctas: int = 1  # of a multiprocessor, which share its memory
    cluster: int = 1  # CTAs that read tokens together
    registers: int = 0  # of a thread that multiplies; 0: as many as all threads

    def __post_init__(self):
        sizes = (self.groups, self.parts, self.ctas, self.cluster)
        if min(sizes) < 1 or self.rows not in (64, 128):
            raise ValueError(f"{self}: rows are 64 or 128, all else at least 1")

    @property
    def outputs(self):
        """Outputs of a cluster."""
        return self.groups * self.rows * self.cluster

    def stages(self, num_tokens):
        """Steps of weights and tokens in flight."""
        step = _DEPTH * (self.groups * self.rows + 2 * num_tokens)
        return min(_MOST_STAGES, _SHARED_BYTES // self.ctas // step)

    def serves(self, num_tokens, size_in, size_out, out_bytes=4):
        """Whether the kernel can be cut like this for a product."""
        stages = self.stages(num_tokens)
        return (
            size_out % self.outputs == 0
            and size_in % (_DEPTH * self.parts) == 0
            and num_tokens % (8 * self.cluster) == 0
            and stages >= 2
            and stages * _DEPTH >= num_tokens * out_bytes  # results take their place
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xla:
    """The product as XLA makes it: a dot whose weights are converted."""

    parts: int = 1

    def serves(self, num_tokens, size_in, size_out, out_bytes=4):
        """Whether the long axis can be cut like this."""
        return size_in % self.parts == 0


def quantise(kernel: jax.Array) -> Int8Weight:
    """The 8-bit form of a kernel [in, ...], one scale for each output."""
    flat = kernel.reshape(kernel.shape[0], -1).T.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(flat).max(1), 1e-30) / 127
    values = jnp.round(flat / scale[:, None]).astype(jnp.int8)
    return Int8Weight(values, scale)


def pack(weight: Int8Weight) -> PackedWeight:
    """The form that the kernel reads.

    The matrix unit wants of a thread, in every 16 inputs, number c of four in a row,
    the inputs 2c, 2c + 1, 8 + 2c and 9 + 2c: here those of 64 inputs are neighbours.
    """
    thread, group, value = np.meshgrid(*map(np.arange, (4, 4, 4)), indexing="ij")
    order = 16 * group + 8 * (value // 2) + 2 * thread + value % 2
    cut = weight.values.reshape(len(weight.values), -1, _PACKED)
    return PackedWeight(
        cut[..., order.ravel()].reshape(weight.values.shape), weight.scale
    )


def multiply(x: jax.Array, weight, how, dtype) -> jax.Array:
    """x [T, in] times a weight: [T, out] in `dtype`, or float32 parts [P, T, out].

    Args:
      weight: PackedWeight for a Tiling, else Int8Weight.
      how: a Tiling (GPU) or Xla; more than one part gives parts.

    Raises:
      ValueError: the product cannot be cut like this.
    """
    if isinstance(how, Tiling) != isinstance(weight, PackedWeight):
        raise ValueError(f"{how} does not take a {type(weight).__name__}")
    dtype = jnp.dtype(dtype if how.parts == 1 else jnp.float32)
    sizes = x.shape[0], x.shape[1], weight.values.shape[0]
    if not how.serves(*sizes, dtype.itemsize):
        raise ValueError(f"{how} does not fit tokens, inputs and outputs {sizes}")
    if isinstance(how, Xla):
        return _by_xla(x, weight, how.parts, dtype)
    made = _by_kernel(x, *weight, tiling=how, dtype=dtype)
    return made[0] if how.parts == 1 else made


def _by_xla(x, weight, parts, dtype):
    values = weight.values.astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dot = functools.partial(
        lax.dot_general, precision=precision, preferred_element_type=jnp.float32
    )
    if parts == 1:
        made = dot(x, values, (((1,), (1,)), ((), ())))
    else:
        cut = x.reshape(len(x), parts, -1), values.reshape(len(values), parts, -1)
        made = dot(*cut, (((2,), (2,)), ((1,), (1,))))
    return (made * weight.scale).astype(dtype)


def _swizzled(minor_bytes, itemsize):
    """Shared memory that the matrix unit and copies read without conflicts."""
    tiling = plgpu.TilingTransform((8, minor_bytes // itemsize))
    return tiling, plgpu.SwizzleTransform(minor_bytes)


def _widen(packed):
    """Values of a PackedWeight in registers as bfloat16, where products take them.

    Exact, by four instructions for two values: the seven low bits make 128 and more,
    the highest one 128 or 256, and their difference is the value.
    """
    rows, depth = packed.shape
    blocks = depth // _PACKED

    @plgpu.inline_mgpu(
        arg_types=(_PACKED_LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct((rows, depth), jnp.bfloat16, layout=_WGMMA),
    )
    def widen(ctx, packed):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((4,), i32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        layout = mgpu.WGMMA_LAYOUT
        made = np.empty(layout.registers_shape((rows, depth)), dtype=object)
        for place in np.ndindex(packed.registers.shape):
            tile, block, half = place[0], place[1], place[4]
            loaded = vector.bitcast(words, packed.registers[place])
            for group in range(4):
                word = vector.extract(loaded, [], [group])
                for side in range(2):
                    column = 8 * block + 2 * group + side
                    two = vector.bitcast(
                        pair,
                        vector.broadcast(
                            ir.VectorType.get((1,), i32), _two_values(word, side)
                        ),
                    )
                    made[tile, column, 0, 0, half, 0, 0, 0, 0] = two
        assert packed.registers.shape[1] == blocks
        return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)

    return widen(packed)


def _two_values(word, side):
    """Two of the four bytes of a word, as bfloat16 in one register."""
    i32 = ir.IntegerType.get_signless(32)
    places = ("0x4140", "0x4342")[side]
    return llvm.inline_asm(
        i32,
        [word],
        f"""
        {{
        .reg .b32 s<3>;
        prmt.b32 s0, $1, 0x43, {places};
        and.b32 s1, s0, 0xff7fff7f;
        and.b32 s2, s0, 0xff80ff80;
        sub.bf16x2 $0, s1, s2;
        }}
        """,
        "=r,r",
    )


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("tiling", "dtype"))
def _by_kernel(x, values, scale, *, tiling: Tiling, dtype):
    """Returns parts [P, T, out] of the product, P = 1 in `dtype`."""
    (num_tokens, size_in), size_out = x.shape, values.shape[0]
    cut, stages = tiling, tiling.stages(num_tokens)
    steps = size_in // _DEPTH // cut.parts

    def body(x_ref, values_ref, scale_ref, out_ref, shared, x_s, full, free):
        values_s, out_s = shared
        part, group = lax.axis_index("part"), lax.axis_index("warpgroup")
        cta = lax.axis_index("tile") * cut.cluster + lax.axis_index("cta")
        first = pl.multiple_of(cta * cut.groups * cut.rows, cut.groups * cut.rows)

        def outputs(index):
            start = pl.multiple_of(first + index * cut.rows, cut.rows)
            return pl.ds(start, cut.rows)

        def copy(step, _):
            slot = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _wait():
                plgpu.barrier_wait(free.at[slot])

            start = pl.multiple_of((part * steps + step) * _DEPTH, _DEPTH)
            inputs, bar = pl.ds(start, _DEPTH), full.at[slot]
            for i in range(cut.groups):
                source = values_ref.at[outputs(i), inputs]
                plgpu.copy_gmem_to_smem(source, values_s.at[i, slot], bar)
            shares = {"collective_axes": "cta"} if cut.cluster > 1 else {}
            plgpu.copy_gmem_to_smem(x_ref.at[:, inputs], x_s.at[slot], bar, **shares)

        def load(step):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])
            return plgpu.load(values_s.at[group, slot], layout=_PACKED_LAYOUT)

        def multiply(sums, step, packed, then=None):
            slot = lax.rem(step, stages)
            plgpu.wgmma(sums, _widen(packed), x_s.at[slot].T)
            following = None if then is None else then()
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])
            return following

        @pl.when(group == cut.groups)
        def _copy():
            if cut.registers:
                plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            lax.fori_loop(0, steps, copy, None)

            def drain(step, _):
                plgpu.barrier_wait(free.at[lax.rem(step, stages)])

            lax.fori_loop(max(steps - stages, 0), steps, drain, None)

        @pl.when(group < cut.groups)
        def _compute():
            if cut.registers:
                plgpu.set_max_registers(cut.registers, action="increase")

            def run(sums):
                # While a step is multiplied the next one is loaded.
                def one(step, packed):
                    return multiply(sums, step, packed, lambda: load(step + 1))

                last = lax.fori_loop(0, steps - 1, one, load(jnp.int32(0)))
                multiply(sums, jnp.int32(steps - 1), last)
                return sums[...]

            sums = pl.run_scoped(run, plgpu.ACC((cut.rows, num_tokens), jnp.float32))
            factor = plgpu.load(
                scale_ref.at[outputs(group)], layout=_WGMMA.reduce(1), optimized=False
            )
            sums = (sums * lax.broadcast_in_dim(factor, sums.shape, [0])).astype(dtype)
            place = out_s.at[group, pl.ds(0, num_tokens)]
            place.T[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, out_ref.at[part, :, outputs(group)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((cut.parts, num_tokens, size_out), dtype),
        grid=(size_out // cut.outputs, cut.parts),
        grid_names=("tile", "part"),
        cluster=(cut.cluster,),
        cluster_names=("cta",),
        num_threads=cut.groups + 1,
        thread_name="warpgroup",
        kernel_name="int8_product",
        scratch_types=_scratch(cut, stages, num_tokens, x.dtype, dtype),
    )(x, values, scale)


def _scratch(cut, stages, num_tokens, x_dtype, dtype):
    """Returns shared memory and barriers of a CTA; a warpgroup has its own weights.

    Results take the place of the weights, of which none are left then.
    """
    item = jnp.dtype(dtype).itemsize
    values = cut.groups, stages, cut.rows, _DEPTH
    results = cut.groups, stages * _DEPTH // item, cut.rows
    if cut.cluster == 1:
        free = plgpu.Barrier(num_arrivals=cut.groups, num_barriers=stages)
    else:
        free = plgpu.ClusterBarrier(
            collective_axes=("cta",), num_arrivals=cut.groups, num_barriers=stages
        )
    return [
        plgpu.RefUnion(
            plgpu.SMEM(values, jnp.int8, transforms=_swizzled(64, 1)),
            plgpu.SMEM(results, dtype, transforms=_swizzled(128, item)),
        ),
        plgpu.SMEM((stages, num_tokens, _DEPTH), x_dtype, transforms=_swizzled(128, 2)),
        plgpu.Barrier(num_arrivals=1 + cut.groups, num_barriers=stages),
        free,
    ]
